"""Groups among samples that fit no class: what a person is asked to name.

Called by `ood.kinds` with the foreign samples of a window. A group is as compact as a known class
is; what is nearer together than that is one group. Pure; knows no labels and decides no kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.validation import FloatArray, check_features

MAX_SAMPLES: Final = 256
REPRESENTATIVES: Final = 5
_LEAST: Final = 4


@dataclass(frozen=True)
class Cluster:
    """One group.

    Attributes:
        size: How many samples it has.
        representatives: Places in the window of the samples nearest to its centre, nearest first.
        nearest: The nearest known class.
        distance: How far that class's mean is from its centre, in units of the spread of a class:
            the root mean square distance of a known sample from the mean of its own class.
        spread: Its own spread in the same units.
    """

    size: int
    representatives: tuple[int, ...]
    nearest: str
    distance: float
    spread: float


def clusters(
    features: npt.ArrayLike,
    rows: npt.ArrayLike,
    *,
    means: FloatArray,
    labels: tuple[str, ...],
    scatter: float,
) -> tuple[Cluster, ...]:
    """Group samples by average linkage (Sokal and Michener, 1958), largest group first.

    Args:
        features: l2-normalised features [n, d] of the foreign samples; the first 256 are used.
        rows: int [n], their places in the window.
        means: The known classes' means [k, d].
        labels: The known classes' names, k of them.
        scatter: The mean squared distance of a known sample from its class's mean.

    Returns:
        The groups of four samples or more.

    Raises:
        OodError: features are empty, not finite, or of another dimension.
    """
    points = check_features(features, dim=means.shape[1])[:MAX_SAMPLES]
    places = np.asarray(rows, np.int64)[: len(points)]
    unit = max(float(np.sqrt(scatter)), 1e-9)
    found = []
    for members in _linked(points, 2.0 * scatter):
        if len(members) < _LEAST:
            continue
        group = points[members]
        centre = group.mean(axis=0)
        gaps = np.square(group - centre).sum(axis=1)
        away = np.square(means - centre).sum(axis=1)
        chosen = np.argsort(gaps, kind="stable")[:REPRESENTATIVES]
        found.append(
            Cluster(
                size=len(members),
                representatives=tuple(int(places[members[k]]) for k in chosen),
                nearest=labels[int(away.argmin())],
                distance=float(np.sqrt(away.min()) / unit),
                spread=float(np.sqrt(gaps.sum() / (len(members) - 1)) / unit),
            )
        )
    return tuple(sorted(found, key=lambda cluster: -cluster.size))


def _linked(points: FloatArray, limit: float) -> list[npt.NDArray[np.int64]]:
    """Merge the two groups of least mean squared distance between members, up to the limit."""
    squares = np.square(points).sum(axis=1)
    gaps = np.maximum(squares[:, None] + squares - 2.0 * points @ points.T, 0.0)
    np.fill_diagonal(gaps, np.inf)
    sizes = np.ones(len(points))
    owner = np.arange(len(points))
    while len(points) > 1:
        first, second = sorted(divmod(int(gaps.argmin()), len(gaps)))
        if not gaps[first, second] <= limit:
            break
        merged = (sizes[first] * gaps[first] + sizes[second] * gaps[second]) / (
            sizes[first] + sizes[second]
        )
        gaps[first], gaps[:, first] = merged, merged
        gaps[second], gaps[:, second] = np.inf, np.inf
        gaps[first, first] = np.inf
        sizes[first] += sizes[second]
        owner[owner == second] = first
    return [np.flatnonzero(owner == k) for k in np.unique(owner)]
