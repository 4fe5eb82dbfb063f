"""The sequential alarm: has the stream shifted, within a budget of false alarms?

The operator says how many samples may pass, on average, between two false alarms. This module
turns that number and a fixed, possibly small, set of calibration scores into a test that keeps the
budget by construction. Pure: state and scores in, state and perhaps an alarm out. Called by
`ood.detector`.

How the budget is kept:

1. *Rates.* A level is the calibration score with k of the n above it. Were that one set used
   forever, conformal p-values would share its error, and no test on them would keep a budget.
   So the stream's own samples are put to the calibration set as they come: given k and that x of N
   samples so far were above the level, the next is with probability q = (k + 1 + x) / (n + 1 + N)
   exactly, whatever the scores' distribution. That is Pólya's urn: the rate above an order
   statistic is Beta(k + 1, n − k), and x its evidence. It is the on-line protocol in which
   conformal p-values are independent (Vovk, Gammerman and Shafer, "Algorithmic learning in a random
   world", 2005, theorem 8.2), at a few levels; no constant is tuned and no confidence is spent.
2. *Classes.* All this holds within each class, however often which class comes: Mondrian
   conformal prediction (Vovk et al. 2005, section 4.5). With `class_of` each class that has enough
   calibration samples has levels and urns of its own, so "more of class 3 today" is no shift; the
   others share a pool, where that holds for proportions within the pool only as far as the
   calibration set shows the classes' own rates (`ood.exceedance`). Classes are the nearest ones: a
   change of proportions that makes the nearest class wrong more often does look like a shift.
3. *Bets.* L = 1 + λ(1{S > t} / q − 1) for a few λ, on each level and on all of them in equal
   parts: E[L | past] = 1 while nothing shifts.
4. *Evidence.* M ← L·(M + 1), the Shiryaev–Roberts e-detector of Shin, Ramdas and Rinaldo,
   "E-detectors" (New England Journal of Statistics in Data Science 2024, definition 2.2), averaged
   over all bets. M − (number of samples) is a martingale, so alarming at M ≥ budget gives an
   average run length ≥ budget (their theorem 2.4). Their CUSUM form, L·max(M, 1), is never larger,
   so would never be sooner; one for each λ, over all levels, is kept for its last restart, which
   estimates the onset.
5. *Sharing.* Before each sample every bet gives a part of its evidence to all bets in equal
   parts: the fixed share of Herbster and Warmuth, "Tracking the best expert" (Machine Learning
   1998). What one bet has gained is thereby staked on whichever pays now, be the sample in another
   class or the shift stronger than it was. The mean over all bets is the same after as before, and
   so M stays a martingale.
6. *Again.* After an alarm the evidence starts anew and the urns do not: given all that was seen,
   the next run is as long on average as the first. The price is that a shift that goes on is
   learnt, and the alarms about it become rarer.

The average is over calibration sets and streams together. Of one device it says that the
probability of a false alarm within its first N samples is at most N / budget before its
calibration set is drawn.

What it asks of the stream is that, as long as nothing shifts, the scores of one class are
exchangeable with its calibration scores. Video frames are not: a scene stays for a while. For those
``block = N`` counts the first sample of every N and only that; the budget then holds when samples N
or more apart are independent (N: the frames that one scene lasts), and stays in samples, so a
counted sample needs less evidence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import fsum, isfinite
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from ood.alarm_state import Alarm, AlarmState
from ood.errors import OodError
from ood.exceedance import LEVELS, Exceedance, check_classes
from ood.proportions import Proportions
from ood.validation import FloatArray, check_scores

__all__ = ["Alarm", "AlarmState", "ShiftTest"]

# These, the levels and the shares were chosen on 6 kinds of simulated shift among 4 to 50 classes
# and on `cwru-load0` of `benchmarks.alarm`; others around them are within some 3 % in mean delay.
BETS = (0.07, 0.25, 0.8)
# One for each level, and one for their mean.
COLUMNS = LEVELS + 1
# The part of its evidence that each bet shares. The smaller a bet, the longer it takes to pay, and
# the less it may give. At a run length of 1,000, 0.1 for all notices gradual shifts 6 % later; at a
# budget of 1e6 sharing makes no difference.
SHARES = (0.02, 0.05, 0.1)
_GIVEN = SHARES * COLUMNS
_KEPT = tuple(1 - part for part in _GIVEN)
_MAX_BUDGET = 1e12
_FEW = 8


class ShiftTest:
    """The test for one calibration set and one budget; immutable, holds no state of the stream.

    Args:
        calibration_scores: [n] scores of held-out samples of the known world. n ≥ 50 gives a test
            that reacts; fewer keep the budget too, at the price of slow alarms.
        false_alarm_every: the average number of samples between false alarms, 2..1e12.
        class_of: int [n], the component each calibration sample is nearest to. With it, a change
            of their proportions is no shift.
        block: how many samples one scene of the stream lasts; 1 where samples are independent.
        prior_changes: a change of proportions is a shift. They are watched too, and all classes
            share their levels, which is sooner; needs ``class_of``.

    Attributes:
        alarm_at: the evidence at which the alarm is raised.
        exceedance: levels and urns to begin with.
        fingerprint: names the test; a state belongs to one.

    Raises:
        OodError: scores are empty or not finite, or the budget or block is out of range.

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
        block: int = 1,
        prior_changes: bool = False,
    ) -> None:
        scores = check_scores(calibration_scores, what="calibration scores")
        if not isfinite(false_alarm_every) or not 2 <= false_alarm_every <= _MAX_BUDGET:
            raise OodError(f"false_alarm_every is {false_alarm_every}; expected 2 to 1e12 samples")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise OodError(f"block is {block!r}; expected a number of samples from 1")
        classes = None if class_of is None else check_classes(class_of, len(scores))
        self.false_alarm_every = float(false_alarm_every)
        self.block = block
        self.by_class = classes is not None
        self.exceedance = Exceedance.fit(scores, None if prior_changes else classes)
        self._proportions = Proportions.fit(classes) if prior_changes else None
        # The first counted sample is the first of all, so one block less is waited for.
        needed = self.false_alarm_every / block + (block > 1)
        self._pairs = [(1 - bet, bet) for bet in BETS]
        if self._proportions is not None:
            needed /= 1 - self._proportions.risk
        self.alarm_at = needed
        self.fingerprint = self._fingerprint()
        self._lengths = _lengths(self.initial_state())

    def initial_state(self) -> AlarmState:
        """Return the state before the first sample."""
        return self.successor(AlarmState("", 0, 0, (), (), (), (), ()))

    def successor(self, state: AlarmState) -> AlarmState:
        """Return a state without evidence that counts on from another test's."""
        extra = 0 if self._proportions is None else len(self._proportions.bets)
        bets, onsets = COLUMNS * len(BETS) + extra, len(BETS) + extra
        return AlarmState(
            self.fingerprint,
            state.seen,
            state.alarms,
            evidence=(0.0,) * bets,
            cusum=(0.0,) * onsets,
            since=(state.seen,) * onsets,
            above=self.exceedance.above,
            drawn=self.exceedance.drawn,
            recent=() if self._proportions is None else self._proportions.start,
        )

    def accepts(self, state: AlarmState) -> bool:
        """Say whether the state belongs to this test; another calibration or budget is another."""
        return state.test == self.fingerprint and _lengths(state) == self._lengths

    def evidence(self, state: AlarmState) -> float:
        """Return the evidence for a shift, to be compared with `alarm_at`."""
        return self._total(state.evidence)

    def update(
        self,
        state: AlarmState,
        scores: npt.ArrayLike,
        class_of: npt.ArrayLike | None = None,
    ) -> tuple[AlarmState, Alarm | None]:
        """Take in the scores of the next samples, in order.

        The evidence starts anew after an alarm. The resulting state does not depend, to the bit, on
        how the stream is cut into batches. When a batch raises several alarms the first is
        returned and ``state.alarms`` counts them all.

        Args:
            state: what the last update returned.
            scores: [n] the samples' scores.
            class_of: int [n], the component each sample is nearest to; needed where the test was
                given the calibration samples', else not looked at.

        Raises:
            OodError: scores are empty or not finite, classes are missing or no classes, or the
                state belongs to another test.
        """
        if not self.accepts(state):
            raise OodError(
                "the alarm state belongs to another calibration or budget; start from the initial "
                "state of this one"
            )
        values = scores if _is_sound(scores) else check_scores(scores)
        size, first = len(values), -state.seen % self.block
        if not self.by_class:
            classes = np.zeros(size, np.int64)
        elif class_of is None:
            raise OodError("this alarm tells classes apart: give class_of, the nearest of each")
        else:
            classes = check_classes(class_of, size)
        run = _Run(state)
        numbers, kinds = values.tolist(), classes.tolist()
        for place in range(first, size, self.block):
            self._take(run, numbers[place], kinds[place], state.seen + place)
        return run.state(state.seen + size), run.first

    def _take(self, run: _Run, score: float, class_: int, seen: int) -> None:
        group_of = self.exceedance.group_of
        group = group_of[class_] if class_ < len(group_of) else 0
        odds = self.exceedance.odds_of_one(score, group, run.above, run.drawn)
        odds.append(fsum(odds) / LEVELS)
        ratios = [lost + bet * odd for odd in odds for lost, bet in self._pairs]
        onsets = ratios[-len(BETS) :]
        bets = len(ratios)
        before = run.evidence[:bets]
        # What every bet is given, and the 1 that a run starting with this sample begins with.
        given = fsum([part * m for part, m in zip(_GIVEN, before, strict=True)]) / bets + 1.0
        evidence = [
            ratio * (part * m + given) for ratio, part, m in zip(ratios, _KEPT, before, strict=True)
        ]
        if self._proportions is not None:
            odd = self._proportions.odds_of_one(class_, run.recent)
            own = [(1 - bet) + bet * odd for bet in self._proportions.bets]
            onsets = onsets + own
            evidence += [
                ratio * (m + 1.0) for ratio, m in zip(own, run.evidence[bets:], strict=True)
            ]
        for place, ratio in enumerate(onsets):
            if run.cusum[place] > 1.0:
                run.cusum[place] *= ratio
            else:
                run.cusum[place], run.since[place] = ratio, seen
        run.evidence = evidence
        total = self._total(evidence)
        if total >= self.alarm_at:
            run.alarm(seen + 1, total)

    def _total(self, evidence: Sequence[float]) -> float:
        """The mean over all bets; half of it is the proportions' where those are watched."""
        bets = COLUMNS * len(BETS)
        total = fsum(evidence[:bets]) / bets
        if self._proportions is None:
            return total
        return 0.5 * total + 0.5 * (fsum(evidence[bets:]) / (len(evidence) - bets))

    def _fingerprint(self) -> str:
        parts = self.exceedance
        numbers = [self.alarm_at, self.block, COLUMNS, *SHARES, *BETS, *parts.group_of]
        numbers += [level for levels in parts.levels for level in levels]
        numbers += [*parts.above, *parts.drawn, *parts.most]
        if self._proportions is not None:
            numbers += [*self._proportions.rates, *self._proportions.start]
        return hashlib.sha256(np.array(numbers, "<f8").tobytes()).hexdigest()[:16]


