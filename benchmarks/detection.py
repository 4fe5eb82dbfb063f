"""How well a score tells foreign samples from known ones: AUROC, AUPR and FPR at 95 % TPR.

Foreign samples are the positives throughout, and a higher score means more foreign. Exact, with
ties told by no luck of sorting. Called by the benchmarks of shift; reads and writes nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def auroc(known: npt.ArrayLike, foreign: npt.ArrayLike) -> float:
    """Return the probability that a foreign sample scores above a known one, ties half.

    Mann and Whitney's U over the number of pairs, from ranks (ties get their mean rank).

    Example:
        >>> auroc([1.0, 2.0], [2.0, 3.0])
        0.875
    """
    inside, outside = _scores(known), _scores(foreign)
    _, place, count = np.unique(
        np.concatenate([inside, outside]), return_inverse=True, return_counts=True
    )
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    m = len(outside)
    return float((ranks[len(inside) :].sum() - m * (m + 1) / 2) / (m * len(inside)))


def aupr(known: npt.ArrayLike, foreign: npt.ArrayLike) -> float:
    """Return the average precision with foreign samples as positives.

    The sum over thresholds of precision × gain in recall (no interpolation, which is optimistic:
    Davis and Goadrich, "The relationship between precision-recall and ROC curves", 2006).

    Example:
        >>> aupr([1.0, 3.0], [2.0, 4.0])
        0.8333333333333333
    """
    hits, alarms = _curve(known, foreign)
    recall = hits / hits[-1]
    precision = hits / (hits + alarms)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def fpr_at_95_tpr(known: npt.ArrayLike, foreign: npt.ArrayLike) -> float:
    """Return the part of known samples flagged where at least 95 % of foreign ones are.

    OpenOOD's convention (``openood/evaluators/metrics.py``): foreign samples are the positives, and
    the first point of the ROC curve with TPR ≥ 0.95 is taken.

    Example:
        >>> fpr_at_95_tpr([1.0, 3.0], [2.0, 4.0])
        0.5
    """
    hits, alarms = _curve(known, foreign)
    first = int(np.argmax(hits >= 0.95 * hits[-1]))
    return float(alarms[first] / alarms[-1])


def _curve(known: npt.ArrayLike, foreign: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Foreign and known samples at or above each distinct score, the highest score first."""
    inside, outside = np.sort(_scores(known)), np.sort(_scores(foreign))
    levels = np.unique(np.concatenate([inside, outside]))[::-1]
    hits = len(outside) - np.searchsorted(outside, levels, side="left")
    alarms = len(inside) - np.searchsorted(inside, levels, side="left")
    return hits.astype(np.float64), alarms.astype(np.float64)


def _scores(values: npt.ArrayLike) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not scores.size or np.isnan(scores).any():
        raise ValueError(f"scores must be [n], n ≥ 1, without NaN; found shape {scores.shape}")
    return scores
