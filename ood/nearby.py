"""The default score where thousands of classes are known: its views, of the components nearby.

Looking at all of each costs more than the encoder, and boundaries between all pairs would fill the
memory. Distance, direction and energy hardly change by leaving out what is far from a sample; the
mean over decision boundaries does, and tells less. Called by `ood.detector` instead of
`ood.combined` once a mixture has a shortlist; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ood.combined import LEAST_DISTANCE, WEIGHTS, PartDistances, joined, part_widths, spread
from ood.logits import reciprocals
from ood.shortlist import IntArray, Shortlist
from ood.statistics import GaussianHead, l2_normalise
from ood.subspace import VimScore
from ood.validation import FloatArray, check_features


class NearbyScore:
    """`CombinedScore` over the components that a shortlist names for each sample.

    Which they are depends on the sample alone, so the score is a function of it and conformal
    p-values are as valid as ever. Its views differ from those over all components: an energy lacks
    what is far, and boundaries are averaged over fewer; scale and calibration are of the same kind.

    Args:
        head: the Gaussian head of everything installed.
        shortlist: names the components near a sample, in the head's whitened coordinates.
        reference: l2-normalised features [m, d] of known samples that are not in the statistics.
        parts: the widths of the parts that features are put together from; one of d when empty.

    Raises:
        OodError: the reference is empty, not finite or of another dimension, or the parts do not
            add up.
    """

    def __init__(
        self,
        head: GaussianHead,
        shortlist: Shortlist,
        reference: npt.ArrayLike,
        *,
        parts: Sequence[int] = (),
    ) -> None:
        widths = part_widths(parts, head.dim)
        self._head, self._shortlist = head, shortlist
        vim = VimScore(head)
        self._alpha, self._principal = vim.alpha, vim.principal
        self._centre, self._biases = vim.classifier.centre, vim.classifier.biases
        # Row by row, so that those of a few components are read and no others.
        self._weights = vim.classifier.weights.astype(np.float32)
        self._directions = l2_normalise(head.means).astype(np.float32)
        edges = np.cumsum((0, *widths)).tolist()
        self._parts = [
            _Part(PartDistances(head.means[:, a:b], head.covariance[a:b, a:b], slice(a, b)))
            for a, b in pairwise(edges)
        ]
        rows = check_features(reference, dim=head.dim)
        near = self._near(rows)
        self._depth_scale = spread(self._depths(rows, near))
        self._view_scale = spread(self._views(rows, near))

    def score(self, features: npt.ArrayLike, near: IntArray | None = None) -> FloatArray:
        """Return how foreign each sample is, float64 [n]; about 0 for known ones.

        Args:
            features: l2-normalised features [n, d].
            near: what the shortlist names for them, int64 [n, m]; looked up when None.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=self._head.dim)
        views = self._views(rows, self._near(rows) if near is None else near)
        return joined(views, self._view_scale, WEIGHTS)

    def _near(self, rows: FloatArray) -> IntArray:
        return self._shortlist.near(self._head.white(rows))

    def _views(self, rows: FloatArray, near: IntArray) -> FloatArray:
        """The views of `ood.combined.VIEWS`, not standardised, float64 [n, 4]."""
        centred = rows - self._centre
        squares = np.einsum("nd,nd->n", centred, centred)
        away = np.maximum(np.sqrt(squares), 1e-12)
        within = np.square(centred @ self._principal).sum(axis=1)
        residual = np.sqrt(np.maximum(squares - within, 0.0))
        length = np.maximum(np.sqrt(np.einsum("nd,nd->n", rows, rows)), 1e-12)
        views = np.empty((len(rows), len(WEIGHTS)))
        views[:, 0] = joined(self._depths(rows, near), self._depth_scale)
        for row, which in enumerate(near):
            weights = self._weights[which]
            logits = weights @ centred[row].astype(np.float32) + self._biases[which]
            best = int(logits.argmax())
            lead = logits[best] - logits
            others = max(len(which) - 1, 1)
            cosines = self._directions[which] @ rows[row].astype(np.float32)
            views[row, 1] = -cosines.max() / length[row]
            views[row, 2] = -(lead @ reciprocals(weights, best)) / (others * away[row])
            energy = logits[best] + np.log(np.exp(-lead).sum())
            views[row, 3] = self._alpha * residual[row] - energy
        return views

    def _depths(self, rows: FloatArray, near: IntArray) -> FloatArray:
        return np.log(np.stack([part.nearest(rows, near) for part in self._parts], axis=1))


class _Part:
    """`PartDistances` with a row for each component."""

    def __init__(self, part: PartDistances) -> None:
        width = len(part.centre)
        self._columns, self._centre, self._offsets = part.columns, part.centre, part.offsets
        self._whiten = np.ascontiguousarray(part.project[:, :width])
        self._crossed = np.ascontiguousarray(part.project[:, width:].T)

    def nearest(self, rows: FloatArray, near: IntArray) -> FloatArray:
        """The smallest squared distance of each sample, float64 [n], above 0."""
        part = (rows[:, self._columns] - self._centre).astype(np.float32)
        own = np.square(part @ self._whiten).sum(axis=1).astype(np.float64)
        least = [
            (self._crossed[which] @ row + self._offsets[which]).min()
            for row, which in zip(part, near, strict=True)
        ]
        result: FloatArray = np.maximum(own + least, LEAST_DISTANCE)
        return result
