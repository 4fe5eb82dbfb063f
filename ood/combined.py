"""The default score: four views of one sample, put on one scale, weighed and joined.

No single score sees everything. Distances at every depth see noise, blur and other sensors; the
cosine sees pictures unlike any known; distance to the decision boundaries and the virtual logit see
new classes that are like the known ones. All four come from the class statistics in one pass.
Chosen on ViT-Tiny by ``benchmarks/ood.py`` and measured on other encoders too. Called by
`ood.detector` and by benchmarks; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.logits import BoundaryScore, Discriminant, log_sum_exp
from ood.statistics import GaussianHead, l2_normalise
from ood.subspace import VimScore
from ood.validation import FloatArray, check_features

VIEWS: Final = ("distance", "direction", "boundary", "virtual logit")
# How much each view is listened to. A class that is new but like the known ones is near them in
# distance and direction, which then only add noise; docs/benchmarks/ood.md says how these were
# chosen.
WEIGHTS: Final = (0.75, 0.25, 1.0, 1.0)
# Below any distance that float32 features can tell; a sample on its mean stays finite.
LEAST_DISTANCE: Final = 1e-9
_LEAST_SPREAD = 1e-6


class CombinedScore:
    """log Σ w exp of four standardised scores: a maximum that listens to the others a little.

    Each view is standardised by its mean and deviation over held-out samples of the known world:

    - *distance*: the log of the squared Mahalanobis distance to the nearest component within each
      part of the features (Lee et al. 2018), joined over the parts as views are, all alike;
    - *direction*: minus the largest cosine to a component's mean;
    - *boundary*: `ood.logits.BoundaryScore` (Liu and Qin 2024);
    - *virtual logit*: `ood.subspace.VimScore` (Wang et al. 2022).

    Args:
        head: the Gaussian head of everything installed.
        reference: l2-normalised features [m, d] of known samples that are not in the statistics.
        parts: the widths of the parts that features are put together from; one of d when empty.
        classifier: the head's discriminant, where that is known.

    Attributes:
        centre: float64 [d], the mean of the components' means.
        biases: float64 [k], of the linear classifier.
        central: float64 [k], the cosine of each component's direction with the centre, times the
            centre's length.
        linear: float32 [d, k + r], what features less the centre are multiplied with: directions
            of the components, residual directions of the ViM score.
        boundary: the boundary score.
        vim: the ViM score.
        parts: the distances within each part.
        depth_scale: mean and deviation of the parts' distances, float64 [parts] each.
        view_scale: mean and deviation of the views, float64 [4] each.

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
        self,
        head: GaussianHead,
        reference: npt.ArrayLike,
        *,
        parts: Sequence[int] = (),
        classifier: Discriminant | None = None,
    ) -> None:
        widths = part_widths(parts, head.dim)
        self._dim = head.dim
        edges = np.cumsum((0, *widths)).tolist()
        self.parts = [
            PartDistances(head.means[:, a:b], head.covariance[a:b, a:b], slice(a, b))
            for a, b in pairwise(edges)
        ]
        self._stack = _Stack.of(self.parts)
        classifier = classifier or Discriminant(head)
        self.boundary, self.vim = BoundaryScore(head, classifier), VimScore(head, classifier)
        self.centre, self.biases = classifier.centre, classifier.biases
        directions = l2_normalise(head.means).astype(np.float64)
        self.central = directions @ classifier.centre
        self.linear = np.hstack([directions.T, self.vim.residual]).astype(np.float32)
        rows = check_features(reference, dim=head.dim)
        self._depth_shares, self._view_shares = log_shares([1.0] * len(widths)), log_shares(WEIGHTS)
        self.depth_scale = spread(self._depths((rows - self.centre).astype(np.float32)))
        self.view_scale = spread(self._views(rows, classifier.of_rows(rows)))

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return how foreign each sample is, float64 [n]; about 0 for known ones.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=self._dim)
        return self.score_rows(rows, self.vim.classifier.of_rows(rows))

    def score_rows(self, rows: FloatArray, logits: FloatArray) -> FloatArray:
        """Return the scores of features that were checked before, float64 [n].

        Args:
            rows: float64 [n, d].
            logits: float64 [n, k], what the head's `Discriminant` says of them.
        """
        return joined(self._views(rows, logits), self.view_scale, self._view_shares)

    def views(self, features: npt.ArrayLike) -> FloatArray:
        """Return the scores that are joined, not yet standardised: float64 [n, 4], as `VIEWS`.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=self._dim)
        return self._views(rows, self.vim.classifier.of_rows(rows))

    def _views(self, rows: FloatArray, logits: FloatArray) -> FloatArray:
        centred = rows - self.centre
        rounded = centred.astype(np.float32)
        linear = rounded @ self.linear
        components = len(self.biases)
        cosines = linear[:, :components] + self.central
        views = np.empty((len(rows), len(VIEWS)))
        views[:, 0] = joined(self._depths(rounded), self.depth_scale, self._depth_shares)
        views[:, 1] = -cosines.max(axis=1) / np.maximum(np.sqrt(np.vecdot(rows, rows)), 1e-12)
        views[:, 2] = self.boundary.from_logits(logits, np.sqrt(np.vecdot(centred, centred)))
        views[:, 3] = self.vim.from_logits(logits, linear[:, components:])
        return views

    def _depths(self, centred: npt.NDArray[np.float32]) -> FloatArray:
        if self._stack is not None:
            return np.log(self._stack.nearest(centred))
        nearest = np.empty((len(centred), len(self.parts)))
        for place, part in enumerate(self.parts):
            nearest[:, place] = part.nearest(centred)
        return np.log(nearest)


class PartDistances:
    """Squared Mahalanobis distances within one part of the features, in float32.

    Attributes:
        columns: where the part lies in the features.
        centre: float64 [p], the mean of the components' means.
        project: float32 [p, p + k], the upper triangle that whitens, and minus twice the whitened
            means after it.
        offsets: float64 [k], the squared lengths of the whitened means.
    """

    def __init__(
        self, means: npt.NDArray[np.floating], covariance: FloatArray, columns: slice
    ) -> None:
        factor = np.linalg.cholesky(covariance)
        self.columns = columns
        self.centre: FloatArray = means.mean(axis=0, dtype=np.float64)
        whiten = np.linalg.solve(factor, np.eye(len(factor))).T
        white_means = (means - self.centre) @ whiten
        self.project = np.hstack([whiten, -2 * whiten @ white_means.T]).astype(np.float32)
        self.offsets = np.einsum("kd,kd->k", white_means, white_means)

    def nearest(self, centred: npt.NDArray[np.float32]) -> FloatArray:
        """Return the smallest squared distance of samples, float64 [n], above 0.

        Args:
            centred: whole features less the mean of the components' means, float32 [n, d].
        """
        projected = centred[:, self.columns] @ self.project
        width = len(self.centre)
        white, crossed = projected[:, :width], projected[:, width:]
        nearest = np.vecdot(white, white) + (crossed + self.offsets).min(axis=1)
        result: FloatArray = np.maximum(nearest, LEAST_DISTANCE)
        return result


class _Stack:
    """Several parts of one width, multiplied with in one call."""

    def __init__(self, parts: Sequence[PartDistances]) -> None:
        self._project = np.stack([part.project for part in parts])
        self._offsets = np.stack([part.offsets for part in parts])[:, None]
        # The parts keep views, so that nothing is held twice.
        for part, project in zip(parts, self._project, strict=True):
            part.project = project

    @classmethod
    def of(cls, parts: Sequence[PartDistances]) -> _Stack | None:
        """Stack them; None where widths differ."""
        return cls(parts) if len({len(part.centre) for part in parts}) == 1 else None

    def nearest(self, centred: npt.NDArray[np.float32]) -> FloatArray:
        """What `PartDistances.nearest` gives for each part, float64 [n, parts]."""
        count, width, _ = self._project.shape
        rows = centred.reshape(len(centred), count, width).transpose(1, 0, 2)
        projected = rows @ self._project
        white, crossed = projected[..., :width], projected[..., width:]
        nearest = np.vecdot(white, white) + (crossed + self._offsets).min(axis=2)
        result: FloatArray = np.maximum(nearest.T, LEAST_DISTANCE)
        return result


def part_widths(parts: Sequence[int], dim: int) -> tuple[int, ...]:
    """Return the widths of the features' parts; one of all dimensions when there are none.

    Raises:
        OodError: they do not add up.
    """
    widths = tuple(parts) or (dim,)
    if sum(widths) != dim or min(widths) < 1:
        raise OodError(f"parts {list(widths)} do not add up to dimension {dim}")
    return widths


def spread(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the mean and the deviation of each column: float64 [c] and [c], above 0."""
    return scores.mean(axis=0), np.maximum(scores.std(axis=0), _LEAST_SPREAD)


def log_shares(weights: Sequence[float]) -> FloatArray:
    """Return what `joined` takes for scores that are listened to by these weights, float64 [c]."""
    shares: FloatArray = np.log(np.array(weights) / sum(weights))
    return shares


def joined(
    scores: FloatArray, scale: tuple[FloatArray, FloatArray], shares: FloatArray
) -> FloatArray:
    """Standardise scores and join them: log Σ w exp z − log Σ w, float64 [n].

    Args:
        scores: float64 [n, c].
        scale: mean and deviation of each, float64 [c].
        shares: float64 [c], as `log_shares` gives them.
    """
    mean, deviation = scale
    return log_sum_exp((scores - mean) / deviation + shares)
