"""Does a provider compute what the CPU does? One look, when a session of it is made.

Providers fail silently: one returns no rows, another computes in fewer bits than were asked for.
`exporter.sessions` compares each session that is not the CPU's with the CPU's on made-up inputs,
and takes the next provider when they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.package import EncoderPackage

# What features may differ by, relative to their size; as exports are compared with torch.
TOLERANCE: Final = 1e-4

Feeds = dict[str, npt.NDArray[Any]]

_SEED: Final = 20_240_229
_ROWS: Final = 3
# What a graph leaves open beside the rows: an adapter's rank, a bank's adapters.
_SIZES: Final = (4, 1)
_TYPES: Final[Mapping[str, npt.DTypeLike]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}


def tolerance(package: EncoderPackage) -> float:
    """What features of an encoder may differ by between two ways to run it, relative to their size.

    Two ways to run an int8 graph round differently; they may do so by what quantising changed.
    """
    quantised = package.manifest.quantised
    return TOLERANCE if quantised is None else max(TOLERANCE, quantised.difference)


def difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The root mean square of the difference, relative to what is expected.

    Infinite where the shapes differ or a number is not finite.
    """
    if found.shape != expected.shape:
        return float("inf")
    wanted = expected.astype(np.float64)
    off = float(np.linalg.norm(found.astype(np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))
    return off if np.isfinite(off) else float("inf")


def problem(
    session: onnxruntime.InferenceSession,
    reference: onnxruntime.InferenceSession,
    *,
    tolerance: float,
    at_once: int,
) -> str | None:
    """What is wrong with a session; None when it computes what the reference does.

    Args:
        session: The one to look at.
        reference: A session of the same graph on the CPU; its inputs may have defaults.
        tolerance: What the outputs may differ by, relative to their size.
        at_once: How many rows it may be run on at once.
    """
    batch = reference.get_inputs()[0].shape[0]
    with_rows = {entry.name for entry in reference.get_inputs() if entry.shape[:1] == [batch]}
    for feeds in _probes(reference, with_rows):
        expected = _in_parts(reference, feeds, with_rows, 1)
        # Alone and together: a row's answer must not depend on its neighbours.
        for rows in {1, min(at_once, _ROWS)}:
            found = _in_parts(session, {**neutral(session), **feeds}, with_rows, rows)
            off = difference(found, expected)
            if found.shape != expected.shape:
                return f"it gives {list(found.shape)}, the CPU {list(expected.shape)}"
            if not off <= tolerance:
                return (
                    f"it differs from the CPU by {off:.2g} of the result, the tolerance is "
                    f"{tolerance:.2g}"
                )
    return None


def neutral(session: onnxruntime.InferenceSession) -> Feeds:
    """What an adapter's inputs take where they have no defaults and there is no adapter.

    Zeros for every input but the first, which change nothing; of rank 1, because OpenVINO computes
    something else with tensors of size 0. Nothing for a session whose inputs have defaults.
    """
    return {
        entry.name: np.zeros([a if isinstance(a, int) else 1 for a in entry.shape], np.float32)
        for entry in session.get_inputs()[1:]
    }


def _in_parts(
    session: onnxruntime.InferenceSession, feeds: Feeds, with_rows: set[str], rows: int
) -> npt.NDArray[Any]:
    parts = [
        {n: v[at : at + rows] if n in with_rows else v for n, v in feeds.items()}
        for at in range(0, _ROWS, rows)
    ]
    return np.concatenate([session.run(None, part)[0] for part in parts])


def _probes(session: onnxruntime.InferenceSession, with_rows: set[str]) -> Iterator[Feeds]:
    rng = np.random.default_rng(_SEED)
    inputs, adapter = session.get_inputs(), session.get_overridable_initializers()

    def made(entry: Any, size: int) -> npt.NDArray[Any]:
        shape = [axis if isinstance(axis, int) else size for axis in entry.shape]
        if entry.name in with_rows:
            shape[0] = _ROWS
        dtype = np.dtype(_TYPES[entry.type])
        whole = dtype.kind == "i"
        return np.zeros(shape, dtype) if whole else rng.normal(scale=0.5, size=shape).astype(dtype)

    for size in _SIZES:
        yield {entry.name: made(entry, size) for entry in [*inputs, *adapter]}
    if adapter:
        yield {entry.name: made(entry, 1) for entry in inputs}
