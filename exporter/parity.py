"""Does every exported form of a suffix compute what torch computes?

Runs one adapter through the captured program in torch and through every form that a device or
another runtime may run it in, and compares. Exports and trainings call it before they are believed.
Needs torch and ONNX.

A quantised encoder's program is its original's: there the forms have to agree with each other, and
with torch only so far as that something else would be noticed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.adapter_files import AttachedAdapter, write_adapter
from exporter.attach import attach
from exporter.bank import AdapterBank, BankSuffix
from exporter.errors import EncoderError, ParityError
from exporter.fold import Folder
from exporter.package import EncoderPackage
from exporter.programs import reference_features
from exporter.sessions import (
    EncoderSessions,
    check_tensors,
    in_batches,
    rows_at_once,
    session_options,
)

Array = npt.NDArray[np.float32]
Tensors = Mapping[str, Array]
Decide = Callable[[Array], npt.NDArray[Any]]

TOLERANCE = 1e-4
QUANTISED_TOLERANCE = 0.5
"""Most that a quantised suffix may differ from torch: root mean square, relative."""
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
        forms: The difference of each form: `fed` (the serving session with the adapter's
            tensors), `attached` (the same with an adapter file), `bank` (one row's adapter of
            several), `folded` (in the encoder's weights) and `standalone` (a graph of its own).
        left_out: Forms that refuse this adapter themselves, and why: nobody can run them.
    """

    samples: int
    forms: Mapping[str, Difference]
    left_out: Mapping[str, str]

    @property
    def largest(self) -> float:
        """The largest difference of any form."""
        return max(form.largest for form in self.forms.values())


def parity(
    package: EncoderPackage,
    family: str,
    tensors: Tensors,
    hidden: Array,
    *,
    forms: Collection[str] | None = None,
    decide: Decide | None = None,
    tolerance: float = TOLERANCE,
) -> ParityReport:
    """Compares every form of an adapted suffix with torch.

    Args:
        package: The encoder.
        family: The adapter's family.
        tensors: The adapter's tensors.
        hidden: Values from the prefix, float32 [n, *package.hidden_shape], n at least 1.
        forms: The forms to compare, by their names in `ParityReport.forms`; all when absent, which
            takes memory for a session each.
        decide: Turns features [n, d] into one decision a sample, as a head does. When absent,
            a decision is which other sample torch's features put nearest.
        tolerance: The largest difference that is accepted.

    Raises:
        EncoderError: The tensors are not this encoder's.
        ParityError: A form differs by more than the tolerance, or is not finite.
    """
    if not len(hidden):
        raise ParityError("parity needs at least one sample")
    check_tensors(package, family, tensors)
    reference = reference_features(package, family, hidden, tensors)
    sessions = EncoderSessions(package)
    found, left_out = {}, {}
    for name in _FORMS if forms is None else forms:
        try:
            found[name] = _FORMS[name](sessions, family, tensors, hidden)
        except (EncoderError, ParityError) as error:
            left_out[name] = str(error)
    against = "torch"
    if package.manifest.quantised is not None and "fed" in found:
        _check_quantised(package, found["fed"], reference)
        reference, against = found["fed"], "the serving session"
    choose = decide or _nearest_other(reference)
    differences = {name: _difference(reference, rows, choose) for name, rows in found.items()}
    for name, difference in differences.items():
        if not difference.largest <= tolerance:
            raise ParityError(
                f"the {name} suffix of {package.name!r} differs from {against} by "
                f"{difference.largest:.3g} of the features' size on {len(hidden)} samples, "
                f"the tolerance is {tolerance:g}"
            )
    return ParityReport(len(hidden), differences, left_out)


def _fed(sessions: EncoderSessions, family: str, tensors: Tensors, hidden: Array) -> Array:
    return sessions.suffix(hidden, tensors, family)


def _attached(sessions: EncoderSessions, family: str, tensors: Tensors, hidden: Array) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(sessions.package, family, tensors, Path(folder))
        return AttachedAdapter(sessions, family, path).run(hidden)


def _bank(sessions: EncoderSessions, family: str, tensors: Tensors, hidden: Array) -> Array:
    # Beside one that is only half as strong, so that the wrong row's adapter would show.
    weaker = {name: value * np.float32(0.5) for name, value in tensors.items()}
    bank = AdapterBank(sessions.package, family, [weaker, tensors])
    return BankSuffix(sessions, family).run(hidden, bank, np.ones(len(hidden), np.int64))


def _folded(sessions: EncoderSessions, family: str, tensors: Tensors, hidden: Array) -> Array:
    return Folder(sessions).fold(family, tensors).run(hidden)


def _standalone(sessions: EncoderSessions, family: str, tensors: Tensors, hidden: Array) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        path = attach(sessions.package, tensors, Path(folder) / "suffix.onnx", family=family)
        session = onnxruntime.InferenceSession(
            path, session_options(), providers=["CPUExecutionProvider"]
        )
    return in_batches(
        lambda part: session.run(None, {"hidden": np.ascontiguousarray(hidden[part])})[0],
        len(hidden),
        (sessions.package.suffix_dim,),
        at_once=rows_at_once(sessions.package),
    )


_FORMS: dict[str, Callable[[EncoderSessions, str, Tensors, Array], Array]] = {
    "fed": _fed,
    "attached": _attached,
    "bank": _bank,
    "folded": _folded,
    "standalone": _standalone,
}


def _check_quantised(package: EncoderPackage, found: Array, torchs: Array) -> None:
    change = float(np.linalg.norm(found.astype(np.float64) - torchs) / np.linalg.norm(torchs))
    if not change <= QUANTISED_TOLERANCE:
        raise ParityError(
            f"the suffix of the quantised {package.name!r} differs from torch's by {change:.2g} of "
            f"the features' size, the tolerance is {QUANTISED_TOLERANCE:g}; train the adapter on "
            "the original, or quantise by another method"
        )


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
