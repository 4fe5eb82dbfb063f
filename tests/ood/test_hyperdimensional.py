"""Bundles merge to what their samples' union gives, and cosines tell classes apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.errors import OodError
from ood.hyperdimensional import Bundles, ClassHypervectors, HypervectorState
from ood.statistics import l2_normalise


def _samples(seed: int, names: str, n: int = 30, dim: int = 12) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i % len(names)] for i in range(n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=dim) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.3 * rng.normal(size=(n, dim))
    return l2_normalise(rows), labels


@settings(max_examples=20, deadline=None)
@given(st.permutations([(1, "ab"), (2, "bc"), (3, "d")]))
def test_merging_in_any_order_is_fitting_on_the_union(parts) -> None:
    samples = [_samples(*part) for part in parts]
    merged = Bundles.fit(*samples[0])
    for part in samples[1:]:
        merged = merged.merge(Bundles.fit(*part))
    union = Bundles.fit(
        np.vstack([rows for rows, _ in samples]), [name for _, names in samples for name in names]
    )
    assert merged.labels == union.labels
    assert np.array_equal(merged.counts, union.counts)
    assert np.allclose(merged.sums, union.sums, atol=1e-9)


def test_the_most_similar_class_is_the_samples_own() -> None:
    bundles = Bundles.fit(*_samples(0, "abc"))
    rows, truth = _samples(1, "abc")
    found = ClassHypervectors(bundles.means, "seed").cosines(rows).argmax(axis=1)
    assert [bundles.labels[k] for k in found] == truth


def test_a_longer_hypervector_is_nearer_to_the_plain_cosine() -> None:
    bundles = Bundles.fit(*_samples(0, "abc"))
    rows, _ = _samples(1, "abc")
    centre = bundles.means.mean(axis=0)
    plain = l2_normalise(rows - centre) @ l2_normalise(bundles.means - centre).T
    short, long = (
        np.abs(ClassHypervectors(bundles.means, "seed", size=size).cosines(rows) - plain).mean()
        for size in (64, 8192)
    )
    assert long < 0.02 < short


def test_features_and_their_hypervectors_are_bundled_to_the_same_directions() -> None:
    """A device that keeps hypervectors sees what one that keeps features sees."""
    rows, labels = _samples(0, "abc", n=120)
    probe, _ = _samples(1, "abxyz")
    kept = HypervectorState.fit(rows, labels, seed="seed").score(probe)
    projected = ClassHypervectors(Bundles.fit(rows, labels).means, "seed", size=512)
    assert np.abs(kept + projected.cosines(probe).max(axis=1)).max() < 0.1


def test_sign_bits_alone_still_tell_classes_apart() -> None:
    rows, labels = _samples(0, "abcdef", n=120)
    state = HypervectorState.fit(rows, labels, seed="seed", binary=True)
    known, foreign = state.score(_samples(1, "abc")[0]), state.score(_samples(2, "xyz")[0])
    assert (foreign[:, None] > known).mean() > 0.9


def test_a_class_alone_has_no_direction() -> None:
    bundles = Bundles.fit([[1.0, 0.0]], ["a"])
    assert ClassHypervectors(bundles.means, "seed").cosines(np.eye(2)).tolist() == [[0.0], [0.0]]


def test_bundles_take_less_than_a_kilobyte_a_class() -> None:
    assert Bundles.fit(*_samples(0, "a", dim=192)).size_bytes == 777


def test_bundles_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(OodError, match="dimension"):
        Bundles.fit([[1.0]], ["a"]).merge(Bundles.fit([[1.0, 0.0]], ["a"]))
    with pytest.raises(OodError, match="labels"):
        Bundles.fit([[1.0]], [])
    with pytest.raises(OodError, match="dimension"):
        ClassHypervectors([[1.0, 0.0]], "seed").cosines([[1.0]])
    with pytest.raises(OodError, match="seed is empty"):
        ClassHypervectors([[1.0]], "")
    state = HypervectorState.fit([[1.0]], ["a"], seed="seed")
    for other in (
        HypervectorState.fit([[1.0]], ["a"], seed="other"),
        HypervectorState.fit([[1.0]], ["a"], seed="seed", binary=True),
        HypervectorState.fit([[1.0, 0.0]], ["a"], seed="seed"),
    ):
        with pytest.raises(OodError, match="different seeds, dimensions or kinds"):
            state.merge(other)
