"""What kind of shift is it? A broken sensor, a new look, new classes, or other proportions.

The agent asks when an episode is confirmed, with the window of samples since the onset; benchmarks
ask for pairs of worlds. Pure: statistics, features and pixel facts in, a diagnosis with its
evidence out. What follows from it is the episode's to decide.

Asked in this order. *Sensor fault*: many frames are black, saturated, blank, partly dead or shown
before (`ood.frames`). *Prior change*: given the class each sample is answered as, scores look
known, and the classes' proportions differ from the calibration's (a G-test by permutation; Sokal
and Rohlf, "Biometry", 1995, section 17.2). *New classes or domain shift*: a logistic function of
a few numbers that have no unit (`ood.measures`); its weights were fitted to worlds of their own
(`benchmarks/kind_weights.py`).
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
from ood.measures import FOREIGN_P, measures
from ood.validation import FloatArray, check_features

MIN_SAMPLES: Final = 16
# A window with this share of faulty frames is a sensor's fault.
FAULTY_SHARE: Final = 0.2
# Conditional on its class, this share of known samples or less looks foreign.
_KNOWN_SHARE: Final = 0.2
# Windows that look known are hardly anything else, so that this need not be strict.
_PRIOR_P: Final = 0.1
_PERMUTATIONS: Final = 499
# No single number outweighs all others.
_LIMIT: Final = 3.0


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


# name: (weight, what it is subtracted by, what it is divided by). By benchmarks/kind_weights.py.
_WEIGHTS: Final[dict[str, tuple[float, float, float]]] = {
    "foreign": (-0.340, 0.646, 0.270),
    "displacement": (-1.226, -0.924, 1.483),
    "covariance": (-0.920, 0.438, 0.226),
    "margin": (-0.802, -0.602, 0.444),
    "alignment": (-1.026, 0.437, 0.242),
    "far_alignment": (-0.617, 0.315, 0.198),
    "look_scale": (-1.121, -0.495, 0.125),
    "look_floor": (-0.753, 0.039, 0.714),
    "floor": (-0.792, 23.905, 28.326),
    "look_noise": (0.188, 0.123, 1.374),
    "look_chroma": (-0.744, -0.042, 0.885),
}
_BIAS: Final = -0.211
_WEIGHTS_BLIND: Final[dict[str, tuple[float, float, float]]] = {
    "foreign": (-0.124, 0.646, 0.270),
    "displacement": (-1.702, -0.924, 1.483),
    "covariance": (-1.012, 0.438, 0.226),
    "margin": (-0.591, -0.602, 0.444),
    "alignment": (-0.835, 0.437, 0.242),
    "far_alignment": (-0.568, 0.315, 0.198),
}
_BIAS_BLIND: Final = -0.072


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
    return _new_or_moved(rows, p_values <= FOREIGN_P, known, frames)


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
    foreign: npt.NDArray[np.bool_],
    known: Known,
    frames: Sequence[FrameFacts],
) -> Diagnosis:
    found = measures(rows, known, frames)
    sighted = all(name in found for name in _WEIGHTS)
    weights, bias = (_WEIGHTS, _BIAS) if sighted else (_WEIGHTS_BLIND, _BIAS_BLIND)
    parts = {
        name: weight * min(max((found[name] - centre) / unit, -_LIMIT), _LIMIT)
        for name, (weight, centre, unit) in weights.items()
    }
    value = sum(parts.values()) + bias
    new = 1.0 / (1.0 + float(np.exp(-np.clip(value, -30, 30))))
    numbers = found | {"new_classes": new}
    sign = 1.0 if new >= 0.5 else -1.0
    strongest = sorted(_WORDS.keys() & parts.keys(), key=lambda name: -sign * parts[name])[:3]
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
    "displacement": "all samples moved together by {times:.2f} of the known variance",
    "covariance": "the samples vary in the directions that known ones do to {value:.0%}",
    "margin": "moved back to where known samples lie, the nearest class is nearer than the next by "
    "{times:.2f} times what it is for known samples",
    "alignment": "the samples answered alike lie towards that class's mean with cosine {value:.2f}",
    "far_alignment": "the farther half, moved back to where known samples lie, lies towards the "
    "means of the classes it is answered as with cosine {value:.2f}",
    "look_scale": "the frames differ over one pixel {times:.2f} times as much as over two",
    "look_floor": "the darkest parts of the frames are brighter than known ones by the signed "
    "logarithm {value:+.1f} of known standard deviations",
    "floor": "the darkest parts of the frames have the brightness {value:.0f} of 255",
    "look_noise": "the noise of the frames lies {times:.1f} known standard deviations off",
    "look_chroma": "the frames' noise of colour lies {times:.1f} known standard deviations off",
}
