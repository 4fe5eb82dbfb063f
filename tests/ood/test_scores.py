"""Foreign samples score higher, and scores follow their statistics when those merge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.errors import OodError
from ood.projection import gaussian_matrix
from ood.scores import HyperdimensionalScore, MahalanobisScore
from ood.statistics import ClassStatistics, l2_normalise


def _clusters(seed: int, names: str, n: int = 60, dim: int = 16) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i % len(names)] for i in range(n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=dim) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.4 * rng.normal(size=(n, dim))
    return l2_normalise(rows), labels


def test_foreign_classes_score_higher_with_both_scores() -> None:
    rows, labels = _clusters(0, "abc")
    known, foreign = _clusters(1, "abc")[0], _clusters(2, "xyz")[0]
    statistics = ClassStatistics.fit(rows, labels)
    for score in (
        MahalanobisScore.from_statistics([statistics]),
        HyperdimensionalScore.fit(rows, labels, "seed"),
    ):
        above = score.score(foreign)[:, None] > score.score(known)
        assert above.mean() > 0.95


def test_the_nearest_component_is_the_class() -> None:
    rows, labels = _clusters(0, "abc")
    score = MahalanobisScore.from_statistics([ClassStatistics.fit(rows, labels)])
    probe, truth = _clusters(1, "abc")
    nearest = [score.head.components[k][1] for k in score.nearest(probe)]
    assert nearest == truth


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(100, 199), st.integers(200, 299))
def test_hyperdimensional_merge_is_the_union_in_any_order(one, two, three) -> None:
    data = [_clusters(one, "ab"), _clusters(two, "bc"), _clusters(three, "d")]
    a, b, c = (HyperdimensionalScore.fit(*part, "seed") for part in data)
    rows = np.vstack([part[0] for part in data])
    union = HyperdimensionalScore.fit(rows, [name for part in data for name in part[1]], "seed")
    expected = union.score(rows)
    for merged in (a.merge(b).merge(c), c.merge(b.merge(a))):
        assert np.allclose(merged.score(rows), expected, atol=1e-5)
    groups = [ClassStatistics.fit(*part) for part in data]
    from_groups = HyperdimensionalScore.from_statistics(groups, "seed")
    assert np.allclose(from_groups.score(rows), expected, atol=1e-5)


def test_cosines_survive_the_projection() -> None:
    rows, labels = _clusters(0, "abc")
    score = HyperdimensionalScore.fit(rows, labels, "seed")
    centred = rows - score.statistics.means.mean(axis=0)
    classes = score.statistics.means - score.statistics.means.mean(axis=0)
    cosines = l2_normalise(centred) @ l2_normalise(classes).T
    assert np.abs(score.score(rows) + cosines.max(axis=1)).max() < 0.1


def test_one_class_has_no_direction_and_one_sample_is_enough() -> None:
    score = HyperdimensionalScore.fit([[1.0, 0.0]], ["a"], "seed")
    assert score.score([[0.0, 1.0], [1.0, 0.0]]).tolist() == [0.0, 0.0]
    single = MahalanobisScore.from_statistics([ClassStatistics.fit([[1.0, 0.0]], ["a"])])
    near, far = single.score([[1.0, 0.0], [0.0, 1.0]])
    assert near < far


def test_everybody_draws_the_same_projection() -> None:
    matrix = gaussian_matrix(3, 4, seed="digest", purpose="test")
    assert np.array_equal(matrix, gaussian_matrix(3, 4, seed="digest", purpose="test"))
    assert not np.array_equal(matrix, gaussian_matrix(3, 4, seed="other", purpose="test"))
    large = gaussian_matrix(200, 101, seed="digest", purpose="test")
    assert abs(large.mean()) < 0.02
    assert abs(large.std() - 1) < 0.02


@pytest.mark.parametrize("bad", [np.zeros((0, 2)), [[np.nan, 0.0]], [[1.0]], [1.0, 0.0]])
def test_unusable_features_are_refused(bad) -> None:
    statistics = ClassStatistics.fit([[1.0, 0.0], [0.0, 1.0]], ["a", "b"])
    for score in (
        MahalanobisScore.from_statistics([statistics]),
        HyperdimensionalScore(statistics, "seed"),
    ):
        with pytest.raises(OodError):
            score.score(bad)


def test_scores_that_do_not_belong_together_are_refused() -> None:
    a = HyperdimensionalScore.fit([[1.0, 0.0]], ["a"], "seed")
    with pytest.raises(OodError, match="different seeds"):
        a.merge(HyperdimensionalScore.fit([[1.0, 0.0]], ["a"], "other"))
    with pytest.raises(OodError, match="dimension"):
        a.merge(HyperdimensionalScore.fit([[1.0]], ["a"], "seed"))
    with pytest.raises(OodError, match="seed is empty"):
        HyperdimensionalScore.fit([[1.0]], ["a"], "")
    with pytest.raises(OodError, match="at least one group"):
        HyperdimensionalScore.from_statistics([], "seed")
