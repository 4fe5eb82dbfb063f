"""Which labels a training trusts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.cleaning import trusted_labels
from ood.statistics import l2_normalise

CLASSES, PER_CLASS = 6, 20


def blobs(seed: int, spread: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (CLASSES, 8))
    truth = np.repeat(np.arange(CLASSES), PER_CLASS)
    return l2_normalise(centres[truth] + rng.normal(0, spread, (len(truth), 8))), truth


def names(numbers: np.ndarray) -> list[str]:
    return [f"class-{n}" for n in numbers]


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_most_wrong_labels_are_left_out_and_hardly_any_right_one(share: float) -> None:
    features, truth = blobs(0)
    rng = np.random.default_rng(1)
    wrong = rng.random(len(truth)) < share
    given_labels = np.where(wrong, (truth + rng.integers(1, CLASSES, len(truth))) % CLASSES, truth)
    kept = trusted_labels(features, names(given_labels))
    assert np.mean(~kept[wrong]) >= 0.8
    assert np.mean(kept[~wrong]) >= 0.95


def test_nothing_is_left_out_of_right_labels() -> None:
    features, truth = blobs(2)
    assert trusted_labels(features, names(truth)).all()


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_with_few_classes_every_label_is_taken_at_its_word(classes: int) -> None:
    features, truth = blobs(3)
    mine = truth < classes
    swapped = (truth[mine] + (np.arange(mine.sum()) % 4 == 0)) % classes
    assert trusted_labels(features[mine], names(swapped)).all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_class_keeps_at_least_half_of_its_samples(labels: list[int], seed: int) -> None:
    features = l2_normalise(np.random.default_rng(seed).normal(0, 1, (len(labels), 5)))
    given_labels = np.array(labels)
    kept = trusted_labels(features, names(given_labels))
    for label in set(labels):
        assert kept[given_labels == label].sum() >= sum(given_labels == label) / 2
