"""What kind of shift is it? A broken sensor, a new look, new classes, or other proportions.

The agent asks when an episode is confirmed, with the window of samples since the onset; benchmarks
ask for pairs of worlds. Pure: statistics, features and pixel facts in, a diagnosis with its
evidence out. What follows from it is the episode's to decide.

Asked in this order. *Sensor fault*: many frames are black, saturated, blank, partly dead or shown
before (`ood.frames`). *Prior change*: given the class each sample is answered as, scores look
known, and the classes' proportions differ from the calibration's (a G-test by permutation; Sokal
and Rohlf, "Biometry", 1995, section 17.2). *New classes or domain shift*: a logistic function of
a few numbers that have no unit, so that they mean the same in every world and encoder; its weights
were fitted to two worlds of one encoder (`benchmarks/kinds.py`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.frames import FrameFacts, Limits
from ood.groups import Cluster, clusters
from ood.known import Known
from ood.validation import FloatArray, check_features

MIN_SAMPLES: Final = 16
# A window with this share of faulty frames is a sensor's fault.
FAULTY_SHARE: Final = 0.2
# Samples less likely than this to be of the known world are foreign, as for the episode.
FOREIGN_P: Final = 0.1
# Conditional on its class, this share of known samples or less looks foreign.
_KNOWN_SHARE: Final = 0.2
_PRIOR_P: Final = 0.01
_PERMUTATIONS: Final = 499
_FLOOR: Final = 1e-9


class Kind(enum.StrEnum):
    """What has happened."""

    SENSOR_FAULT = "sensor fault"
    DOMAIN_SHIFT = "domain shift"
    NEW_CLASSES = "new classes"
    PRIOR_CHANGE = "prior change"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Diagnosis:
    """The answer.

    Attributes:
        kind: What has happened.
        confidence: How sure that is, 0.5..1: of the two kinds that are told apart by weights their
            logistic value; else the share of frames, or one less the p-value.
        evidence: Sentences with the numbers behind it, for a person.
        numbers: The same numbers by name.
        clusters: Groups of foreign samples to be named by a person; only for new classes.
    """

    kind: Kind
    confidence: float
    evidence: tuple[str, ...]
    numbers: dict[str, float]
    clusters: tuple[Cluster, ...] = ()


# name: (weight, what it is subtracted by, what it is divided by). Fitted by benchmarks/kinds.py.
_WEIGHTS: Final[dict[str, tuple[float, float, float]]] = {
    "distance": (-0.270, 0.825, 0.846),
    "displacement": (-0.524, -1.643, 1.455),
    "variance": (0.854, -0.055, 0.313),
    "class_spread": (-1.308, -0.043, 0.452),
    "structure": (1.576, -1.779, 2.232),
    "structure_gain": (0.971, 1.378, 2.551),
    "evenness": (-1.552, 0.898, 0.096),
    "look_contrast": (-0.774, -0.309, 0.832),
    "look_grain": (-0.678, 0.426, 0.958),
}
_BIAS: Final = -1.573
_WEIGHTS_BLIND: Final[dict[str, tuple[float, float, float]]] = {
    "distance": (-0.699, 0.825, 0.846),
    "displacement": (-1.105, -1.643, 1.455),
    "variance": (0.712, -0.055, 0.313),
    "class_spread": (-1.374, -0.043, 0.452),
    "structure": (1.011, -1.779, 2.232),
    "structure_gain": (0.675, 1.378, 2.551),
    "evenness": (-1.458, 0.898, 0.096),
}
_BIAS_BLIND: Final = -1.295


def diagnose(
    features: npt.ArrayLike, known: Known, frames: Sequence[FrameFacts] = (), *, refused: int = 0
) -> Diagnosis:
    """Say what kind of shift a window shows.

    Args:
        features: l2-normalised base features [n, d] of the samples since the onset, in order.
        known: The known world.
        frames: Facts of the same frames, n or none.
        refused: Further frames since the onset that were no picture at all: NaN, out of range.

    Raises:
        OodError: features are empty, not finite, of another dimension, or frames are not n.

    Example:
        >>> from ood.statistics import ClassStatistics
        >>> rng = np.random.default_rng(0)
        >>> world = Known([ClassStatistics.fit(rng.normal(size=(50, 4)), ["a"] * 50)],
        ...               rng.normal(size=(60, 4)))
        >>> diagnose(rng.normal(size=(3, 4)), world).kind
        <Kind.UNCLEAR: 'unclear'>
    """
    rows = check_features(features, dim=known.dim)
    if frames and len(frames) != len(rows):
        raise OodError(f"found facts of {len(frames)} frames for {len(rows)} samples")
    fault = _sensor_fault(frames, len(rows), known.limits, refused)
    if fault is not None:
        return fault
    if len(rows) < MIN_SAMPLES:
        said = f"{len(rows)} samples are too few to tell; {MIN_SAMPLES} are needed"
        return Diagnosis(Kind.UNCLEAR, 0.5, (said,), {"samples": float(len(rows))})
    distances = known.mixture.head.distances(rows)
    scores, nearest = distances.min(axis=1), distances.argmin(axis=1)
    p_values = known.calibration.p_values(scores)
    prior = _prior_change(scores, nearest, known)
    if prior is not None:
        return prior
    return _new_or_moved(rows, scores, p_values, known, frames)


def measures(
    rows: FloatArray, scores: FloatArray, known: Known, frames: Sequence[FrameFacts] = ()
) -> dict[str, float]:
    """The numbers that new classes and a new look are told apart by, none with a unit."""
    moved = known.moved_back(rows)
    scale = max(float(known.structure(known.features).std()), _FLOOR)
    centre = float(known.structure(known.features).mean())
    before, after = known.structure(rows), known.structure(moved)
    answered = np.bincount(
        known.mixture.head.distances(moved).argmin(axis=1),
        minlength=len(known.mixture.head.components),
    )
    share = answered[answered > 0] / len(rows)
    classes = len(known.mixture.head.components)
    shift = rows.mean(axis=0) - known.features.mean(axis=0)
    spread = max(known.features.var(axis=0).sum(), _FLOOR)
    variance = rows.var(axis=0, ddof=1)
    found = {
        "distance": _log(scores.mean() / max(known.scores.mean(), _FLOOR)),
        "displacement": _log(
            max(shift @ shift - variance.sum() / len(rows), 0.0) / spread, floor=0.01
        ),
        "variance": _log(variance.sum() / spread),
        "class_spread": _log(known.spread(rows) / max(known.spread(known.features), _FLOOR)),
        "structure": float(np.clip((after.mean() - centre) / scale, -6, 6)),
        "structure_gain": float(np.clip((after - before).mean() / scale, -6, 6)),
        "evenness": float(-(share * np.log(share)).sum() / np.log(max(classes, 2))),
    }
    if frames and known.frames:
        found |= _look(frames, known.frames)
    return found


def _look(frames: Sequence[FrameFacts], known: Sequence[FrameFacts]) -> dict[str, float]:
    """By how much the median frame looks different, in known standard deviations, as logarithms."""
    found, former = _looks(frames), _looks(known)
    unit = np.sqrt(former.var(axis=0) + 0.02)
    shifts = np.abs(np.median(found, axis=0) - np.median(former, axis=0)) / unit
    names = ("look_contrast", "look_grain")
    return {name: float(np.log(0.2 + shift)) for name, shift in zip(names, shifts, strict=True)}


def _looks(frames: Sequence[FrameFacts]) -> FloatArray:
    return np.array(
        [
            (
                np.log(frame.spread + 4.0),
                np.log((frame.grain + 0.2) / (frame.detail + 0.5)),
            )
            for frame in frames
        ]
    )


def _sensor_fault(
    frames: Sequence[FrameFacts], samples: int, limits: Limits, refused: int
) -> Diagnosis | None:
    found = [what for what in limits.faults(frames) if what] + ["no picture"] * refused
    share = len(found) / (samples + refused)
    if share < FAULTY_SHARE:
        return None
    counts = {what: found.count(what) for what in sorted(set(found))}
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    evidence = (f"of {samples + refused} frames since the onset: {said}", "check the sensor")
    numbers = {what.replace(" ", "_"): float(count) for what, count in counts.items()}
    numbers |= {"frames": float(samples + refused), "faulty_share": share}
    return Diagnosis(Kind.SENSOR_FAULT, max(share, 0.5), evidence, numbers)


def _prior_change(
    scores: FloatArray, nearest: npt.NDArray[np.int64], known: Known
) -> Diagnosis | None:
    foreign = float((known.conditional_p_values(scores, nearest) <= FOREIGN_P).mean())
    if foreign > _KNOWN_SHARE:
        return None
    classes = len(known.mixture.head.components)
    p_value = _proportions_differ(nearest, known.nearest, classes)
    if p_value > _PRIOR_P:
        return None
    now = np.bincount(nearest, minlength=classes) / len(nearest)
    then = np.bincount(known.nearest, minlength=classes) / len(known.nearest)
    most = int((now - then).argmax())
    label = known.mixture.head.components[most][1]
    evidence = (
        (
            f"given the class they are answered as, {foreign:.0%} of the samples look foreign, as"
            f" known ones do ({FOREIGN_P:.0%} on average)"
        ),
        (
            f"the classes' proportions differ (p = {p_value:.3f}): most of all {label!r}, "
            f"{then[most]:.0%} before and {now[most]:.0%} now"
        ),
    )
    numbers = {"foreign_given_class": foreign, "proportions_p_value": p_value}
    return Diagnosis(Kind.PRIOR_CHANGE, 1.0 - p_value, evidence, numbers)


def _proportions_differ(
    now: npt.NDArray[np.int64], then: npt.NDArray[np.int64], classes: int
) -> float:
    """The p-value of a G-test that both were drawn alike, by permutation of who is which."""
    rng = np.random.default_rng(0)
    both = np.concatenate([now, then])
    total = np.bincount(both, minlength=classes)

    def statistic(first: npt.NDArray[np.int64]) -> float:
        counts = np.bincount(first, minlength=classes)
        rest = total - counts
        return sum(float((c[c > 0] * np.log(c[c > 0])).sum()) for c in (counts, rest))

    observed = statistic(now)
    least = observed - 1e-9 * abs(observed)
    drawn = [statistic(rng.permutation(both)[: len(now)]) for _ in range(_PERMUTATIONS)]
    return (1 + sum(value >= least for value in drawn)) / (_PERMUTATIONS + 1)


def _new_or_moved(
    rows: FloatArray,
    scores: FloatArray,
    p_values: FloatArray,
    known: Known,
    frames: Sequence[FrameFacts],
) -> Diagnosis:
    found = measures(rows, scores, known, frames)
    sighted = "look_grain" in found
    weights, bias = (_WEIGHTS, _BIAS) if sighted else (_WEIGHTS_BLIND, _BIAS_BLIND)
    parts = {
        name: weight * (found[name] - centre) / unit
        for name, (weight, centre, unit) in weights.items()
    }
    value = sum(parts.values()) + bias
    new = 1.0 / (1.0 + float(np.exp(-np.clip(value, -30, 30))))
    foreign = p_values <= FOREIGN_P
    numbers = found | {"foreign": float(foreign.mean()), "new_classes": new}
    sign = 1.0 if new >= 0.5 else -1.0
    strongest = sorted(parts, key=lambda name: -sign * parts[name])[:3]
    evidence = [
        f"{foreign.mean():.0%} of {len(rows)} samples look foreign ({FOREIGN_P:.0%} would anyway)",
        *(_WORDS[name].format(value=found[name], times=np.exp(found[name])) for name in strongest),
    ]
    if new < 0.5:
        return Diagnosis(Kind.DOMAIN_SHIFT, 1.0 - new, tuple(evidence), numbers)
    groups: tuple[Cluster, ...] = ()
    if foreign.any():
        places = np.flatnonzero(foreign)
        groups = clusters(
            rows[places], places, means=known.means, labels=known.labels, scatter=known.scatter
        )
    evidence += [
        f"{group.size} samples form a group {group.distance:.1f} class spreads from the nearest "
        f"class, {group.nearest!r}"
        for group in groups[:3]
    ]
    return Diagnosis(Kind.NEW_CLASSES, new, tuple(evidence), numbers, groups)


_WORDS: Final = {
    "distance": "the nearest class is {times:.2f} times as far as it is for known samples",
    "displacement": "all samples moved together by {times:.2f} of the known variance",
    "variance": "the samples vary {times:.2f} times as much as known ones",
    "class_spread": "in the directions that tell the classes apart they vary {times:.2f} "
    "times as much as known ones",
    "structure": "moved back to where known samples lie, they show the known classes by "
    "{value:.1f} standard deviations of known samples",
    "structure_gain": "moving them back makes them show the known classes more by {value:.1f} "
    "standard deviations of known samples",
    "evenness": "moved back, they spread over the known classes to {value:.0%} of an even spread",
    "look_contrast": "the frames' contrast lies {times:.1f} known standard deviations off",
    "look_grain": "the frames' sharpness lies {times:.1f} known standard deviations off",
}


def _log(value: float, *, floor: float = 0.001) -> float:
    return float(np.log(max(float(value), floor)))
