"""The sequential alarm: has the stream shifted, within a budget of false alarms?

The operator says how many samples may pass, on average, between two false alarms. This module
turns that number and a fixed, possibly small, set of calibration scores into a test that keeps the
budget by construction. Pure: state and scores in, state and perhaps an alarm out. Called by
`ood.detector`.

How the budget is kept:

1. *Thresholds.* t is the calibration score with k of the n above it. Were F continuous,
   P(S > t | calibration) would be Beta(k + 1, n − k); with ties it is smaller still. Its upper
   1 − δ/m quantile q is therefore exceeded with probability at most δ/m over the calibration set:
   the calibration-conditional bound of Bates, Candès, Lei, Romano and Sesia, "Testing for outliers
   with conformal p-values" (Annals of Statistics 2023, section 3), for m fixed ranks instead of all
   n, by the union bound. δ = 0.05 is spent here and nowhere else. Plain conformal p-values with a
   fixed set do not have this property.
2. *Bets.* For each threshold and a few p > q, L = p/q when S > t, else (1 − p)/(1 − q). Whenever
   P(S > t | past) ≤ q, E[L | past] ≤ 1.
3. *Evidence.* M ← L·(M + 1), the Shiryaev–Roberts e-detector of Shin, Ramdas and Rinaldo,
   "E-detectors" (New England Journal of Statistics in Data Science 2024, definition 2.2), averaged
   over all bets. M − (number of samples) is a supermartingale, so alarming at M ≥ c gives an
   average run length ≥ c (their theorem 2.4).
4. *Both readings.* c = budget / (1 − δ). With probability ≥ 1 − δ over the calibration set, this
   device's average run length is ≥ c; and averaged over calibration sets it is ≥ (1 − δ)·c, the
   budget.

What it asks of the stream: that, as long as nothing shifts, each sample exceeds t with probability
at most q given the past. Independent samples from where the calibration set came from do;
near-duplicate video frames do not. A change of class proportions alone is no such stream either; it
is tolerated as far as the calibration set shows the classes' own exceedance rates (`class_of`), so
mostly, not always.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite, lgamma, log, log1p
from typing import Any

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.validation import FloatArray, check_scores

CONFIDENCE_SPENT = 0.05
# The part of the calibration scores above each threshold: the last is the largest score itself.
_TAILS = (0.25, 0.1, 0.04, 0.01, 0.0)
# How far each bet lies between the null rate q and certainty.
_BETS = (0.1, 0.3, 0.6, 0.9)
# Weight, in samples, of the overall exceedance rate when a class's own rate is estimated.
_CLASS_PRIOR = 10
_MAX_BUDGET = 1e12


@dataclass(frozen=True)
class Alarm:
    """The stream has shifted.

    Attributes:
        at: the sample at which the evidence reached the budget; the first ever seen is 1.
        onset: the estimated first shifted sample, ≤ at: where the strongest bet's evidence last
            left its floor.
        evidence: the evidence reached, ≥ the budget.
    """

    at: int
    onset: int
    evidence: float


@dataclass(frozen=True)
class AlarmState:
    """All the test remembers between two samples; survives a restart through `to_dict`.

    Attributes:
        test: the fingerprint of the test it belongs to.
        seen: samples seen so far, over all alarms.
        alarms: alarms raised so far.
        evidence: one Shiryaev–Roberts statistic for each bet.
        cusum: one CUSUM statistic for each bet; it only serves the onset.
        since: for each bet, how many samples had been seen when its CUSUM last restarted.
    """

    test: str
    seen: int
    alarms: int
    evidence: tuple[float, ...]
    cusum: tuple[float, ...]
    since: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON can carry it, without loss."""
        return {
            "test": self.test,
            "seen": self.seen,
            "alarms": self.alarms,
            "evidence": list(self.evidence),
            "cusum": list(self.cusum),
            "since": list(self.since),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AlarmState:
        """Rebuild a state from `to_dict`.

        Raises:
            OodError: a field is missing, unknown or of the wrong type or range.
        """
        names = {"test", "seen", "alarms", "evidence", "cusum", "since"}
        if set(fields) != names:
            raise OodError(f"alarm state needs {sorted(names)}; found {sorted(map(str, fields))}")
        seen, alarms = _count(fields["seen"], "seen"), _count(fields["alarms"], "alarms")
        if not isinstance(fields["test"], str):
            raise OodError("alarm state: test must be a string")
        evidence = _levels(fields["evidence"], "evidence")
        cusum = _levels(fields["cusum"], "cusum")
        if not isinstance(fields["since"], list | tuple):
            raise OodError("alarm state: since must be a list")
        since = tuple(_count(value, "since") for value in fields["since"])
        if not len(evidence) == len(cusum) == len(since):
            raise OodError("alarm state: evidence, cusum and since are of different lengths")
        if since and max(since) > seen:
            raise OodError("alarm state: since lies after the samples seen")
        return cls(fields["test"], seen, alarms, evidence, cusum, since)


class ShiftTest:
    """The test for one calibration set and one budget; immutable, holds no state of the stream.

    Args:
        calibration_scores: [n] scores of held-out samples of the known world. n ≥ 50 gives a test
            that reacts; fewer keep the budget too, at the price of slow alarms.
        false_alarm_every: the average number of samples between false alarms, 2..1e12.
        class_of: int [n], the component each calibration sample is nearest to. With it, rates up to
            the worst class's estimated own rate count as no shift, so that a change of class
            proportions alone does not alarm. It only ever raises q, so the budget still holds.

    Attributes:
        alarm_at: the evidence at which the alarm is raised, budget / (1 − δ).
        thresholds: float64 [b], the threshold t of each bet.
        rates: float64 [b], the rate q at which each is exceeded at most while nothing shifts.
        gains_above: float64 [b], the factor L of each bet for a sample above its threshold.
        gains_below: float64 [b], the factor L for a sample that is not.
        fingerprint: names the test; a state belongs to one.

    Raises:
        OodError: scores are empty or not finite, or the budget is out of range.

    Example:
        >>> test = ShiftTest(list(range(100)), false_alarm_every=1000)
        >>> state, alarm = test.update(test.initial_state(), [5.0] * 20 + [200.0] * 20)
        >>> alarm.onset
        21
    """

    def __init__(
        self,
        calibration_scores: npt.ArrayLike,
        *,
        false_alarm_every: float,
        class_of: npt.ArrayLike | None = None,
    ) -> None:
        scores = check_scores(calibration_scores, what="calibration scores")
        if not isfinite(false_alarm_every) or not 2 <= false_alarm_every <= _MAX_BUDGET:
            raise OodError(f"false_alarm_every is {false_alarm_every}; expected 2 to 1e12 samples")
        self.false_alarm_every = float(false_alarm_every)
        self.alarm_at = self.false_alarm_every / (1 - CONFIDENCE_SPENT)
        ordered, n = np.sort(scores), len(scores)
        ranks = sorted({int(tail * n) for tail in _TAILS}, reverse=True)
        thresholds = np.array([ordered[n - 1 - k] for k in ranks])
        rates = np.array([exceedance_bound(k, n, CONFIDENCE_SPENT / len(ranks)) for k in ranks])
        if class_of is not None:
            rates = np.maximum(rates, _worst_class_rates(scores, thresholds, class_of))
        self.thresholds: FloatArray = np.repeat(thresholds, len(_BETS))
        self.rates: FloatArray = np.repeat(rates, len(_BETS))
        bets = self.rates + np.tile(_BETS, len(ranks)) * (1 - self.rates)
        self.gains_above = bets / self.rates
        self.gains_below = (1 - bets) / (1 - self.rates)
        content = np.concatenate(
            [[self.alarm_at], self.thresholds, self.gains_above, self.gains_below]
        )
        self.fingerprint = hashlib.sha256(content.astype("<f8").tobytes()).hexdigest()[:16]

    def initial_state(self) -> AlarmState:
        """Return the state before the first sample."""
        return self.successor(AlarmState(self.fingerprint, 0, 0, (), (), ()))

    def successor(self, state: AlarmState) -> AlarmState:
        """Return a state without evidence that counts on from another test's."""
        bets = len(self.thresholds)
        zeros = (0.0,) * bets
        since = (state.seen,) * bets
        return AlarmState(self.fingerprint, state.seen, state.alarms, zeros, zeros, since)

    def accepts(self, state: AlarmState) -> bool:
        """Say whether the state belongs to this test; another calibration or budget is another."""
        return state.test == self.fingerprint and len(state.evidence) == len(self.thresholds)

    def evidence(self, state: AlarmState) -> float:
        """Return the evidence for a shift, to be compared with `alarm_at`."""
        return float(np.mean(state.evidence))

    def update(self, state: AlarmState, scores: npt.ArrayLike) -> tuple[AlarmState, Alarm | None]:
        """Take in the scores of the next samples, in order.

        The evidence starts anew after an alarm. The resulting state does not depend on how the
        stream is cut into batches. When a batch raises several alarms the first is returned and
        ``state.alarms`` counts them all.

        Raises:
            OodError: scores are empty or not finite, or the state belongs to another test.
        """
        values = check_scores(scores)
        if not self.accepts(state):
            raise OodError(
                "the alarm state belongs to another calibration or budget; start from the initial "
                "state of this one"
            )
        evidence, cusum = np.array(state.evidence), np.array(state.cusum)
        since, seen, alarms = np.array(state.since, dtype=np.int64), state.seen, state.alarms
        first: Alarm | None = None
        for value in values:
            ratio = np.where(value > self.thresholds, self.gains_above, self.gains_below)
            evidence = ratio * (evidence + 1.0)
            since = np.where(cusum <= 1.0, seen, since)
            cusum = ratio * np.maximum(cusum, 1.0)
            seen += 1
            level = float(evidence.mean())
            if level >= self.alarm_at:
                alarms += 1
                onset = int(since[int(np.argmax(cusum))]) + 1
                first = first or Alarm(at=seen, onset=onset, evidence=level)
                evidence, cusum = np.zeros_like(evidence), np.zeros_like(cusum)
                since = np.full_like(since, seen)
        state = AlarmState(
            state.test,
            seen,
            alarms,
            tuple(evidence.tolist()),
            tuple(cusum.tolist()),
            tuple(since.tolist()),
        )
        return state, first


def exceedance_bound(above: int, samples: int, risk: float) -> float:
    """Return q such that P(S > t | calibration) ≤ q, except with probability ``risk``.

    t is the calibration score with ``above`` of ``samples`` above it; q is the 1 − risk quantile of
    Beta(above + 1, samples − above), found as the q with P(Binomial(samples, q) ≤ above) = risk.

    Args:
        above: how many calibration scores are above t, 0..samples − 1.
        samples: the number of calibration scores.
        risk: the probability over calibration sets that the bound fails, 0..1.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _binomial_cdf(above, samples, middle) > risk:
            low = middle
        else:
            high = middle
    return high


def _binomial_cdf(successes: int, trials: int, rate: float) -> float:
    if rate in {0.0, 1.0}:
        return 1.0 - rate
    k = np.arange(successes + 1)
    ways = np.array([lgamma(trials + 1) - lgamma(i + 1) - lgamma(trials - i + 1) for i in k])
    terms = ways + k * log(rate) + (trials - k) * log1p(-rate)
    peak = float(terms.max())
    return exp(peak) * float(np.exp(terms - peak).sum())


def _worst_class_rates(
    scores: FloatArray, thresholds: FloatArray, class_of: npt.ArrayLike
) -> FloatArray:
    """Estimate the highest rate at which samples of one class alone exceed each threshold.

    A point estimate, in which a class with few samples borrows from the overall rate: an upper
    bound for each class would double the delay on near shifts (measured on digits).
    """
    owner = np.asarray(class_of)
    if owner.shape != scores.shape or owner.dtype.kind not in "iu":
        raise OodError(
            f"class_of must be {len(scores)} integers; found {owner.dtype} {owner.shape}"
        )
    exceeds = scores[:, None] > thresholds
    overall = (exceeds.sum(axis=0) + 1) / (len(scores) + 1)
    rates = [
        (exceeds[owner == k].sum(axis=0) + _CLASS_PRIOR * overall)
        / ((owner == k).sum() + _CLASS_PRIOR)
        for k in np.unique(owner)
    ]
    worst: FloatArray = np.max(rates, axis=0)
    return worst


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OodError(f"alarm state: {name} must be a count; found {value!r}")
    return value


def _levels(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise OodError(f"alarm state: {name} must be a list")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OodError(f"alarm state: {name} holds {value!r}; expected numbers")
        if not isfinite(value) or value < 0:
            raise OodError(f"alarm state: {name} holds {value!r}; expected finite numbers ≥ 0")
    return tuple(float(value) for value in values)