class _Run:
    """A state while samples are taken in."""

    def __init__(self, state: AlarmState) -> None:
        self.test, self.alarms = state.test, state.alarms
        self.evidence, self.cusum = list(state.evidence), list(state.cusum)
        self.since, self.recent = list(state.since), list(state.recent)
        self.above, self.drawn = list(state.above), list(state.drawn)
        self.first: Alarm | None = None

    def alarm(self, at: int, evidence: float) -> None:
        """Note an alarm; the evidence starts anew."""
        self.alarms += 1
        onset = self.since[self.cusum.index(max(self.cusum))] + 1
        self.first = self.first or Alarm(at=at, onset=onset, evidence=evidence)
        self.evidence, self.cusum = [0.0] * len(self.evidence), [0.0] * len(self.cusum)
        self.since = [at] * len(self.since)

    def state(self, seen: int) -> AlarmState:
        """The state after ``seen`` samples."""
        return AlarmState(
            self.test,
            seen,
            self.alarms,
            tuple(self.evidence),
            tuple(self.cusum),
            tuple(self.since),
            tuple(self.above),
            tuple(self.drawn),
            tuple(self.recent),
        )


def _lengths(state: AlarmState) -> tuple[int, ...]:
    return (
        len(state.evidence),
        len(state.cusum),
        len(state.above),
        len(state.drawn),
        len(state.recent),
    )


def _is_sound(scores: npt.ArrayLike) -> TypeGuard[FloatArray]:
    """Whether `check_scores` would give back this very array; costs less where it is short."""
    return (
        isinstance(scores, np.ndarray)
        and scores.dtype == np.float64
        and scores.ndim == 1
        and 0 < scores.size < _FEW
        and all(map(isfinite, scores.tolist()))
    )
