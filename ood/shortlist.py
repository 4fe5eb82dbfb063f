"""Which few of very many components are near a sample, found without looking at all of each.

A device may know thousands of classes, and exact distances to all of them cost more than the
encoder. In whitened space differences between class means lie in few directions; within these the
distance to every mean is cheap, and what is left out is the same for all but a component's own
length there. Called by the mixture head and the default score; trains nothing, keeps no state.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ood.validation import FloatArray

IntArray = npt.NDArray[np.int64]

# Of 1,500 clusters of real features (benchmarks/many_classes.py) these hold the nearest always and
# all but 1e-12 of the posterior's mass; 48 directions and 64 candidates miss one in twenty.
DIRECTIONS: Final = 192
CANDIDATES: Final = 128


class Shortlist:
    """The nearest of many Gaussian components that share one covariance.

    Args:
        white_means: the components' means in whitened coordinates, float64 [k, d].
        candidates: how many to name.
        directions: how many leading directions of the means to look along.

    Example:
        >>> means = np.diag(np.arange(1.0, 6.0))
        >>> Shortlist(means, candidates=2, directions=5).near(means[[4]]).tolist()
        [[0, 4]]
    """

    def __init__(
        self,
        white_means: FloatArray,
        *,
        candidates: int = CANDIDATES,
        directions: int = DIRECTIONS,
    ) -> None:
        self._candidates = min(candidates, len(white_means))
        centre = white_means.mean(axis=0)
        means = white_means - centre
        _, _, axes = np.linalg.svd(means, full_matrices=False)
        self._axes = np.ascontiguousarray(axes[:directions].T, dtype=np.float32)
        self._centre = centre.astype(np.float32)
        inside = means @ axes[:directions].T
        self._project = np.ascontiguousarray(-2.0 * inside.T, dtype=np.float32)
        self._offsets = np.einsum("kd,kd->k", means, means).astype(np.float32)

    def near(self, white: npt.NDArray[np.floating]) -> IntArray:
        """Return the components near each sample.

        Args:
            white: samples in the same whitened coordinates, [n, d].

        Returns:
            Indices in ascending order, int64 [n, candidates].
        """
        rows = (white.astype(np.float32, copy=False) - self._centre) @ self._axes
        distances = rows @ self._project + self._offsets
        if self._candidates == distances.shape[1]:
            return np.broadcast_to(np.arange(self._candidates), distances.shape)
        near = np.argpartition(distances, self._candidates - 1, axis=1)[:, : self._candidates]
        near.sort(axis=1)
        return near
