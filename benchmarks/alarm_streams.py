"""Many alarms side by side, and the streams they are measured on.

`Evidence` steps any number of `ood.alarm.ShiftTest`s at once, so that run lengths can be measured
over thousands of streams; `benchmarks.alarm` checks it against the real one before it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ood.alarm import BETS, COLUMNS, SHARES
from ood.exceedance import LEVELS, Exceedance

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

SHAPES: Final = ("abrupt", "gradual", "recurring", "partial 30 %", "partial 10 %")
BEFORE: Final = 200
_RAMP: Final = 1000
_SPELL: Final = 200


class Evidence:
    """The evidence of many tests, each with its own calibration set, a step at a time.

    Args:
        known: One a test.
    """

    def __init__(self, known: Sequence[Exceedance]) -> None:
        runs, groups = len(known), max(len(one.drawn) for one in known)
        self.levels = np.full((runs, groups, LEVELS), np.inf)
        self.above = np.ones((runs, groups, LEVELS))
        self.drawn = np.ones((runs, groups))
        self.most = np.full((runs, groups, LEVELS), np.inf)
        for row, one in enumerate(known):
            own = len(one.drawn)
            self.levels[row, :own] = one.levels
            self.above[row, :own] = np.reshape(one.above, (own, LEVELS))
            self.drawn[row, :own] = one.drawn
            self.most[row, :own] = np.reshape(one.most, (own, LEVELS))
        self.evidence = np.zeros((runs, COLUMNS, len(BETS)))
        self._lost, self._bets = 1 - np.array(BETS), np.array(BETS)
        self._kept = 1 - np.array(SHARES)
        self._all = np.arange(runs)

    def step(self, scores: Floats, groups: Rows | None = None) -> Floats:
        """Take in one sample of every stream and return the evidence after it."""
        at: Any = (slice(None), 0) if groups is None else (self._all, groups)
        levels = self.levels[at]
        odds = np.minimum(self.drawn[at][:, None] / self.above[at], self.most[at])
        odds *= scores[:, None] > levels
        self.above[at] += scores[:, None] >= levels
        self.drawn[at] += 1
        odds = np.hstack([odds, odds.mean(axis=1, keepdims=True)])
        given = (self.evidence * SHARES).mean(axis=(1, 2), keepdims=True)
        # Not the difference of two numbers that may both have overflown long after the alarm.
        self.evidence = self.evidence * self._kept + given + 1.0
        self.evidence *= self._lost + self._bets * odds[:, :, None]
        total: Floats = self.evidence.reshape(len(scores), -1).mean(axis=1)
        return total

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Go on with some of the tests."""
        for name in ("levels", "above", "drawn", "most", "evidence"):
            setattr(self, name, getattr(self, name)[rows])
        self._all = np.arange(len(self.drawn))

    def path(self, scores: Floats, groups: Rows | None) -> Floats:
        """The evidence over whole streams [runs, samples], were there no alarm."""
        with np.errstate(over="ignore"):
            columns = [
                self.step(scores[:, k], None if groups is None else groups[:, k])
                for k in range(scores.shape[1])
            ]
        return np.stack(columns, axis=1)


@dataclass(frozen=True, eq=False)
class Pool:
    """Scored samples to draw streams from.

    Attributes:
        scores: float64 [n], ascending.
        nearest: int64 [n], the nearest class of each.
        labels: int64 [n], the true class of each; −1 where it is none of the world's.
    """

    scores: Floats
    nearest: Rows
    labels: Rows

    @classmethod
    def of(cls, scores: Floats, nearest: Rows, labels: Rows) -> Pool:
        """Sort them."""
        order = np.argsort(scores, kind="stable")
        return cls(scores[order], nearest[order], labels[order])

    def take(self, rows: Rows, rng: np.random.Generator) -> tuple[Floats, Rows]:
        """Scores and nearest classes; ties of repeated samples are broken at random."""
        jitter = rng.normal(scale=1e-7 * float(self.scores.std()), size=rows.shape)
        return self.scores[rows] + jitter, self.nearest[rows]

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Floats, Rows]:
        """Independent samples."""
        return self.take(rng.integers(0, len(self.scores), shape), rng)

    def autocorrelated(
        self, shape: tuple[int, int], correlation: float, rng: np.random.Generator
    ) -> tuple[Floats, Rows]:
        """Samples whose ranks follow a Gaussian AR(1) process."""
        return self.take((ar_uniform(shape, correlation, rng) * len(self.scores)).astype(int), rng)

    def scenes(
        self, shape: tuple[int, int], length: int, rng: np.random.Generator
    ) -> tuple[Floats, Rows]:
        """Independent samples that each stay for some frames."""
        runs, samples = shape
        rows = rng.integers(0, len(self.scores), (runs, -(-samples // length)))
        return self.take(np.repeat(rows, length, axis=1)[:, :samples], rng)


def ar_uniform(shape: tuple[int, int], correlation: float, rng: np.random.Generator) -> Floats:
    """A Gaussian AR(1) process through its own distribution function, in 0 ≤ u < 1."""
    from scipy.special import ndtr  # noqa: PLC0415 - not a dependency of the project

    noise = rng.normal(size=shape)
    noise[:, 1:] *= np.sqrt(1 - correlation**2)
    for k in range(1, shape[1]):
        noise[:, k] += correlation * noise[:, k - 1]
    uniform: Floats = np.minimum(ndtr(noise), np.nextafter(1.0, 0.0))
    return uniform


def shifted(
    known: tuple[Floats, Rows], foreign: tuple[Floats, Rows], shape: str, rng: np.random.Generator
) -> tuple[Floats, Rows]:
    """Streams that shift after `BEFORE` samples, in one of `SHAPES`."""
    runs, samples = known[0].shape
    after = np.arange(samples) - BEFORE
    part = {
        "abrupt": np.ones(samples),
        "gradual": np.clip((after + 1) / _RAMP, 0, 1),
        "recurring": (after // _SPELL % 2 == 0).astype(float),
        "partial 30 %": np.full(samples, 0.3),
        "partial 10 %": np.full(samples, 0.1),
    }[shape]
    chosen = rng.random((runs, samples)) < np.where(after >= 0, part, 0.0)
    return np.where(chosen, foreign[0], known[0]), np.where(chosen, foreign[1], known[1])


def first_above(path: Floats, threshold: float) -> Floats:
    """The first sample, from 1, at which each path reaches the threshold; inf for never."""
    reached = path >= threshold
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)


def samples_an_alarm(first: Floats, cut: int) -> float:
    """The mean run length of runs cut after some samples: all samples over all alarms."""
    return float(np.minimum(first, cut).sum() / max(np.isfinite(first).sum(), 1))
