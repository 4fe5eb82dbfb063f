"""How often known scores exceed each of a few levels: the exact law that the alarm bets against.

Groups of classes have levels of their own, so that more samples of one class are no surprise.
Called by `ood.alarm`; holds no state of the stream and places no bet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.validation import FloatArray

IntArray = npt.NDArray[np.int64]

# The part of a group's calibration scores above each level: the last is the largest score itself.
TAILS = (0.75, 0.5, 0.25, 0.1, 0.03, 0.0)
LEVELS = len(TAILS)
# From this many calibration samples on a class has levels of its own. Chosen with the bets of
# `ood.alarm`, on the same shifts: 5 to 12 are alike in mean delay. With 20 a world of 12 samples a
# class is mostly pool, which is held to its worst class and takes up to four times as long.
OWN_GROUP = 8
# Weight, in samples, of the overall rate when the rate of one class of the pool is estimated.
_CLASS_PRIOR = 10
_MOST_GROUPS = 400
_FEW = 8


@dataclass(frozen=True)
class Exceedance:
    """Levels of every group, and the urn each level starts with.

    Attributes:
        group_of: the group of each class; a class beyond the end is in group 0, the pool.
        levels: [g][6] scores, ascending within a group.
        above: [g·6] the urn's scores above each level to begin with: rank + 1.
        drawn: [g] all of the urn's scores to begin with: n + 1.
        most: [g·6] the largest 1/q that a bet may count on; infinite but in the pool.
    """

    group_of: tuple[int, ...]
    levels: tuple[tuple[float, ...], ...]
    above: tuple[int, ...]
    drawn: tuple[int, ...]
    most: tuple[float, ...]

    @classmethod
    def fit(cls, scores: FloatArray, class_of: IntArray | None) -> Exceedance:
        """Group the classes and set their levels.

        Args:
            scores: [n] calibration scores.
            class_of: [n] the nearest class of each; None for one group.
        """
        group_of = _groups(class_of)
        owner = np.zeros(len(scores), np.int64)
        if class_of is not None and group_of:
            owner = np.asarray(group_of)[class_of]
        levels, above, drawn, most = [], [], [], []
        for group in range(max(group_of, default=0) + 1):
            # A class that no calibration sample was nearest to is held to the whole set.
            members = owner == group if (owner == group).any() else np.ones(len(owner), bool)
            ordered = np.sort(scores[members])
            ranks = [int(tail * len(ordered)) for tail in TAILS]
            levels.append(tuple(float(ordered[-1 - rank]) for rank in ranks))
            above += [rank + 1 for rank in ranks]
            drawn.append(len(ordered) + 1)
            if group or class_of is None:
                most += [inf] * LEVELS
            else:
                worst = _worst_class_rates(scores[members], levels[-1], class_of[members])
                most += [float(1 / rate) for rate in worst]
        return cls(group_of, tuple(levels), tuple(above), tuple(drawn), tuple(most))

    def groups(self, classes: IntArray) -> IntArray:
        """Return the group of each class, int64 [n]."""
        table = np.array([*self.group_of, 0], np.int64)
        found: IntArray = table[np.minimum(classes, len(self.group_of))]
        return found

    def odds_of_one(
        self, score: float, group: int, above: list[int], drawn: list[int]
    ) -> list[float]:
        """Return 1/q for each level that a sample exceeds, else 0; put it into the urns, in place.

        q is the urn's rate before the sample. A score equal to a level is no exceedance for the
        bet but one for the urn: both make the evidence smaller than a tie broken at random would,
        so ties cannot break the budget.
        """
        place = group * LEVELS
        total = drawn[group]
        odds = [0.0] * LEVELS
        for level, value in enumerate(self.levels[group]):
            if score < value:
                break
            if score > value:
                gain, most = total / above[place + level], self.most[place + level]
                odds[level] = min(gain, most)
            above[place + level] += 1
        drawn[group] = total + 1
        return odds


def check_classes(classes: npt.ArrayLike, samples: int) -> IntArray:
    """Return the classes as int64 [samples].

    Raises:
        OodError: they are not that many integers ≥ 0.
    """
    found = np.asarray(classes)
    if found.shape != (samples,) or found.dtype.kind not in "iu":
        raise OodError(f"class_of must be {samples} integers; found {found.dtype} {found.shape}")
    # NumPy takes longer to find the least of a few.
    if samples and (min(found.tolist()) if samples < _FEW else found.min()) < 0:
        raise OodError(f"class_of must be integers from 0; found {found.min()}")
    return found.astype(np.int64, copy=False)


def _groups(class_of: IntArray | None) -> tuple[int, ...]:
    """Give classes with enough samples a group each, and pool the others in group 0."""
    if class_of is None:
        return ()
    counts = np.bincount(class_of)
    order = sorted(np.flatnonzero(counts), key=lambda k: (-counts[k], k))
    own = [k for k in order if counts[k] >= OWN_GROUP][:_MOST_GROUPS]
    pooled = int(counts.sum() - counts[own].sum())
    while own and 0 < pooled < OWN_GROUP:
        pooled += int(counts[own.pop()])
    if len(own) == 1 and not pooled:
        own = []
    group_of = [0] * len(counts)
    for group, k in enumerate(sorted(own), start=1):
        group_of[k] = group
    return tuple(group_of)


def _worst_class_rates(
    scores: FloatArray, levels: Sequence[float], class_of: IntArray
) -> FloatArray:
    """Estimate the highest rate at which samples of one class alone exceed each level.

    A point estimate, in which a class with few samples borrows from the overall rate.
    """
    exceeds = scores[:, None] > np.array(levels)
    overall = (exceeds.sum(axis=0) + 1) / (len(scores) + 1)
    rates = [
        (exceeds[class_of == k].sum(axis=0) + _CLASS_PRIOR * overall)
        / ((class_of == k).sum() + _CLASS_PRIOR)
        for k in np.unique(class_of)
    ]
    worst: FloatArray = np.max(rates, axis=0)
    return worst
