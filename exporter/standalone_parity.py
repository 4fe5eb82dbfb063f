"""Does a model of a whole generation say what the device says?

A pure comparison of answers; who gave them is the caller's. A model that differs by more than the
tolerances here is not written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from exporter.errors import ParityError
from exporter.parity import QUANTILES
from exporter.standalone import ADAPTER, LABEL, P_VALUE, PROBABILITIES, SCORE
from ood.calibration import Calibration

PROBABILITY_TOLERANCE: Final = 1e-3
"""Most that a probability may differ: a device's own batches of other sizes move it as far."""
SCORE_TOLERANCE: Final = 2e-3
"""Most that an OOD score may differ, relative to one more than its size: float32's."""
EVIDENCE_TOLERANCE: Final = 2e-3
"""Most that log-likelihoods may differ, likewise: it moves a probability by a quarter of that."""

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a device says of samples.

    Attributes:
        label: int64 [n], the index of each label.
        probability: float [n], that label's probability.
        adapter: int64 [n], the index of the bundle whose adapter decided; -1 where none did.
        score: float [n], OOD scores.
        evidence: What the decisions rest on, by the names of a model's outputs, float [n, m]; NaN
            where nothing was asked.
    """

    label: npt.NDArray[np.int64]
    probability: Floats
    adapter: npt.NDArray[np.int64]
    score: Floats
    evidence: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """How far values differ: the largest difference, and the quantiles at `QUANTILES`."""

    largest: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, differences: Floats) -> Spread:
        """The spread of absolute differences [n], n at least 1."""
        values = (float(value) for value in np.quantile(differences, QUANTILES))
        return cls(float(np.max(differences)), tuple(values))


@dataclass(frozen=True)
class StandaloneReport:
    """The outcome of one comparison.

    Attributes:
        what: The samples compared, in words.
        samples: How many they were.
        probability: How far the probability of the device's label differs.
        score: How far OOD scores differ, relative to one more than their size; None for a model
            without a score.
        evidence: The same of the log-likelihoods that decisions rest on; None where only answers
            are known.
        labels_changed: Samples with another label, all of them ties within the tolerance.
        adapters_changed: Samples with another adapter, likewise.
        adapted: Samples that an adapter decided.
    """

    what: str
    samples: int
    probability: Spread
    score: Spread | None
    evidence: Spread | None
    labels_changed: int
    adapters_changed: int
    adapted: int

    def lines(self) -> Iterator[str]:
        """The report in words."""
        yield (
            f"{self.what}: probabilities differ by {_spread(self.probability)}; "
            f"{self.labels_changed} of {self.samples} labels and {self.adapters_changed} adapters "
            f"changed, {self.adapted} were decided by an adapter"
        )
        for name, spread in (("scores", self.score), ("log-likelihoods", self.evidence)):
            if spread is not None:
                yield f"{self.what}: {name} differ by {_spread(spread)} of their size"


def compared(
    what: str,
    reference: Answers,
    found: Mapping[str, npt.NDArray[Any]],
    calibration: Calibration | None,
) -> StandaloneReport:
    """Compares a model's outputs with a device's answers.

    Args:
        what: The samples, in words.
        reference: The device's answers, n at least 1.
        found: The model's outputs by name.
        calibration: What p-values are of; None for a model without a score.

    Raises:
        ParityError: Something differs by more than its tolerance.
    """
    rows = np.arange(len(reference.label))
    difference = np.abs(found[PROBABILITIES][rows, reference.label] - reference.probability)
    _check(what, "probability", difference, PROBABILITY_TOLERANCE)
    evidence = None
    for name, values in reference.evidence.items():
        relative = np.abs(found[name] - values) / (1.0 + np.abs(values))
        largest = np.where(np.isnan(values), 0.0, relative).max(axis=1)
        _check(what, name.replace("_", " "), largest, EVIDENCE_TOLERANCE)
        evidence = largest if evidence is None else np.maximum(evidence, largest)
    scores = None
    if calibration is not None:
        size = 1.0 + np.abs(reference.score)
        relative = np.abs(found[SCORE] - reference.score) / size
        _check(what, "OOD score", relative, SCORE_TOLERANCE)
        scores = Spread.of(relative)
        _check_p_values(what, found[P_VALUE], reference.score, SCORE_TOLERANCE * size, calibration)
    labels, adapters = found[LABEL] != reference.label, found[ADAPTER] != reference.adapter
    return StandaloneReport(
        what=what,
        samples=len(rows),
        probability=Spread.of(difference),
        score=scores,
        evidence=None if evidence is None else Spread.of(evidence),
        labels_changed=int(np.count_nonzero(labels)),
        adapters_changed=int(np.count_nonzero(adapters)),
        adapted=int(np.count_nonzero(reference.adapter >= 0)),
    )


def _check(what: str, name: str, difference: Floats, tolerance: float) -> None:
    if not (difference <= tolerance).all():
        raise ParityError(
            f"the model's {name} differs from the device's by {np.max(difference):.3g} on "
            f"{what} ({np.count_nonzero(~(difference <= tolerance))} of {len(difference)} samples "
            f"beyond the tolerance of {tolerance:g}); nothing was written"
        )


def _check_p_values(
    what: str, found: Floats, scores: Floats, reach: Floats, calibration: Calibration
) -> None:
    """A p-value steps where a score passes one of the calibration's, so it is bounded by both."""
    step = 0.5 / (len(calibration.scores) + 1)
    low = calibration.p_values(scores + reach) - step
    high = calibration.p_values(scores - reach) + step
    outside = ~((found > low) & (found < high))
    if outside.any():
        raise ParityError(
            f"the model's p-value is not the device's for {np.count_nonzero(outside)} of "
            f"{len(found)} samples ({what}); nothing was written"
        )


def _spread(spread: Spread) -> str:
    median, _, most = spread.quantiles
    return f"{spread.largest:.2g} at most, half of them by {median:.1g}, 99 % by {most:.1g}"
