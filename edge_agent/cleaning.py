"""Which labels are likely wrong: what a training leaves out of the samples it was given.

A pure function over features and labels; the trainer calls it before it fits anything. It changes
no label and reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ood.statistics import ClassStatistics, GaussianHead

_FOLDS: Final = 4
# Below this share the "wrong" labels are the hard samples every set has.
_LEAST_NOISE: Final = 0.05
_MOST_NOISE: Final = 0.3
# With fewer classes a wrong label cannot be told from a confusion of neighbours.
_LEAST_CLASSES: Final = 4
# With fewer samples a class the head that judges is worse than the labels: with 10, up to a fifth
# of the right ones were left out, which cost three points on spoken digits.
_LEAST_A_CLASS: Final = 16


def trusted_labels(features: NDArray[np.float32], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Say which samples to learn from.

    Every sample is judged by a Gaussian head that was fitted without it (four folds). A wrong label
    is any class but the right one, so it comes last in that head's order as often as second; a hard
    sample's own class comes second or third. The share of samples whose own class is in the lower
    half therefore tells how many labels are wrong, and so many are left out: those whose class is
    the furthest behind the best one (the small-loss rule of Han et al., "Co-teaching", 2018, with
    the noise rate estimated instead of given).

    Args:
        features: l2-normalised [n, d].
        labels: The label of each sample.

    Returns:
        True for a sample to learn from; every class keeps at least half of its own. All True
        when there are fewer than four classes, fewer than sixteen samples a class on average, or
        no more than 5 % of the labels seem wrong.
    """
    names, own = np.unique(np.array(labels, dtype=object), return_inverse=True)
    rows = np.arange(len(own))
    keep = np.ones(len(own), dtype=np.bool_)
    if len(names) < _LEAST_CLASSES or len(own) < _LEAST_A_CLASS * len(names):
        return keep
    fits = _cross_fitted(features, own, len(names))
    behind = (fits > fits[rows, own][:, None]).sum(axis=1)
    lower = len(names) // 2
    in_lower = float(np.mean(behind >= len(names) - lower))
    noise = min(in_lower * (len(names) - 1) / lower, _MOST_NOISE)
    if noise <= _LEAST_NOISE:
        return keep
    lead = fits.max(axis=1) - fits[rows, own]
    worst = np.argsort(-lead, kind="stable")[: round(noise * len(own))]
    keep[worst[lead[worst] > 0]] = False
    for member in range(len(names)):
        mine = np.flatnonzero(own == member)
        best = mine[np.argsort(lead[mine], kind="stable")]
        keep[best[: (len(best) + 1) // 2]] = True
    return keep


def _cross_fitted(
    features: NDArray[np.float32], own: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Log-likelihoods [n, classes] under heads that have not seen the sample."""
    fits = np.full((len(own), classes), -np.inf)
    # Class by class, so that every head has seen every class that has two samples.
    order = np.argsort(own, kind="stable")
    fold = np.empty(len(own), dtype=np.int64)
    fold[order] = np.arange(len(own)) % _FOLDS
    for number in range(_FOLDS):
        seen, judged = fold != number, np.flatnonzero(fold == number)
        statistics = ClassStatistics.fit(features[seen], [f"{k:06d}" for k in own[seen]])
        head = GaussianHead.from_statistics([statistics])
        columns = np.array([int(label) for _, label in head.components])
        fits[np.ix_(judged, columns)] = head.log_likelihoods(features[judged])
    return fits
