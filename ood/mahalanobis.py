"""Distances to what is known under other covariances than the shared one.

`ood.scores.MahalanobisScore` is the plain distance. Here are its relative form, which takes off how
unusual a sample is for all classes together, and one that whitens by half. Called by `ood.fitted`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ood.statistics import ClassStatistics, GaussianHead
from ood.validation import FloatArray


class RelativeMahalanobisScore:
    """The distance to the nearest class minus that to all samples taken as one class.

    Ren, Fort, Liu, Roy, Padhy and Lakshminarayanan, "A simple fix to Mahalanobis distance for
    improving near-OOD detection" (2021), eq. 3. The background's covariance is the classes' shrunk
    one plus that of their means (the law of total covariance). Were it shrunk by itself, the two
    distances would differ where no class differs from another, and that would drown the rest.
    """

    def __init__(self, statistics: ClassStatistics) -> None:
        self._classes = GaussianHead.from_statistics([statistics])
        weights = statistics.counts / statistics.samples
        centre = weights @ statistics.means
        gaps = (statistics.means - centre) * np.sqrt(weights)[:, None]
        covariance = self._classes.covariance + gaps.T @ gaps
        self._background = GaussianHead([(0, "all")], centre[None], covariance)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        nearest = self._classes.distances(features).min(axis=1)
        result: FloatArray = nearest - self._background.distances(features)[:, 0]
        return result


class HalfWhitenedScore:
    """The squared distance to the nearest mean under the square root of the shared covariance.

    (x − μ)ᵀΣ^(−1/2)(x − μ) lies between the Mahalanobis distance, to which the many directions of
    little variance count as much as the few of large, and the Euclidean, to which they hardly do.
    """

    def __init__(self, head: GaussianHead) -> None:
        values, vectors = np.linalg.eigh(head.covariance)
        root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
        self._head = GaussianHead(head.components, head.means, (root + root.T) / 2)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        result: FloatArray = self._head.distances(features).min(axis=1)
        return result
