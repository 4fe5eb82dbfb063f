"""The default score where thousands of classes are known: its views, of the components nearby.

Looking at all of each costs more than the encoder, and boundaries between all pairs would fill the
memory. Distance, direction and energy hardly change by leaving out what is far from a sample. The
mean over the decision boundaries to all other components is linear in the sample once the nearest
one is known, and is summed up beforehand. Called by `ood.detector` instead of `ood.combined` once a
mixture has a shortlist; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ood.combined import (
    LEAST_DISTANCE,
    VIEWS,
    WEIGHTS,
    PartDistances,
    joined,
    log_shares,
    part_widths,
    spread,
)
from ood.shortlist import Floats, IntArray, Look, Shortlist
from ood.statistics import GaussianHead
from ood.subspace import residual_directions
from ood.validation import FloatArray, check_features

# Rows of the matrix of all pairs that are computed at once; it never exists as a whole.
_BLOCK = 512
# Components whose weights differ by less, relative to their squared length, have no boundary:
# float32 products cannot tell them apart.
_SAME_WEIGHTS = 1e-6
# Directions that a mean over boundaries is kept along.
_MEAN_DIRECTIONS = 64


class NearbyScore:
    """`CombinedScore` over the components that a shortlist names for each sample.

    Which they are depends on the sample alone, so the score is a function of it and conformal
    p-values are as valid as ever. Distance, direction and energy are of the components on the list;
    boundaries are averaged over all.

    Args:
        head: the Gaussian head of everything installed.
        shortlist: looks at samples for the components of that head.
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
        self._dim, self._shortlist = head.dim, shortlist
        residual, self._alpha = residual_directions(head, shortlist.biases)
        self._residual: Floats = residual.astype(np.float32)
        self._boundaries = _MeanBoundaries(shortlist)
        self._means: Floats = head.means.astype(np.float32, copy=False)
        self._lengths = np.maximum(np.sqrt(np.einsum("kd,kd->k", self._means, self._means)), 1e-12)
        edges = np.cumsum((0, *widths)).tolist()
        self._columns = [slice(a, b) for a, b in pairwise(edges)]
        parts_of = [
            PartDistances(head.means[:, part], head.covariance[part, part], part)
            for part in self._columns
        ]
        self._whiten = [part.project[:, : len(part.centre)].copy() for part in parts_of]
        # Row by row, so that those of a few components are read and no others.
        crossed = np.vstack([part.project[:, len(part.centre) :] for part in parts_of])
        self._crossed: Floats = np.ascontiguousarray(crossed.T)
        self._offsets = np.stack([part.offsets for part in parts_of])
        self._depth_shares, self._view_shares = log_shares([1.0] * len(widths)), log_shares(WEIGHTS)
        rows = check_features(reference, dim=head.dim)
        depths, others = self._seen(rows, shortlist.look(rows))
        self._depth_scale = spread(depths)
        self._view_scale = spread(self._views(depths, others))

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return how foreign each sample is, float64 [n]; about 0 for known ones.

        Args:
            features: l2-normalised features [n, d].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=self._dim)
        return self.score_seen(rows, self._shortlist.look(rows))

    def score_seen(self, rows: FloatArray, look: Look) -> FloatArray:
        """Return the scores of checked features at which the shortlist has looked, float64 [n]."""
        return joined(self._views(*self._seen(rows, look)), self._view_scale, self._view_shares)

    def _views(self, depths: FloatArray, others: FloatArray) -> FloatArray:
        """The views of `ood.combined.VIEWS`, not standardised, float64 [n, 4]."""
        return np.column_stack([joined(depths, self._depth_scale, self._depth_shares), others])

    def _seen(self, rows: FloatArray, look: Look) -> tuple[FloatArray, FloatArray]:
        """Log distances within the parts, float64 [n, parts], and the other views, [n, 3]."""
        depths = np.empty((len(rows), len(self._columns)))
        others = np.empty((len(rows), len(VIEWS) - 1))
        lengths = np.maximum(np.sqrt(np.vecdot(rows, rows)), 1e-12)
        # One row at a time: products with a batch differ in the last bits from those with a row.
        for row, sample in enumerate(look.centred):
            near, logits = look.near[row], look.logits[row]
            depths[row] = self._distances(sample, near)
            cosines = self._means.take(near, axis=0) @ rows[row].astype(np.float32)
            others[row, 0] = -(cosines / self._lengths[near]).max() / lengths[row]
            place = int(logits.argmax())
            best = float(logits[place])
            boundaries = self._boundaries.mean(look.inside[row], int(near[place]), best)
            others[row, 1] = -boundaries / max(math.sqrt(sample @ sample), 1e-12)
            outside = sample @ self._residual
            energy = best + math.log(np.exp(logits - best).sum())
            others[row, 2] = self._alpha * math.sqrt(outside @ outside) - energy
        return np.log(np.maximum(depths, LEAST_DISTANCE)), others

    def _distances(self, sample: Floats, near: IntArray) -> list[float]:
        """The smallest squared distance of one sample within each part."""
        crossed, offsets = self._crossed.take(near, axis=0), self._offsets[:, near]
        found = []
        for place, (columns, whiten) in enumerate(zip(self._columns, self._whiten, strict=True)):
            part = sample[columns]
            own = part @ whiten
            nearest = (crossed[:, columns] @ part + offsets[place]).min()
            found.append(float(own @ own) + float(nearest))
        return found


class _MeanBoundaries:
    """The mean signed distance of a sample to the boundaries between a component and all others.

    Σⱼ (fᵦ − fⱼ)/‖wᵦ − wⱼ‖ (`ood.logits.BoundaryScore`) = Sᵦ·fᵦ − x·Σⱼ rᵦⱼwⱼ − Σⱼ rᵦⱼbⱼ with
    r the reciprocal gaps and S their sum: a vector and two numbers for each component. The
    vectors are kept along the first of the shortlist's directions, which leaves out next to nothing
    of a mean.
    """

    def __init__(self, shortlist: Shortlist) -> None:
        weights, biases = shortlist.weights, shortlist.biases
        squares = np.einsum("kd,kd->k", weights, weights)
        least = max(_SAME_WEIGHTS * float(squares.max()), float(np.finfo(np.float32).tiny))
        count, others = len(weights), max(len(weights) - 1, 1)
        self._slope = np.empty(count)
        self._level = np.empty(count)
        means = shortlist.means[:_MEAN_DIRECTIONS].T
        self._pull: Floats = np.empty(means.shape, np.float32)
        for start in range(0, count, _BLOCK):
            rows = slice(start, start + _BLOCK)
            gaps = squares[rows, None] + squares - 2 * weights[rows] @ weights.T
            reciprocal = np.where(gaps <= least, 0, 1 / np.sqrt(np.maximum(gaps, least))) / others
            self._slope[rows] = reciprocal.sum(axis=1, dtype=np.float64)
            self._level[rows] = reciprocal @ biases
            self._pull[rows] = reciprocal.astype(np.float32) @ means

    def mean(self, inside: Floats, best: int, logit: float) -> float:
        """Return it for a sample `inside` the directions, its component `best` and its logit."""
        pull = self._pull[best]
        pulled = float(inside[: len(pull)] @ pull) + float(self._level[best])
        return float(self._slope[best]) * logit - pulled
