"""Heads in NumPy: alignment, discriminant, and the scores of labels with several components."""

import numpy as np
import pytest

from edge_agent.strategies.heads import align, discriminant, label_scores, shared_covariances
from ood.statistics import ClassStatistics, GaussianHead

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


def test_the_discriminant_ranks_as_the_gaussian_head_does() -> None:
    statistics = group(range(5), seed=2)
    gaussian = GaussianHead.from_statistics([statistics])
    covariance = shared_covariances([statistics])[0]
    same = GaussianHead([(0, label) for label in statistics.labels], statistics.means, covariance)
    points = np.random.default_rng(3).normal(0, 1, (50, DIM))
    logits = discriminant(statistics.means, covariance).logits(points)
    likelihoods = same.log_likelihoods(points)
    gaps = logits - likelihoods
    assert gaps - gaps[:, :1] == pytest.approx(0.0, abs=1e-4)
    assert gaussian.labels == statistics.labels


def test_one_sample_a_class_gives_a_usable_covariance() -> None:
    single = group(range(3), seed=4, per_class=1)
    for covariance in shared_covariances([single, group(range(3, 6), seed=5)]):
        np.linalg.cholesky(covariance)
    assert np.isfinite(align([single], 0).rows).all()


def test_a_labels_score_is_that_of_its_best_component() -> None:
    scores = np.array([[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    found = label_scores(scores, np.array([0, 1, 0]))
    assert found == pytest.approx(np.array([[0.4, 0.5], [0.4, 0.3]]) / [[0.9], [0.7]])
