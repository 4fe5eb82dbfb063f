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
from ood.statistics import ClassStatistics, GaussianHead, shrunk_covariance
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
    def _covariance(self) -> FloatArray:
        scatter = np.sum([group.scatter for group in self._groups], axis=0)
        freedom = sum(group.samples - len(group.labels) for group in self._groups)
        return shrunk_covariance(scatter, freedom=freedom)[0]

    @cached_property
    def scatter(self) -> float:
        """The mean squared distance of a sample from its class's mean."""
        return float(np.trace(self._covariance))

    @cached_property
    def _discriminant(self) -> FloatArray:
        """Directions, whitened, in which the class means differ [d, r]."""
        whiten = np.linalg.inv(np.linalg.cholesky(self._covariance)).T
        white = (self.means - self.means.mean(axis=0)) @ whiten
        _, sizes, directions = np.linalg.svd(white, full_matrices=False)
        kept = sizes > 1e-6 * max(float(sizes[0]), 1e-12)
        kept[max(len(self.means) - 1, 1) :] = False
        return np.asarray(whiten @ directions[kept].T, np.float64)

    @cached_property
    def _cloud(self) -> GaussianHead:
        """All classes as one Gaussian of the same total mean and covariance."""
        counts = np.concatenate([group.counts for group in self._groups])
        centre = (counts / counts.sum()) @ self.means
        between = (self.means - centre) * np.sqrt(counts)[:, None]
        within = np.sum([group.scatter for group in self._groups], axis=0)
        total = ClassStatistics(
            ("all",),
            np.array([counts.sum()], np.int64),
            centre[None],
            within + between.T @ between,
        )
        return GaussianHead.from_statistics([total])

    def structure(self, features: FloatArray) -> FloatArray:
        """By how much the classes explain each sample better than one Gaussian does, in nats."""
        parts = self.mixture.log_likelihoods(features)
        peak = parts.max(axis=1)
        density = peak + np.log(np.exp(parts - peak[:, None]).sum(axis=1))
        result: FloatArray = density - self._cloud.log_likelihoods(features)[:, 0]
        return result

    def moved_back(self, features: FloatArray) -> FloatArray:
        """The window where the known samples lie: means and variances matched by dimension."""
        weight = len(features) / (len(features) + _MOVE_PRIOR)
        known = self.features.mean(axis=0)
        mean = weight * features.mean(axis=0) + (1.0 - weight) * known
        ratio = (self.features.var(axis=0) + _FLOOR) / (features.var(axis=0) + _FLOOR)
        return np.asarray(known + ratio ** (0.5 * weight) * (features - mean), np.float64)

    def spread(self, features: FloatArray) -> float:
        """The variance in the directions that tell the classes apart."""
        return float((features @ self._discriminant).var(axis=0, ddof=1).sum())

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
