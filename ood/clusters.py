"""The dominant clusters of some points: k-means that needs no random numbers.

The start is the point nearest to the mean, then always the point farthest from those taken
(Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985), so that the order of
the points decides nothing but ties. Called by signatures; knows nothing of them.
"""

from __future__ import annotations

import numpy as np

from ood.validation import FloatArray

_ROUNDS = 10


def clusters(points: FloatArray, count: int) -> tuple[FloatArray, FloatArray]:
    """Find clusters by Lloyd's algorithm.

    Args:
        points: float64 [n, d], n ≥ 1.
        count: how many clusters at most, ≥ 1; equal points share one.

    Returns:
        Centres float64 [k, d] and the shares of the points that are theirs, float64 [k]; the
        largest cluster first.
    """
    centres = points[_spread(points, count)]
    owner = np.zeros(len(points), np.int64)
    for _ in range(_ROUNDS):
        owner = (np.square(centres).sum(axis=1) - 2 * points @ centres.T).argmin(axis=1)
        for k in np.unique(owner):
            centres[k] = points[owner == k].mean(axis=0)
    sizes = np.bincount(owner, minlength=len(centres))
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    return centres[order], sizes[order] / len(points)


def _spread(points: FloatArray, count: int) -> list[int]:
    """Indices of points far from each other."""
    gaps = np.square(points - points.mean(axis=0)).sum(axis=1)
    taken = [int(gaps.argmin())]
    nearest = np.square(points - points[taken[0]]).sum(axis=1)
    while len(taken) < count and nearest.max() > 0:
        taken.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(points - points[taken[-1]]).sum(axis=1))
    return taken
