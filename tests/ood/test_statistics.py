"""Class statistics merge exactly, travel unharmed, and give a head that needs few samples."""

from __future__ import annotations

import hashlib
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ood.compact import to_bytes
from ood.errors import OodError
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise


def _sample(seed: int, n: int, dim: int, names: str) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i] for i in rng.integers(0, len(names), n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=dim) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.3 * rng.normal(size=(n, dim))
    return rows, labels


def _same(a: ClassStatistics, b: ClassStatistics) -> bool:
    return (
        a.labels == b.labels
        and np.array_equal(a.counts, b.counts)
        and np.allclose(a.means, b.means, rtol=1e-9, atol=1e-12)
        and np.allclose(a.scatter, b.scatter, rtol=1e-9, atol=1e-9)
    )


samples = st.builds(
    _sample,
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.just(3),
    st.sampled_from(["a", "ab", "bc", "abcd"]),
)


@settings(max_examples=60, deadline=None)
@given(samples, samples, samples)
def test_merge_is_the_union_commutative_and_associative(one, two, three) -> None:
    a, b, c = (ClassStatistics.fit(*data) for data in (one, two, three))
    assert _same(a.merge(b), b.merge(a))
    assert _same(a.merge(b).merge(c), a.merge(b.merge(c)))
    union = ClassStatistics.fit(np.vstack([one[0], two[0]]), one[1] + two[1])
    assert _same(a.merge(b), union)


@settings(max_examples=40, deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(data, random) -> None:
    rows, labels = data
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = ClassStatistics.fit(rows[order], [labels[i] for i in order])
    assert _same(ClassStatistics.fit(rows, labels), shuffled)


def test_the_same_data_in_two_groups_gives_the_same_bits() -> None:
    groups = [ClassStatistics.fit(*_sample(seed, 20, 5, "abc")) for seed in (1, 2)]
    features = _sample(3, 4, 5, "ab")[0]
    first, second = (GaussianHead.from_statistics(groups).distances(features) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)))
def test_groups_in_canonical_order_give_the_same_head_bit_for_bit(order) -> None:
    groups = [ClassStatistics.fit(*_sample(seed, 20, 5, "abcd")) for seed in range(5)]
    named = {hashlib.sha256(to_bytes(groups[k])).hexdigest(): groups[k] for k in order}
    head = GaussianHead.from_statistics([named[name] for name in sorted(named)])
    plain = sorted(groups, key=lambda group: hashlib.sha256(to_bytes(group)).hexdigest())
    probe = _sample(9, 4, 5, "ab")[0]
    again = GaussianHead.from_statistics(plain)
    assert head.distances(probe).tobytes() == again.distances(probe).tobytes()
    assert head.components == again.components
    assert head.shrinkage == again.shrinkage


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 4))
def test_devices_that_merge_in_any_order_have_the_head_of_the_union(order, devices) -> None:
    data = [_sample(seed, 25, 4, "abcd") for seed in range(4)]
    parts = [ClassStatistics.fit(*data[k]) for k in order]
    merged = reduce(ClassStatistics.merge, parts[:devices])
    chosen = [data[k] for k in sorted(order[:devices])]
    rows = np.vstack([rows for rows, _ in chosen])
    union = ClassStatistics.fit(rows, [name for _, names in chosen for name in names])
    assert merged.labels == union.labels
    assert np.array_equal(merged.counts, union.counts)
    assert np.abs(merged.means - union.means).max() <= 1e-6
    assert np.abs(merged.scatter - union.scatter).max() <= 1e-6
    heads = [GaussianHead.from_statistics([each]) for each in (merged, union)]
    assert np.allclose(heads[0].distances(rows), heads[1].distances(rows), rtol=1e-6, atol=1e-6)


def test_a_group_that_comes_and_goes_leaves_the_head_as_it_was() -> None:
    one, two, three = (ClassStatistics.fit(*_sample(seed, 20, 5, "abc")) for seed in (1, 2, 3))
    probe = _sample(9, 6, 5, "ab")[0]
    before = GaussianHead.from_statistics([one, three]).distances(probe)
    GaussianHead.from_statistics([one, two, three])
    assert GaussianHead.from_statistics([one, three]).distances(probe).tobytes() == before.tobytes()


