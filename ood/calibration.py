"""Scores of known samples as a yardstick: conformal p-values, quantiles, and how well others fit.

Called by the detector for every sample's p-value, by whoever packs a bundle for the quantiles in
its manifest, and by a device that tries a pulled bundle on its own unlabelled samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.validation import FloatArray, check_scores

QUANTILES = 101
_FIT_QUANTILE = 95


class Calibration:
    """The scores of held-out samples of the known world; they must not have been fitted on.

    Attributes:
        scores: float64 [n], ascending.

    Example:
        >>> Calibration([1.0, 2.0, 3.0]).p_values([2.5, 9.0]).tolist()
        [0.5, 0.25]
    """

    def __init__(self, scores: npt.ArrayLike) -> None:
        self.scores: FloatArray = np.sort(check_scores(scores, what="calibration scores"))
        self.scores.setflags(write=False)

    def p_values(self, scores: npt.ArrayLike, rng: np.random.Generator | None = None) -> FloatArray:
        """Return conformal p-values: small when a score is higher than the calibration scores.

        p = (#{sᵢ > s} + U·(#{sᵢ = s} + 1)) / (n + 1), exactly uniform for an exchangeable sample
        (Vovk, Gammerman, Shafer 2005, eq. 2.20); super-uniform with U = 1. The guarantee is over
        the draw of the calibration set too: p-values that share one set are not independent, so a
        sequential test on them needs `ood.alarm`.

        Args:
            scores: [n], higher is more foreign.
            rng: draws U for each score; without it U = 1, which is conservative and repeatable.

        Raises:
            OodError: scores are empty or not finite.
        """
        values = check_scores(scores)
        known = len(self.scores)
        not_below: FloatArray = known + np.float64(1) - self.scores.searchsorted(values)
        if rng is not None:
            above = known - self.scores.searchsorted(values, side="right")
            not_below = above + rng.random(len(values)) * (not_below - above)
        return not_below / (known + 1)


def score_quantiles(scores: npt.ArrayLike) -> list[float]:
    """Return the 0 %, 1 %, … 100 % quantiles of scores, 101 ascending numbers for a manifest.

    Raises:
        OodError: scores are empty or not finite.
    """
    values = check_scores(scores)
    quantiles = np.quantile(values, np.linspace(0, 1, QUANTILES))
    # Interpolation may lose the order in the last bit.
    return [float(value) for value in np.maximum.accumulate(quantiles)]


def fits(scores: npt.ArrayLike, quantiles: Sequence[float]) -> float:
    """Return the part of the scores that is at or below the 95 % quantile of a bundle's own.

    About 0.95 for samples of the bundle's own world, 0 for a foreign one; no labels are needed.

    Args:
        scores: [n], computed with the bundle's own statistics.
        quantiles: 101 ascending numbers, as `score_quantiles` gives them.

    Raises:
        OodError: scores are empty or not finite, or the quantiles are not 101 ascending numbers.
    """
    values = check_scores(scores)
    known = check_scores(quantiles, what="score quantiles")
    if len(known) != QUANTILES or (np.diff(known) < 0).any():
        raise OodError(f"score quantiles must be {QUANTILES} ascending numbers; found {len(known)}")
    return float((values <= known[_FIT_QUANTILE]).mean())
