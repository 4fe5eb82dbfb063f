"""The known world as a yardstick for windows: statistics, calibration samples, known frames.

Made once for a generation and handed to `ood.kinds`, which compares windows with it, and to whoever
explains an alarm. Pure NumPy; holds no state of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.calibration import Calibration
from ood.errors import OodError
from ood.frames import FrameFacts, Limits
from ood.mixture import Mixture
from ood.statistics import ClassStatistics, shrunk_covariance
from ood.validation import FloatArray, check_features

# Weight, in samples, of the overall scores where a class's own are the yardstick.
_CLASS_PRIOR: Final = 10.0
# The known statistics stand in for so many samples when a window is moved back.
_MOVE_PRIOR: Final = 8.0
_FLOOR: Final = 1e-9


class Known:
    """The known world, as diagnoses see it; made once and used for any number of windows.

    Args:
        groups: The installed class statistics, in canonical order.
        features: Calibration features [m, d], l2-normalised, not in the statistics; m ≥ 8.
        frames: Facts of frames of the known world; without any the look says nothing.

    Raises:
        OodError: Statistics or features are unusable, or of different dimensions.
    """

    def __init__(
        self,
        groups: Sequence[ClassStatistics],
        features: npt.ArrayLike,
        frames: Sequence[FrameFacts] = (),
    ) -> None:
        self.mixture = Mixture.from_statistics(groups)
        self.dim = self.mixture.head.dim
        self.features = check_features(features, dim=self.dim)
        if len(self.features) < 8:
            raise OodError(f"found {len(self.features)} calibration features; give 8 or more")
        self.frames = tuple(frames)
        self.limits = Limits.of(self.frames)
        self._groups = tuple(groups)
        distances = self.mixture.head.distances(self.features)
        self.scores, self.nearest = distances.min(axis=1), distances.argmin(axis=1)
        self.calibration = Calibration(self.scores)
        self.means = np.vstack([group.means for group in groups])
        self.labels = tuple(label for group in groups for label in group.labels)

    @cached_property
    def scatter(self) -> float:
        """The mean squared distance of a sample from its class's mean."""
        scatter = np.sum([group.scatter for group in self._groups], axis=0)
        freedom = sum(group.samples - len(group.labels) for group in self._groups)
        return float(np.trace(shrunk_covariance(scatter, freedom=freedom)[0]))

    def moved_back(self, features: FloatArray) -> FloatArray:
        """The window where the known samples lie: means and variances matched by dimension."""
        weight = len(features) / (len(features) + _MOVE_PRIOR)
        known = self.features.mean(axis=0)
        mean = weight * features.mean(axis=0) + (1.0 - weight) * known
        ratio = (self.features.var(axis=0) + _FLOOR) / (features.var(axis=0) + _FLOOR)
        return np.asarray(known + ratio ** (0.5 * weight) * (features - mean), np.float64)

    def conditional_p_values(
        self, scores: FloatArray, nearest: npt.NDArray[np.int64]
    ) -> FloatArray:
        """p-values among the calibration samples answered alike, helped out by all of them."""
        overall = self.calibration.p_values(scores)
        result = np.empty(len(scores))
        for row, (score, owner) in enumerate(zip(scores, nearest, strict=True)):
            own = self.scores[self.nearest == owner]
            result[row] = ((own >= score).sum() + _CLASS_PRIOR * overall[row]) / (
                len(own) + _CLASS_PRIOR
            )
        return result