def test_a_class_only_one_side_knows_keeps_its_mean() -> None:
    a, b = ClassStatistics.fit(*_sample(1, 9, 4, "a")), ClassStatistics.fit(*_sample(2, 7, 4, "b"))
    merged = a.merge(b)
    assert merged.means[0].tobytes() == a.means[0].tobytes()
    assert merged.means[1].tobytes() == b.means[0].tobytes()


def test_statistics_survive_travelling() -> None:
    statistics = ClassStatistics.fit(*_sample(5, 40, 12, "abcd"))
    arrays = statistics.to_arrays()
    assert arrays["scatter"].shape == (12 * 13 // 2,)
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "counts": "int64",
        "means": "float32",
        "scatter": "float32",
    }
    back = ClassStatistics.from_arrays(statistics.labels, arrays)
    assert np.allclose(back.scatter, statistics.scatter, atol=1e-5)
    again = back.to_arrays()
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("counts", lambda a: a * 0, "between 1"),
        ("counts", lambda a: a.astype(np.float32), "int64"),
        ("means", lambda a: a * np.nan, "NaN"),
        ("means", lambda a: a[:1], "1 means for 2"),
        ("means", lambda a: a.astype(object), "real numbers"),
        ("scatter", lambda a: a[:-1], "scatter must be"),
        ("scatter", lambda a: a * np.inf, "NaN or infinity"),
        ("scatter", lambda a: -a, "negative variance"),
        ("scatter", lambda a: a + np.float32([0, 1e3, 0, 0, 0, 0]), "positive semi-definite"),
    ],
)
def test_a_hostile_array_is_refused_by_name(name, change, message) -> None:
    statistics = ClassStatistics.fit(*_sample(5, 20, 3, "ab"))
    arrays = statistics.to_arrays()
    arrays[name] = change(arrays[name])
    with pytest.raises(OodError, match=message):
        ClassStatistics.from_arrays(statistics.labels, arrays)


def test_missing_arrays_and_bad_labels_are_refused() -> None:
    statistics = ClassStatistics.fit(*_sample(5, 20, 3, "ab"))
    with pytest.raises(OodError, match="counts, means, scatter"):
        ClassStatistics.from_arrays(statistics.labels, {"counts": statistics.counts})
    for labels in (("b", "a"), ("a", "a"), ("a", ""), ("a",), ()):
        with pytest.raises(OodError):
            ClassStatistics.from_arrays(labels, statistics.to_arrays())


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((0, 3)), [], "empty"),
        (np.zeros((2, 0)), ["a", "b"], "empty"),
        (np.zeros(3), ["a"], r"\[n, d\]"),
        ([[0.0, np.nan]], ["a"], "NaN"),
        ([[0.0, np.inf]], ["a"], "infinity"),
        ([[0.0]], [""], "zero length"),
        ([[0.0]], ["a", "b"], "2 labels for 1"),
        ([[0.0]], [3], "expected str"),
        ([[0.0]], "a", "sequence of strings"),
        ([["x"]], ["a"], "real numbers"),
    ],
)
def test_bad_samples_are_refused_by_name(features, labels, message) -> None:
    with pytest.raises(OodError, match=message):
        ClassStatistics.fit(features, labels)


