"""Foreign samples are farther away, and unusable ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from ood.errors import OodError
from ood.scores import MahalanobisScore
from ood.statistics import ClassStatistics, l2_normalise


def _clusters(seed: int, names: str, n: int = 60, dim: int = 16) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i % len(names)] for i in range(n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=dim) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.4 * rng.normal(size=(n, dim))
    return l2_normalise(rows), labels


def test_foreign_classes_score_higher() -> None:
    score = MahalanobisScore.from_statistics([ClassStatistics.fit(*_clusters(0, "abc"))])
    known, foreign = _clusters(1, "abc")[0], _clusters(2, "xyz")[0]
    assert (score.score(foreign)[:, None] > score.score(known)).mean() > 0.95


def test_one_sample_is_enough() -> None:
    single = MahalanobisScore.from_statistics([ClassStatistics.fit([[1.0, 0.0]], ["a"])])
    near, far = single.score([[1.0, 0.0], [0.0, 1.0]])
    assert near < far


@pytest.mark.parametrize("bad", [np.zeros((0, 2)), [[np.nan, 0.0]], [[1.0]], [1.0, 0.0]])
def test_unusable_features_are_refused(bad) -> None:
    statistics = ClassStatistics.fit([[1.0, 0.0], [0.0, 1.0]], ["a", "b"])
    with pytest.raises(OodError):
        MahalanobisScore.from_statistics([statistics]).score(bad)


def test_no_statistics_are_refused() -> None:
    with pytest.raises(OodError, match="at least one group"):
        MahalanobisScore.from_statistics([])
