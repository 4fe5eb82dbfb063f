"""Bets on the proportions of the classes: the part of the alarm that `prior_changes` turns on.

Called by `ood.alarm`. Off by default, because "more of class 3 today" is mostly no shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma, log, log1p

import numpy as np

from ood.errors import OodError
from ood.exceedance import IntArray

# Spent on calibration sets whose proportions mislead; `ood.alarm` asks for that much more evidence.
RISK = 0.05
_BETS = (0.05, 0.2, 0.6)
# How much of the running proportions a new sample is: they follow some 40 samples.
_STEP = 1 / 40
_MOST_CLASSES = 400


@dataclass(frozen=True)
class Proportions:
    """What is known of how often each class comes, and bets that it comes more often.

    Each class's rate is at most its `rates` entry with probability ≥ 1 − risk over the calibration
    set: Clopper and Pearson's upper bound for each, and the union bound. L = 1 + λ·(w(c) / rate(c)
    − 1) has E[L | past] ≤ 1 for any weights w that sum to 1 and were settled before the sample;
    they are the running proportions, so the bet is on whatever has become frequent.

    Attributes:
        rates: the bound of each class; the last is for every class beyond the end.
        start: the proportions in the calibration set.
        bets: the λ.
        risk: the probability over calibration sets that a bound fails.
    """

    rates: tuple[float, ...]
    start: tuple[float, ...]
    bets: tuple[float, ...] = _BETS
    risk: float = RISK

    @classmethod
    def fit(cls, class_of: IntArray | None) -> Proportions:
        """Bound the classes' proportions.

        Raises:
            OodError: there are no classes.
        """
        if class_of is None:
            raise OodError("prior_changes needs class_of, the class of each calibration sample")
        known = min(int(class_of.max()) + 1, _MOST_CLASSES)
        counts = np.bincount(np.minimum(class_of, known), minlength=known + 1).tolist()
        samples = len(class_of)
        rates = [upper_bound(count, samples, RISK / len(counts)) for count in counts]
        return cls(tuple(rates), tuple(count / samples for count in counts))

    def odds_of_one(self, class_: int, recent: list[float]) -> float:
        """Return w(c) / rate(c) of a sample and move the running proportions, in place."""
        place = min(class_, len(recent) - 1)
        odds = recent[place] / self.rates[place]
        recent[:] = [(1 - _STEP) * part for part in recent]
        recent[place] += _STEP
        return odds


def upper_bound(successes: int, trials: int, risk: float) -> float:
    """Return the q with P(Binomial(trials, q) ≤ successes) = risk: Clopper and Pearson, 1934.

    Args:
        successes: how often it happened, 0..trials.
        trials: how often it could have.
        risk: the probability that the rate is larger, 0..1.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _binomial_cdf(successes, trials, middle) > risk:
            low = middle
        else:
            high = middle
    return high


def _binomial_cdf(successes: int, trials: int, rate: float) -> float:
    if successes >= trials:
        return 1.0
    if rate in {0.0, 1.0}:
        return 1.0 - rate
    k = np.arange(successes + 1)
    ways = np.array([lgamma(trials + 1) - lgamma(i + 1) - lgamma(trials - i + 1) for i in k])
    terms = ways + k * log(rate) + (trials - k) * log1p(-rate)
    peak = float(terms.max())
    return exp(peak) * float(np.exp(terms - peak).sum())
