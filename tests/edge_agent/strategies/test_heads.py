"""Heads in NumPy: alignment, discriminant, and the scores of labels with several components."""

import numpy as np
import pytest

from edge_agent.strategies.heads import (
    align,
    carry_over,
    label_scores,
    shared_covariances,
)
from ood.statistics import ClassStatistics

DIM = 6


def group(classes: range, *, seed: int, per_class: int = 30) -> ClassStatistics:
    rng = np.random.default_rng(seed)
    means = {k: np.random.default_rng(k).normal(0, 1, DIM) for k in classes}
    labels = [f"class-{k}" for k in classes for _ in range(per_class)]
    rows = [rng.normal(means[k], 0.4) for k in classes for _ in range(per_class)]
    return ClassStatistics.fit(np.array(rows), labels)


def test_alignment_is_a_function_of_groups_and_seed() -> None:
    groups = [group(range(3), seed=0), group(range(3, 6), seed=1)]
    one, same, other = align(groups, 5), align(groups, 5), align(groups, 6)
    assert one.rows.tobytes() == same.rows.tobytes()
    assert one.bias.tobytes() == same.bias.tobytes()
    assert one.rows.tobytes() != other.rows.tobytes()


def test_an_aligned_head_knows_the_classes_of_every_group() -> None:
    groups = [group(range(3), seed=0), group(range(3, 6), seed=1)]
    means = np.concatenate([each.means for each in groups])
    assert align(groups, 0).logits(means).argmax(axis=1).tolist() == list(range(6))


def test_one_sample_a_class_gives_a_usable_covariance() -> None:
    single = group(range(3), seed=4, per_class=1)
    for covariance in shared_covariances([single, group(range(3, 6), seed=5)]):
        np.linalg.cholesky(covariance)
    assert np.isfinite(align([single], 0).rows).all()


def test_a_labels_score_is_that_of_its_best_component() -> None:
    scores = np.array([[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    found = label_scores(scores, np.array([0, 1, 0]))
    assert found == pytest.approx(np.array([[0.4, 0.5], [0.4, 0.3]]) / [[0.9], [0.7]])


def test_classes_whose_samples_are_gone_follow_the_samples_that_are_there() -> None:
    rng = np.random.default_rng(6)
    turn, shift = rng.normal(0, 1, (DIM, DIM)), rng.normal(0, 1, DIM)
    gone = rng.normal(0, 1, (90, DIM))
    labels = [f"class-{k}" for k in range(3)] * 30
    here = rng.normal(1, 1, (4000, DIM))
    before = ClassStatistics.fit(gone, labels)
    carried = carry_over(before, here, here @ turn + shift)
    truth = ClassStatistics.fit(gone @ turn + shift, labels)
    assert carried.counts.tolist() == truth.counts.tolist()
    # The ridge holds back a tenth of the movement, or a little less.
    for found, wanted, start in (
        (carried.means, truth.means, before.means),
        (carried.scatter, truth.scatter, before.scatter),
    ):
        assert np.linalg.norm(found - wanted) < 0.25 * np.linalg.norm(wanted - start)


def test_statistics_of_a_space_that_did_not_change_stay_as_they_were() -> None:
    statistics = group(range(3), seed=7)
    here = np.random.default_rng(8).normal(0, 1, (20, DIM))
    carried = carry_over(statistics, here, here)
    assert carried.means == pytest.approx(statistics.means)
    assert carried.scatter == pytest.approx(statistics.scatter)


def test_one_sample_tells_of_a_shift_and_of_no_turn() -> None:
    statistics = group(range(3), seed=9)
    one = np.zeros((1, DIM))
    carried = carry_over(statistics, one, one + 0.5)
    assert carried.means == pytest.approx(statistics.means + 0.5)
    assert carried.scatter == pytest.approx(statistics.scatter)
