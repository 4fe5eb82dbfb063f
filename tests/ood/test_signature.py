"""Signatures of one distribution are alike whatever their size; of others they are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ood.errors import OodError
from ood.projection import gaussian_matrix
from ood.signature import (
    CLUSTERS,
    DEFAULT_MIN_SIMILARITY,
    SIZE_BYTES,
    Signature,
    signature,
    similarity,
)
from ood.statistics import l2_normalise

SEED = "encoder digest"


def _features(images: np.ndarray) -> np.ndarray:
    layer = gaussian_matrix(64, 128, seed="layer", purpose="test")
    return l2_normalise(np.maximum(images.reshape(-1, 64) / 16 @ layer, 0))


@pytest.fixture(scope="module")
def worlds() -> dict[str, np.ndarray]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, target = data.images[order], data.target[order]
    return {
        "first": _features(images[target < 5]),
        "new": _features(images[target >= 5]),
        "all": _features(images),
        "camera": _features(16 - np.rot90(images, axes=(1, 2))),
    }


def test_fresh_samples_of_the_same_distribution_are_alike(worlds) -> None:
    for features in worlds.values():
        known = signature(features[:200], seed=SEED)
        for start in (200, 300, 400):
            fresh = signature(features[start : start + 64], seed=SEED)
            assert similarity(known, fresh) > DEFAULT_MIN_SIMILARITY


def test_other_digits_and_another_camera_are_not(worlds) -> None:
    known = signature(worlds["first"][:200], seed=SEED)
    for other in ("new", "camera"):
        foreign = signature(worlds[other][:64], seed=SEED)
        assert similarity(known, foreign) < DEFAULT_MIN_SIMILARITY


def test_the_size_of_the_sample_hardly_matters(worlds) -> None:
    known = signature(worlds["first"][:300], seed=SEED)
    values = [
        similarity(known, signature(worlds["first"][300 : 300 + n], seed=SEED))
        for n in (64, 128, 256)
    ]
    assert max(values) - min(values) < 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 80), st.integers(1, 80))
def test_similarity_is_symmetric_in_range_and_one_with_itself(seed, n, m) -> None:
    rng = np.random.default_rng(seed)
    a = signature(l2_normalise(rng.normal(size=(n, 5))), seed=SEED)
    b = signature(l2_normalise(rng.normal(loc=0.5, size=(m, 5))), seed=SEED)
    assert similarity(a, b) == similarity(b, a)
    assert 0.0 <= similarity(a, b) <= 1.0
    assert similarity(a, a) > 0.98


def test_the_order_of_samples_does_not_matter(worlds) -> None:
    features = worlds["first"][:100]
    a, b = signature(features, seed=SEED), signature(features[::-1], seed=SEED)
    assert np.abs(a.mean.astype(int) - b.mean).max() <= 1
    assert similarity(a, b) > 0.999


def test_a_signature_is_repeatable_small_and_survives_travelling(worlds) -> None:
    a, b = (signature(worlds["all"], seed=SEED) for _ in range(2))
    data = a.to_bytes()
    assert data == b.to_bytes()
    assert len(data) == SIZE_BYTES <= 4096
    back = Signature.from_bytes(data)
    assert back == a
    assert hash(back) == hash(a)
    assert back.samples == len(worlds["all"])
    assert similarity(back, b) > 0.999


def test_constant_features_one_sample_and_dimension_one_work() -> None:
    constant = signature([[1.0, 0.0]] * 80, seed=SEED)
    elsewhere = signature([[0.0, 1.0]] * 80, seed=SEED)
    assert similarity(constant, constant) > 0.99
    assert similarity(constant, elsewhere) < 0.2
    one = signature([[1.0]], seed=SEED)
    assert similarity(one, one) > 0.99
    assert Signature.from_bytes(one.to_bytes()) == one
    assert similarity(signature([[0.0]], seed=SEED), one) < 0.2


def test_different_encoders_do_not_compare() -> None:
    a = signature([[1.0, 0.0]], seed=SEED)
    for other in (signature([[1.0, 0.0]], seed="other"), signature([[1.0]], seed=SEED)):
        with pytest.raises(OodError, match="different encoders"):
            similarity(a, other)


@pytest.mark.parametrize("bad", [np.zeros((0, 2)), [[np.nan, 0.0]], [[np.inf, 0.0]], [1.0]])
def test_unusable_features_are_refused(bad) -> None:
    with pytest.raises(OodError):
        signature(bad, seed=SEED)
    with pytest.raises(OodError, match="seed"):
        signature([[1.0]], seed="")


def test_damaged_bytes_are_refused(worlds) -> None:
    data = signature(worlds["first"], seed=SEED).to_bytes()
    nan = np.float32(np.nan).tobytes()
    shares = slice(34, 34 + 4 * CLUSTERS)
    tiny = np.float32(1e-9).tobytes()
    damages = {
        "bytes; found": data[:-1],
        "version 1": b"DKS1" + data[4:],
        "known version": b"XXXX" + data[4:],
        "cannot be": data[:4] + b"\0" * 4 + data[8:],
        "not finite": data[:26] + nan + data[30:],
        "of all samples": data[: shares.start] + bytes(4 * CLUSTERS) + data[shares.stop :],
        "the mean it claims": data[:-3328] + b"\x7f" * 3328,
        "the variance it claims": data[:26] + tiny + data[30:],
    }
    for message, damaged in damages.items():
        with pytest.raises(OodError, match=message):
            Signature.from_bytes(damaged)


def test_other_proportions_of_the_same_classes_are_nearer_than_other_classes(worlds) -> None:
    known = signature(worlds["all"][:400], seed=SEED)
    half = similarity(known, signature(worlds["first"][:128], seed=SEED))
    rest = load_digits().target[np.random.default_rng(0).permutation(1797)][400:]
    weights = (1 / (rest + 1)) / np.bincount(rest)[rest]
    for draw in range(5):
        rng = np.random.default_rng(draw)
        rows = rng.choice(len(rest), 128, replace=False, p=weights / weights.sum())
        fresh = signature(worlds["all"][400:][rows], seed=SEED)
        assert similarity(known, fresh) > half


def test_features_that_are_not_scaled_are_refused() -> None:
    with pytest.raises(OodError, match="unit length"):
        signature([[1e30, 0.0]], seed=SEED)
