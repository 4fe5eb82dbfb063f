"""The default score joins its views and stands degenerate worlds."""

from __future__ import annotations

import numpy as np
import pytest

from ood.combined import VIEWS, CombinedScore
from ood.errors import OodError
from ood.logits import BoundaryScore
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise
from ood.subspace import VimScore


def _world(seed: int, names: str, n: int = 200) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i % len(names)] for i in range(n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=24) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.5 * rng.normal(size=(n, 24))
    return l2_normalise(rows), labels


def _head() -> GaussianHead:
    return GaussianHead.from_statistics([ClassStatistics.fit(*_world(0, "abcd"))])


@pytest.mark.parametrize("parts", [(), (8, 16), (8, 8, 8)])
def test_foreign_samples_score_higher_whatever_the_parts(parts: tuple[int, ...]) -> None:
    score = CombinedScore(_head(), _world(1, "abcd")[0], parts=parts)
    known, foreign = score.score(_world(2, "abcd")[0]), score.score(_world(3, "wxyz")[0])
    assert (foreign[:, None] > known).mean() > 0.95


def test_its_views_are_the_scores_they_are_called_after() -> None:
    head, (probe, _) = _head(), _world(2, "abxy")
    views = dict(zip(VIEWS, CombinedScore(head, probe).views(probe).T, strict=True))
    distances = np.log(head.distances(probe).min(axis=1))
    assert np.corrcoef(views["distance"], distances)[0, 1] > 1 - 1e-6
    cosines = probe @ l2_normalise(head.means).T
    assert np.allclose(views["direction"], -cosines.max(axis=1), atol=1e-5)
    assert np.allclose(views["boundary"], BoundaryScore(head).score(probe), atol=1e-3)
    assert np.allclose(views["virtual logit"], VimScore(head).score(probe), atol=1e-3)


@pytest.mark.parametrize("rows", [np.full((5, 6), 0.4), np.eye(6)[:1], np.zeros((3, 6))])
def test_one_class_constant_features_and_one_reference_give_finite_scores(rows: np.ndarray) -> None:
    head = GaussianHead.from_statistics([ClassStatistics.fit(rows, ["a"] * len(rows))])
    score = CombinedScore(head, rows[:1], parts=(2, 4))
    probe = np.vstack([rows[:1], np.eye(6)])
    found = score.score(probe)
    assert np.isfinite(found).all()
    assert found[0] <= found[1:].max()


def test_unusable_parts_and_features_are_refused() -> None:
    with pytest.raises(OodError, match="parts"):
        CombinedScore(_head(), np.eye(24), parts=(8, 8))
    with pytest.raises(OodError, match="NaN"):
        CombinedScore(_head(), np.full((2, 24), np.nan))
    with pytest.raises(OodError, match="dimension"):
        CombinedScore(_head(), np.eye(24)).score(np.eye(5))
