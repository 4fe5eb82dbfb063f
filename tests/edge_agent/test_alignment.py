"""Alignment without labels: what it undoes, what it leaves alone, when it is not used."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.alignment import MIN_SAMPLES, Alignment, try_alignment
from ood.errors import OodError
from ood.mixture import Mixture
from ood.statistics import ClassStatistics

DIM, CLASSES = 12, 4


def sampled(count: int, seed: int, classes: range = range(CLASSES)) -> tuple[np.ndarray, list[str]]:
    centres = np.random.default_rng(7).normal(0, 1, (2 * CLASSES, DIM))
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.array(classes), count)
    features = centres[truth] + rng.normal(0, 0.3, (count, DIM))
    return features.astype(np.float32), [f"class-{k}" for k in truth]


def camera(features: np.ndarray) -> np.ndarray:
    """Another gain and offset for every dimension."""
    rng = np.random.default_rng(11)
    gain, offset = rng.uniform(0.4, 1.6, DIM), rng.normal(0, 4.0, DIM)
    return (gain * features + offset).astype(np.float32)


@pytest.fixture(scope="module")
def groups() -> list[ClassStatistics]:
    return [ClassStatistics.fit(*sampled(200, 1))]


@pytest.fixture(scope="module")
def mixture(groups) -> Mixture:
    return Mixture.from_statistics(groups)


@pytest.fixture(scope="module")
def known() -> np.ndarray:
    return sampled(150, 2)[0]


def accuracy(mixture: Mixture, features: np.ndarray, labels: list[str]) -> float:
    guesses = mixture.evidence(features).posterior().argmax(axis=1)
    return float(
        np.mean([mixture.entries[g][1] == t for g, t in zip(guesses, labels, strict=True)])
    )


def test_a_new_gain_and_offset_are_undone_without_a_label(mixture, groups, known) -> None:
    alignment, verdict = try_alignment(camera(sampled(128, 3)[0]), known, groups)
    assert verdict.accepted
    features, labels = sampled(200, 4)
    seen = camera(features)
    assert accuracy(mixture, seen, labels) < 0.7
    assert accuracy(mixture, alignment.applied(seen, mixture), labels) > 0.95


def test_samples_of_the_known_domain_are_left_as_they_are(mixture, groups, known) -> None:
    alignment, _ = try_alignment(camera(sampled(128, 3)[0]), known, groups)
    features, _ = sampled(200, 5)
    unchanged = (alignment.applied(features, mixture) == features).all(axis=1)
    assert unchanged.mean() > 0.95


@pytest.mark.parametrize("classes", [range(CLASSES), range(CLASSES, 2 * CLASSES)])
def test_without_a_shift_of_domain_nothing_is_aligned(groups, known, classes) -> None:
    alignment, verdict = try_alignment(sampled(128, 6, classes)[0], known, groups)
    assert alignment is None
    assert not verdict.accepted


def test_too_few_samples_are_not_aligned_by(groups, known) -> None:
    alignment, verdict = try_alignment(camera(sampled(MIN_SAMPLES - 1, 3)[0]), known, groups)
    assert alignment is None
    assert "too few" in verdict.reason


@given(st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_few_samples_move_little_and_many_meet_the_known_moments(few: int, seed: int) -> None:
    known, shifted = sampled(300, seed)[0], camera(sampled(3000, seed + 1)[0])
    moved = Alignment.fit(shifted, known).apply(shifted)
    np.testing.assert_allclose(moved.mean(axis=0), known.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(moved.std(axis=0), known.std(axis=0), rtol=0.02)
    little, much = Alignment.fit(shifted[:few], known), Alignment.fit(shifted, known)
    assert np.abs(np.log(little.gain)).mean() < 20
    gap = np.abs(much.shifted_mean - known.mean(axis=0)).mean()
    near = np.abs(little.shifted_mean - known.mean(axis=0)).mean()
    assert near < np.abs(shifted[:few].mean(axis=0) - known.mean(axis=0)).mean() + 1e-6
    assert gap > 0


def test_an_alignment_comes_back_as_written_and_a_damaged_one_is_refused(known) -> None:
    alignment = Alignment.fit(camera(known), known)
    arrays = alignment.to_arrays()
    again = Alignment.from_arrays(arrays)
    np.testing.assert_array_equal(again.apply(known), alignment.apply(known))
    for damaged in (
        {"gain": arrays["gain"]},
        {**arrays, "gain": -arrays["gain"]},
        {**arrays, "known_mean": arrays["known_mean"][:3]},
        {**arrays, "shifted_mean": np.full(DIM, np.nan)},
    ):
        with pytest.raises(OodError):
            Alignment.from_arrays(damaged)
