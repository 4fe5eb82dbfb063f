"""Every score of the registry merges exactly in any order and survives its bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.errors import OodError
from ood.fitted import SCORES, FittedScore, fit, from_bytes
from ood.statistics import l2_normalise

NAMES = sorted(SCORES)
DIM = 12


def _samples(seed: int, names: str, n: int = 40, dim: int = DIM) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i % len(names)] for i in range(n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=dim) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.3 * rng.normal(size=(n, dim))
    return l2_normalise(rows), labels


def _fit(name: str, rows: np.ndarray, labels: list[str]) -> FittedScore:
    return fit(name, rows, labels, seed="digest")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(st.permutations([0, 1, 2]), st.integers(0, 99))
def test_merging_is_associative_and_commutative_to_the_last_bit(
    name: str, order: list[int], seed: int
) -> None:
    data = [_samples(seed, "ab"), _samples(seed + 100, "bc"), _samples(seed + 200, "d")]
    states = [_fit(name, *data[place]) for place in order]
    expected = _fit(
        name, np.vstack([rows for rows, _ in data]), [label for _, part in data for label in part]
    ).to_bytes()
    assert states[0].merge(states[1]).merge(states[2]).to_bytes() == expected
    assert states[0].merge(states[1].merge(states[2])).to_bytes() == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    rows, labels = _samples(0, "abc")
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = _fit(name, rows[order], [labels[place] for place in order])
    assert shuffled.to_bytes() == _fit(name, rows, labels).to_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_score_survives_its_bytes(name: str) -> None:
    score = _fit(name, *_samples(0, "abc"))
    probe, _ = _samples(1, "axy")
    read = from_bytes(score.to_bytes())
    assert np.array_equal(read.score(probe), score.score(probe))
    assert read.to_bytes() == score.to_bytes()


# Posteriors are sure of anything far from a boundary, also where nothing known is.
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gen", "gen++"}))
def test_foreign_classes_score_higher(name: str) -> None:
    score = _fit(name, *_samples(0, "abcdef", n=120))
    known, foreign = (
        score.score(_samples(seed, part)[0]) for seed, part in ((1, "abc"), (2, "xyz"))
    )
    assert (foreign[:, None] > known).mean() > 0.75


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (np.full((6, 8), 0.25), list("aabbcc")),
        (np.full((6, 8), 0.25), ["a"] * 6),
        (np.eye(8)[:1], ["a"]),
        (np.eye(8)[:2], ["a", "b"]),
        (np.repeat(np.eye(8)[:2], 5, axis=0), ["a"] * 10),
        (np.zeros((4, 8)), list("abab")),
    ],
    ids=["constant", "constant, one class", "one sample", "one each", "singular", "zeros"],
)
def test_degenerate_samples_still_give_finite_scores(
    name: str, rows: np.ndarray, labels: list[str]
) -> None:
    score = _fit(name, rows, labels)
    probe = np.vstack([rows, np.eye(8)[-1:], -np.eye(8)[:1]])
    assert np.isfinite(score.score(probe)).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_dimension_is_enough(name: str) -> None:
    score = fit(name, [[1.0], [0.5], [-1.0]], ["a", "a", "b"], seed="digest")
    assert np.isfinite(score.score([[0.7], [-0.7]])).all()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused_by_name(name: str) -> None:
    bad = np.eye(8)
    bad[3, 2] = np.nan
    with pytest.raises(OodError, match="NaN or infinity in 1 rows, the first is row 3"):
        _fit(name, bad, list("abcdefgh"))
    with pytest.raises(OodError, match="NaN or infinity in 1 rows, the first is row 3"):
        _fit(name, np.eye(8), list("abcdefgh")).score(bad)


@pytest.mark.parametrize("name", NAMES)
def test_other_dimensions_and_other_kinds_do_not_merge(name: str) -> None:
    score = _fit(name, *_samples(0, "ab"))
    with pytest.raises(OodError):
        score.merge(_fit(name, *_samples(0, "ab", dim=9)))
    other = _fit("gen" if name != "gen" else "vim", *_samples(0, "ab"))
    with pytest.raises(OodError, match="cannot merge the scores"):
        score.merge(other)
    with pytest.raises(OodError):
        score.score(np.eye(5))


@pytest.mark.parametrize("name", ["mahalanobis", "knn", "hyperdimensional"])
def test_damaged_bytes_are_refused(name: str) -> None:
    data = _fit(name, *_samples(0, "abc")).to_bytes()
    for damaged in (b"", data[:-1], data + b"\0", b"XXXX" + data[4:], data[: len(data) // 2]):
        with pytest.raises(OodError):
            from_bytes(damaged)
    rng = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            found = from_bytes(bytes(changed)).score(_samples(1, "ab")[0])
        except OodError:
            continue
        assert np.isfinite(found).all()


def test_an_unknown_score_is_refused_by_name() -> None:
    with pytest.raises(OodError, match="no score is called 'msp'"):
        fit("msp", [[1.0]], ["a"])


def test_a_raw_feature_beyond_the_scale_is_refused() -> None:
    with pytest.raises(OodError, match="a feature is 1000"):
        fit("mahalanobis", [[1000.0], [1.0]], ["a", "b"])


def test_hypervectors_of_a_hundred_classes_take_less_than_64_kilobytes() -> None:
    rng = np.random.default_rng(0)
    rows = l2_normalise(rng.normal(size=(4000, 576)) + 3 * rng.normal(size=576))
    labels = [f"class {row % 100}" for row in range(4000)]
    for name in ("hyperdimensional", "hyperdimensional-binary"):
        state = fit(name, rows, labels, seed="digest").to_bytes()
        assert len(state) <= 64 * 1024


def test_a_full_bank_stays_bounded_and_forgets_in_no_order() -> None:
    from ood.neighbours import NeighbourBank  # noqa: PLC0415 - the only test of its capacity

    parts = [NeighbourBank.fit(_samples(seed, "ab")[0], capacity=25) for seed in range(4)]
    one = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    other = parts[3].merge(parts[1].merge(parts[0].merge(parts[2])))
    assert len(one.rows) == 25
    assert one.to_bytes() == other.to_bytes() == one.merge(one).to_bytes()
