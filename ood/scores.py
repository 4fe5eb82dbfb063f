"""Per-sample scores: how foreign is one sample? Higher is more foreign.

Both scores are functions of class statistics alone, so a class or an adapter's classes are added
without the old data. Called by `ood.detector` and by benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.hyperdimensional import ClassHypervectors
from ood.statistics import ClassStatistics, GaussianHead
from ood.validation import FloatArray


class Score(Protocol):
    """Anything that gives each sample a number, higher for more foreign ones."""

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n] for l2-normalised features [n, d]."""
        ...


class MahalanobisScore:
    """Squared Mahalanobis distance to the nearest class mean under one shared covariance.

    Lee et al., "A simple unified framework for detecting out-of-distribution samples" (2018), on
    l2-normalised features (Mueller and Hein, "Mahalanobis++", 2025).

    Attributes:
        head: the Gaussian head whose distances are used.
    """

    def __init__(self, head: GaussianHead) -> None:
        self.head = head

    @classmethod
    def from_statistics(cls, groups: Sequence[ClassStatistics]) -> MahalanobisScore:
        """Build the score of the installed groups.

        Raises:
            OodError: there is no group, or the groups are of different dimensions.
        """
        return cls(GaussianHead.from_statistics(groups))

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return the smallest squared distance to any component, float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        result: FloatArray = self.head.distances(features).min(axis=1)
        return result

    def nearest(self, features: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the index in ``head.components`` of the nearest component, int64 [n]."""
        result: npt.NDArray[np.int64] = self.head.distances(features).argmin(axis=1)
        return result


class HyperdimensionalScore:
    """Minus the largest cosine between a sample's hypervector and a class's.

    The hypervectors are `ood.hyperdimensional.ClassHypervectors`, of the merged class means.
    Projection and bundling are linear, so counts and means are a sufficient state: it merges
    exactly, the common centre included.

    Attributes:
        statistics: the merged class statistics.
        seed: what the projection is drawn from, usually the encoder's digest.
    """

    def __init__(self, statistics: ClassStatistics, seed: str) -> None:
        self.statistics = statistics
        self.seed = seed
        self._classes = ClassHypervectors(statistics.means, seed)

    @classmethod
    def fit(
        cls, features: npt.ArrayLike, labels: Sequence[str], seed: str
    ) -> HyperdimensionalScore:
        """Bundle labelled features [n, d] into class hypervectors.

        Raises:
            OodError: features or labels are empty, not finite, or do not match; or the seed is
                empty.
        """
        return cls(ClassStatistics.fit(features, labels), seed)

    @classmethod
    def from_statistics(cls, groups: Sequence[ClassStatistics], seed: str) -> HyperdimensionalScore:
        """Build the score of the installed groups; a label in several groups is bundled.

        Raises:
            OodError: there is no group, the groups are of different dimensions, or the seed is
                empty.
        """
        if not groups:
            raise OodError("a score needs the statistics of at least one group; found none")
        return cls(reduce(ClassStatistics.merge, groups), seed)

    def merge(self, other: HyperdimensionalScore) -> HyperdimensionalScore:
        """Return the score of both sets of samples together.

        Raises:
            OodError: the two differ in seed or dimension.
        """
        if other.seed != self.seed:
            raise OodError("cannot merge hyperdimensional scores of different seeds")
        return HyperdimensionalScore(self.statistics.merge(other.statistics), self.seed)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return minus the largest cosine, float64 [n] in −1..1.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        result: FloatArray = -self._classes.cosines(features).max(axis=1)
        return result