def test_normalising_gives_unit_rows_and_survives_extreme_numbers() -> None:
    rows = l2_normalise(np.array([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]], dtype=np.float64))
    assert np.allclose(rows, [[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    assert rows.dtype == np.float32
    with pytest.raises(OodError, match="NaN"):
        l2_normalise([[np.nan, 1.0]])


def test_distances_are_the_definition_of_mahalanobis() -> None:
    rows, labels = _sample(1, 60, 6, "abc")
    statistics = ClassStatistics.fit(rows, labels)
    head = GaussianHead.from_statistics([statistics])
    pooled = statistics.scatter / (60 - 3)
    scale = np.trace(pooled) / 6
    covariance = (1 - head.shrinkage) * pooled + head.shrinkage * scale * np.eye(6)
    gaps = rows[:, None] - statistics.means
    expected = np.einsum("nkd,de,nke->nk", gaps, np.linalg.inv(covariance), gaps)
    assert np.allclose(head.distances(rows), expected, rtol=1e-9)
    log_density = -0.5 * (expected + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert np.allclose(head.log_likelihoods(rows), log_density)


def test_the_head_is_linear_discriminant_analysis_when_samples_are_many() -> None:
    rows, labels = _sample(1, 900, 4, "abc")
    test, _ = _sample(2, 200, 4, "abc")
    head = GaussianHead.from_statistics([ClassStatistics.fit(rows, labels)])
    ours = head.label_probabilities(head.log_likelihoods(test))
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(rows, labels)
    assert np.abs(ours - reference.predict_proba(test)).max() < 0.1
    assert np.abs(ours - reference.predict_proba(test)).mean() < 0.01


def test_a_few_samples_in_many_dimensions_still_classify() -> None:
    rows, labels = _sample(1, 12, 192, "abcd")
    test, truth = _sample(2, 200, 192, "abcd")
    head = GaussianHead.from_statistics([ClassStatistics.fit(l2_normalise(rows), labels)])
    guess = head.label_probabilities(head.log_likelihoods(l2_normalise(test))).argmax(axis=1)
    known = [label in head.labels for label in truth]
    right = [head.labels[g] == t for g, t in zip(guess, truth, strict=True)]
    assert np.mean(np.array(right)[known]) > 0.95


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        ([[0.5]], ["a"]),
        ([[0.5, 0.5]] * 5, ["a"] * 5),
        ([[0.5, 0.5]] * 4, ["a", "b", "a", "b"]),
        ([[0.1, 0.0], [0.9, 0.0]], ["a", "b"]),
        ([[0.1, 0.0], [0.9, 0.0], [0.2, 0.0]], ["a", "b", "a"]),
        ([[0.1], [0.2], [0.9]], ["a", "a", "b"]),
    ],
    ids=["one sample", "constant", "constant classes", "no freedom", "singular", "dimension one"],
)
def test_degenerate_data_gives_a_finite_head(features, labels) -> None:
    head = GaussianHead.from_statistics([ClassStatistics.fit(features, labels)])
    probe = np.vstack([np.asarray(features), np.ones((1, head.dim))])
    assert np.isfinite(head.log_likelihoods(probe)).all()
    probabilities = head.label_probabilities(head.log_likelihoods(probe))
    assert np.allclose(probabilities.sum(axis=1), 1.0)
    assert head.distances(probe)[-1].min() > head.distances(probe)[0].min()


def test_a_label_of_two_groups_is_one_label_with_two_components() -> None:
    near = ClassStatistics.fit([[0.0, 0.0], [0.0, 0.1], [1.0, 0.0], [1.0, 0.1]], list("aabb"))
    far = ClassStatistics.fit([[0.0, 5.0], [0.0, 5.1]], list("aa"))
    head = GaussianHead.from_statistics([near, far])
    assert head.components == ((0, "a"), (0, "b"), (1, "a"))
    assert head.labels == ("a", "b")
    probabilities = head.label_probabilities(head.log_likelihoods([[0.0, 5.0], [1.0, 0.0]]))
    assert probabilities[0, 0] > 0.99
    assert probabilities[1, 1] > 0.99


def test_components_can_be_ruled_out_but_not_all() -> None:
    statistics = ClassStatistics.fit([[0.0], [0.1], [1.0], [1.1]], list("aabb"))
    head = GaussianHead.from_statistics([statistics])
    assert head.label_probabilities([[-np.inf, -1.0]]).tolist() == [[0.0, 1.0]]
    for bad in ([[-np.inf, -np.inf]], [[np.nan, 0.0]], [[0.0]], np.zeros((0, 2))):
        with pytest.raises(OodError):
            head.label_probabilities(bad)


def test_groups_must_exist_and_agree() -> None:
    one, two = ClassStatistics.fit([[0.0]], ["a"]), ClassStatistics.fit([[0.0, 1.0]], ["a"])
    with pytest.raises(OodError, match="at least one group"):
        GaussianHead.from_statistics([])
    with pytest.raises(OodError, match="different dimensions"):
        GaussianHead.from_statistics([one, two])
    with pytest.raises(OodError, match="dimension 1 and 2"):
        one.merge(two)
    with pytest.raises(OodError, match="expected 1"):
        GaussianHead.from_statistics([one]).distances([[0.0, 0.0]])
