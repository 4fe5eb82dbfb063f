"""The alarm and its rivals on the same scores: delays where all run equally long without a shift.

Called by `benchmarks.alarm` for each world. Every stream has a calibration set of its own. Known
samples, for calibration and streams alike, are drawn from the world's held-out samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import alarm_rivals
from benchmarks.alarm_streams import (
    BEFORE,
    SHAPES,
    Evidence,
    Floats,
    Pool,
    Rows,
    first_above,
    samples_an_alarm,
    shifted,
)
from benchmarks.worlds import Worlds
from ood.detector import Detector
from ood.exceedance import Exceedance
from ood.statistics import ClassStatistics, l2_normalise

OURS: Final = "driftkeel"
POOLED: Final = "driftkeel, one pool"
NAMES: Final = (OURS, POOLED, *alarm_rivals.NAMES)
CORRELATION: Final = 0.9
SCENE: Final = 10


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        streams: Streams without shift.
        cut: Their length in samples.
        repeats: Streams of every pair and shape.
        after: Their samples after the shift.
        calibration: Calibration samples.
        wanted: The run length that all detectors are set to.
        adwin_streams: Streams without shift that ADWIN, which runs singly, is set on.
    """

    streams: int
    cut: int
    repeats: int
    after: int
    calibration: int = 200
    wanted: float = 1000.0
    adwin_streams: int = 2000


@dataclass(frozen=True, eq=False)
class Stretch:
    """Streams and what each detector needs to know of them."""

    scores: Floats
    nearest: Rows
    calibration: Floats
    classes: Rows

    def rows(self, count: int) -> Stretch:
        """The first streams only."""
        return Stretch(*(part[:count] for part in vars(self).values()))


def pools(worlds: Worlds, name: str, groups: Sequence[str]) -> tuple[Pool, dict[str, Pool]]:
    """The known samples of a world, and those of everything foreign to it, scored."""
    world = worlds.worlds[name]
    known = ClassStatistics.fit(l2_normalise(world.fit.features), world.fit.labels)
    held_out = l2_normalise(np.concatenate([world.calibration.features, world.test.features]))
    detector = Detector.fit([known], held_out, false_alarm_every=1000)
    names = sorted({*world.fit.labels})

    def pool(features: NDArray[np.floating[Any]], labels: Sequence[str]) -> Pool:
        own = [names.index(label) if label in names else -1 for label in labels]
        return Pool.of(detector.score(features), detector.nearest(features), np.array(own))

    foreign = {
        f"{pair.group}: {pair.foreign}": pool(l2_normalise(pair.features), pair.labels)
        for pair in worlds.pairs(groups)
        if pair.known == name
    }
    return pool(held_out, [*world.calibration.labels, *world.test.labels]), foreign


class Comparison:
    """All detectors on one world, set to the same run length without shift."""

    def __init__(self, known: Pool, size: Size, rng: np.random.Generator) -> None:
        self.known, self.size, self._rng = known, size, rng
        quiet = self._stretch(known.draw((size.streams, size.cut), rng))
        self.thresholds: dict[str, float] = {}
        self.run_lengths: dict[str, dict[str, float]] = {name: {} for name in NAMES}
        for name in NAMES:
            if name == "river ADWIN":
                few = _standard(quiet.rows(size.adwin_streams))
                threshold = alarm_rivals.delta_for(
                    few, size.wanted, lambda first: samples_an_alarm(first, size.cut)
                )
                first = alarm_rivals.adwin(few, threshold)
            else:
                path = self._path(name, quiet)
                threshold = alarm_rivals.threshold_for(
                    path,
                    size.wanted,
                    partial(_run_length, path, size.cut),
                    # Ours at least the run length, the others at most: the odds are theirs.
                    at_least=name in {OURS, POOLED},
                )
                first = first_above(path, threshold)
            self.thresholds[name] = threshold
            self.run_lengths[name]["independent"] = samples_an_alarm(first, size.cut)

    def dependent(self) -> None:
        """Measure the run lengths of the same detectors on streams that are not independent."""
        shape = (self.size.streams, self.size.cut)
        for kind, drawn in (
            ("AR(1)", self.known.autocorrelated(shape, CORRELATION, self._rng)),
            ("scenes", self.known.scenes(shape, SCENE, self._rng)),
        ):
            stretch = self._stretch(drawn)
            for name in NAMES:
                short = stretch.rows(self.size.adwin_streams) if "ADWIN" in name else stretch
                first = self._alarms(name, short)
                self.run_lengths[name][kind] = samples_an_alarm(first, self.size.cut)

    def delays(self, foreign: Pool) -> Iterator[dict[str, Any]]:
        """The delay of every detector for each shape of a shift to these samples."""
        size = (self.size.repeats, BEFORE + self.size.after)
        for shape in SHAPES:
            known, other = self.known.draw(size, self._rng), foreign.draw(size, self._rng)
            stretch = self._stretch(shifted(known, other, shape, self._rng))
            for name in NAMES:
                first = self._alarms(name, stretch)
                delay = first[first > BEFORE] - BEFORE
                median, high = np.quantile(delay, [0.5, 0.9], method="higher")
                yield {
                    "shape": shape,
                    "detector": name,
                    "median": float(median) if np.isfinite(median) else None,
                    "p90": float(high) if np.isfinite(high) else None,
                    "noticed": round(float(np.isfinite(delay).mean()), 3),
                    "streams": len(delay),
                }

    def _stretch(self, drawn: tuple[Floats, Rows]) -> Stretch:
        calibration, classes = self.known.draw((len(drawn[0]), self.size.calibration), self._rng)
        return Stretch(*drawn, calibration, classes)

    def _alarms(self, name: str, stretch: Stretch) -> Floats:
        if name == "river ADWIN":
            return alarm_rivals.adwin(_standard(stretch), self.thresholds[name])
        return first_above(self._path(name, stretch), self.thresholds[name])

    def _path(self, name: str, stretch: Stretch) -> Floats:
        if name not in {OURS, POOLED}:
            standard = _standard(stretch)
            return alarm_rivals.PATHS[name](standard, _standard_calibration(stretch))
        return evidence(stretch, by_class=name == OURS)


def _run_length(path: Floats, cut: int, threshold: float) -> float:
    return samples_an_alarm(first_above(path, threshold), cut)


def evidence(stretch: Stretch, *, by_class: bool) -> Floats:
    """Our evidence over whole streams."""
    fitted = [
        Exceedance.fit(scores, classes if by_class else None)
        for scores, classes in zip(stretch.calibration, stretch.classes, strict=True)
    ]
    groups = None
    if by_class:
        groups = np.stack(
            [one.groups(row) for one, row in zip(fitted, stretch.nearest, strict=True)]
        )
    return Evidence(fitted).path(stretch.scores, groups)


def _standard(stretch: Stretch) -> Floats:
    scale = stretch.calibration.std(axis=1, keepdims=True)
    result: Floats = (stretch.scores - stretch.calibration.mean(axis=1, keepdims=True)) / scale
    return result


def _standard_calibration(stretch: Stretch) -> Floats:
    own = stretch.calibration
    result: Floats = (own - own.mean(axis=1, keepdims=True)) / own.std(axis=1, keepdims=True)
    return result
