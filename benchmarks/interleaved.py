"""Timing several ways of doing one thing, in turns, so that a busy machine treats all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """What one way took, in milliseconds."""

    minimum_ms: float
    median_ms: float
    p99_ms: float


def timed(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
    """Run every way once a round, in an order that changes from round to round.

    A way's first run is not counted. Of the figures the minimum is the one to compare by when
    something else runs beside; the medians are of the same rounds.

    Args:
        ways: What to time, by name.
        rounds: How often each is timed.
    """
    rng = np.random.default_rng(0)
    names = list(ways)
    for name in names:
        ways[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in rng.permutation(names):
            started = time.perf_counter()
            ways[name]()
            taken[name].append((time.perf_counter() - started) * 1000.0)
    return {
        name: Timing(
            float(np.min(values)), float(np.median(values)), float(np.quantile(values, 0.99))
        )
        for name, values in taken.items()
    }
