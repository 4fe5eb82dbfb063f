"""Does every exported form of a suffix compute what torch computes?

Runs one adapter through the captured program in torch, through the serving session with the adapter
fed, and through a standalone graph with the adapter inside, and compares. Exports call it before
they are believed. Needs torch and ONNX.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.attach import attach
from exporter.errors import ParityError
from exporter.package import EncoderPackage
from exporter.programs import reference_features
from exporter.sessions import EncoderSessions, session_options

Array = npt.NDArray[np.float32]
Decide = Callable[[Array], npt.NDArray[Any]]

TOLERANCE = 1e-4
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Difference:
    """How far one form is from torch.

    Differences are absolute, divided by the root mean square of torch's features.

    Attributes:
        largest: The largest difference of any feature.
        quantiles: The differences' quantiles, at `QUANTILES`.
        decisions_changed: Samples that are decided otherwise.
    """

    largest: float
    quantiles: tuple[float, ...]
    decisions_changed: int


@dataclass(frozen=True)
class ParityReport:
    """The outcome of one comparison.

    Attributes:
        samples: How many samples were compared.
        forms: The difference of each form: `fed` (the serving session) and `attached` (the
            standalone graph).
    """

    samples: int
    forms: Mapping[str, Difference]

    @property
    def largest(self) -> float:
        """The largest difference of any form."""
        return max(form.largest for form in self.forms.values())


def parity(
    package: EncoderPackage,
    family: str,
    tensors: Mapping[str, Array],
    hidden: Array,
    *,
    decide: Decide | None = None,
    tolerance: float = TOLERANCE,
) -> ParityReport:
    """Compares every form of an adapted suffix with torch.

    Args:
        package: The encoder.
        family: The adapter's family.
        tensors: The adapter's tensors.
        hidden: Values from the prefix, float32 [n, *package.hidden_shape], n at least 1.
        decide: Turns features [n, d] into one decision a sample, as a head does. When absent,
            a decision is which other sample torch's features put nearest.
        tolerance: The largest difference that is accepted.

    Raises:
        ParityError: A form differs by more than the tolerance, or is not finite.
    """
    if not len(hidden):
        raise ParityError("parity needs at least one sample")
    reference = reference_features(package, family, hidden, tensors)
    forms = {"fed": EncoderSessions(package).suffix(hidden, tensors, family)}
    with tempfile.TemporaryDirectory() as folder:
        path = attach(package, tensors, Path(folder) / "suffix.onnx", family=family)
        session = onnxruntime.InferenceSession(
            path, session_options(), providers=["CPUExecutionProvider"]
        )
        forms["attached"] = session.run(None, {"hidden": hidden})[0]
    choose = decide or _nearest_other(reference)
    differences = {name: _difference(reference, found, choose) for name, found in forms.items()}
    for name, difference in differences.items():
        if not difference.largest <= tolerance:
            raise ParityError(
                f"the {name} suffix of {package.name!r} differs from torch by "
                f"{difference.largest:.3g} of the features' size on {len(hidden)} samples, "
                f"the tolerance is {tolerance:g}"
            )
    return ParityReport(len(hidden), differences)


def _difference(reference: Array, found: Array, decide: Decide) -> Difference:
    size = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))) or 1.0
    difference = np.abs(found.astype(np.float64) - reference) / size
    changed = int(np.count_nonzero(decide(found) != decide(reference)))
    quantiles = tuple(float(value) for value in np.quantile(difference, QUANTILES))
    return Difference(float(np.max(difference)), quantiles, changed)


def _nearest_other(reference: Array) -> Decide:
    def decide(features: Array) -> npt.NDArray[np.intp]:
        squares = np.square(features[:, None] - reference[None]).sum(-1)
        np.fill_diagonal(squares, np.inf)
        nearest: npt.NDArray[np.intp] = squares.argmin(1)
        return nearest

    return decide
