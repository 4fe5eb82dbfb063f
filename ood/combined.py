"""The default score: four views of one sample, put on one scale and joined.

No single score sees everything. Distances at every depth see noise, blur and other sensors; the
cosine sees pictures unlike any known; distance to the decision boundaries and energy see new
classes that are like the known ones. All four come from the class statistics in one pass. Chosen on
ViT-Tiny by ``benchmarks/ood.py`` and measured on encoders that took no part in the choice. Called
by `ood.detector` and by benchmarks; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.logits import BoundaryScore, Discriminant, log_sum_exp
from ood.statistics import GaussianHead, l2_normalise
from ood.validation import FloatArray, check_features

VIEWS = ("distance", "direction", "boundary", "energy")
# Below any distance that float32 features can tell; a sample on its mean stays finite.
_LEAST_DISTANCE = 1e-9
_LEAST_SPREAD = 1e-6


class CombinedScore:
    """log mean exp of four standardised scores: a maximum that listens to the others a little.

    Each view is standardised by its mean and deviation over held-out samples of the known world, so
    that none needs a weight:

    - *distance*: the log of the squared Mahalanobis distance to the nearest component within each
      part of the features (Lee et al. 2018), joined over the parts as the views are;
    - *direction*: minus the largest cosine to a component's mean;
    - *boundary*: `ood.logits.BoundaryScore` (Liu and Qin 2024);
    - *energy*: `ood.logits.EnergyScore` (Liu et al. 2020).

    Args:
        head: the Gaussian head of everything installed.
        reference: l2-normalised features [m, d] of known samples that are not in the statistics.
        parts: the widths of the parts that features are put together from; one of d when empty.

    Raises:
        OodError: the reference is empty, not finite or of another dimension, or the parts do not
            add up.

    Example:
        >>> from ood.statistics import ClassStatistics
        >>> rng = np.random.default_rng(0)
        >>> known = ClassStatistics.fit(rng.normal(size=(60, 4)), ["a"] * 60)
        >>> head = GaussianHead.from_statistics([known])
        >>> score = CombinedScore(head, rng.normal(size=(40, 4)))
        >>> near, far = score.score([[0.1, 0.0, 0.2, 0.0], [9.0, 9.0, 9.0, 9.0]])
        >>> bool(near < far)
        True
    """

    def __init__(
        self, head: GaussianHead, reference: npt.ArrayLike, *, parts: Sequence[int] = ()
    ) -> None:
        widths = tuple(parts) or (head.dim,)
        if sum(widths) != head.dim or min(widths) < 1:
            raise OodError(f"parts {list(widths)} do not add up to dimension {head.dim}")
        self._dim = head.dim
        edges = np.cumsum((0, *widths)).tolist()
        self._parts = [
            _Distances(head.means[:, a:b], head.covariance[a:b, a:b], slice(a, b))
            for a, b in pairwise(edges)
        ]
        classifier = Discriminant(head)
        self._boundary = BoundaryScore(head)
        self._centre = classifier.centre
        self._biases = classifier.biases - classifier.weights @ classifier.centre
        directions = l2_normalise(head.means).astype(np.float64)
        self._linear = np.hstack([classifier.weights.T, directions.T]).astype(np.float32)
        rows = check_features(reference, dim=head.dim)
        self._depth_scale = _scale(self._depths(rows))
        self._view_scale = _scale(self.views(rows))

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return how foreign each sample is, float64 [n]; about 0 for known ones.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return _joined(self.views(features), self._view_scale)

    def views(self, features: npt.ArrayLike) -> FloatArray:
        """Return the scores that are joined, not yet standardised: float64 [n, 4], as `VIEWS`.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=self._dim)
        linear = (rows.astype(np.float32) @ self._linear).astype(np.float64)
        components = linear.shape[1] // 2
        logits = linear[:, :components] + self._biases
        squares = np.einsum("nd,nd->n", rows, rows)
        to_centre = squares - 2 * rows @ self._centre + self._centre @ self._centre
        away = np.sqrt(np.maximum(to_centre, 0.0))
        length = np.maximum(np.sqrt(squares), 1e-12)
        return np.stack(
            [
                _joined(self._depths(rows), self._depth_scale),
                -linear[:, components:].max(axis=1) / length,
                self._boundary.from_logits(logits, away),
                -log_sum_exp(logits),
            ],
            axis=1,
        )

    def _depths(self, rows: FloatArray) -> FloatArray:
        return np.stack([part.logs(rows) for part in self._parts], axis=1)


class _Distances:
    """Squared Mahalanobis distances within one part of the features, in float32."""

    def __init__(self, means: FloatArray, covariance: FloatArray, columns: slice) -> None:
        factor = np.linalg.cholesky(covariance)
        self._columns = columns
        self._centre = means.mean(axis=0)
        whiten = np.linalg.solve(factor, np.eye(len(factor))).T
        white_means = (means - self._centre) @ whiten
        self._project = np.hstack([whiten, -2 * whiten @ white_means.T]).astype(np.float32)
        self._offsets = np.einsum("kd,kd->k", white_means, white_means)

    def logs(self, rows: FloatArray) -> FloatArray:
        """Return the log of the smallest squared distance, float64 [n]."""
        part = (rows[:, self._columns] - self._centre).astype(np.float32)
        projected = part @ self._project
        white = projected[:, : len(self._centre)]
        own = np.einsum("nd,nd->n", white, white).astype(np.float64)
        nearest = own + (projected[:, len(self._centre) :] + self._offsets).min(axis=1)
        result: FloatArray = np.log(np.maximum(nearest, _LEAST_DISTANCE))
        return result


def _scale(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and deviation of each column."""
    return scores.mean(axis=0), np.maximum(scores.std(axis=0), _LEAST_SPREAD)


def _joined(scores: FloatArray, scale: tuple[FloatArray, FloatArray]) -> FloatArray:
    mean, deviation = scale
    result: FloatArray = log_sum_exp((scores - mean) / deviation) - np.log(scores.shape[1])
    return result
