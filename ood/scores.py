"""What a score is, and the plainest one: how foreign is one sample? Higher is more foreign.

The Mahalanobis distance is a function of class statistics alone, so a class or an adapter's classes
are added without the old data. Called by `ood.detector`, by `ood.fitted` and by whoever calibrates
a bundle; `ood.fitted` has every other score that is fitted by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy.typing as npt

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
