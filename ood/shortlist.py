"""Which few of very many components are near a sample, found without looking at all of each.

A device may know thousands of classes, and looking at all of each costs more than the encoder. In
whitened space differences between class means lie in few directions; within these the logit of
every component is cheap, and what is left out is small but for those far away. The few with the
largest are then looked at exactly. Called by the mixture head and the default score; trains
nothing, keeps no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.logits import Discriminant
from ood.statistics import GaussianHead, whitening
from ood.validation import FloatArray

Floats = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Of 1,500 clusters of real features (benchmarks/many_classes.py) these hold the nearest always and
# all but 2e-5 of the posterior's mass; 96 directions miss the nearest of one sample in a hundred.
DIRECTIONS: Final = 192
CANDIDATES: Final = 64


@dataclass(frozen=True, eq=False)
class Look:
    """What a shortlist saw of a batch.

    Attributes:
        centred: float32 [n, d], the samples less the head's centre.
        inside: float32 [n, directions], the samples along the leading directions.
        near: int64 [n, m], the components near each sample, in ascending order.
        logits: float64 [n, m], their logits as `Discriminant` defines them.
    """

    centred: Floats
    inside: Floats
    near: IntArray
    logits: FloatArray


class Shortlist:
    """The nearest of many Gaussian components that share one covariance.

    Args:
        head: the components.
        candidates: how many to name.
        directions: how many leading directions of the means to look along.

    Attributes:
        weights: float32 [k, d], of the discriminant; a row for each component.
        biases: float64 [k], of the discriminant.
        means: float32 [directions, k], the whitened means along the leading directions, the most
            telling first; their products with `Look.inside` are logits less biases, up
            to what is left out.

    Example:
        >>> from ood.statistics import GaussianHead
        >>> means = np.diag(np.arange(1.0, 6.0))
        >>> head = GaussianHead([(0, name) for name in "abcde"], means, np.eye(5))
        >>> Shortlist(head, candidates=2, directions=5).look(means[[4]]).near.tolist()
        [[0, 4]]
    """

    def __init__(
        self,
        head: GaussianHead,
        *,
        candidates: int = CANDIDATES,
        directions: int = DIRECTIONS,
    ) -> None:
        classifier = Discriminant(head)
        self._candidates = min(candidates, len(classifier.weights))
        self._centre = head.centre
        self.weights: Floats = np.ascontiguousarray(classifier.weights, dtype=np.float32)
        self.biases = classifier.biases
        whiten = whitening(head.covariance)
        white_means = (head.means - head.centre) @ whiten
        _, axes = np.linalg.eigh(white_means.T @ white_means)
        leading = axes[:, ::-1][:, :directions]
        self._axes = (whiten @ leading).astype(np.float32)
        self.means: Floats = np.ascontiguousarray((white_means @ leading).T, dtype=np.float32)
        self._rough_biases = self.biases.astype(np.float32)

    def look(self, rows: FloatArray) -> Look:
        """Find the components near each sample; the result for a row depends on that row only.

        Args:
            rows: checked features, float64 [n, d].
        """
        centred = (rows - self._centre).astype(np.float32)
        count, skipped = len(rows), len(self.biases) - self._candidates
        inside = np.empty((count, len(self.means)), np.float32)
        near = np.empty((count, self._candidates), np.int64)
        logits = np.empty((count, self._candidates))
        # One row at a time: products with a batch differ in the last bits from those with a row.
        for row, sample in enumerate(centred):
            inside[row] = along = sample @ self._axes
            rough = along @ self.means + self._rough_biases
            which = np.argpartition(rough, skipped)[skipped:]
            which.sort()
            near[row] = which
            logits[row] = self.weights.take(which, axis=0) @ sample + self.biases[which]
        return Look(centred, inside, near, logits)

    def logits(self, sample: Floats, components: IntArray) -> FloatArray:
        """Return the logits of any components for one sample of a look.

        Args:
            sample: a row of `Look.centred`, float32 [d].
            components: int64 [m].
        """
        result: FloatArray = self.weights[components] @ sample + self.biases[components]
        return result
