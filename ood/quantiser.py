"""Rows of numbers as a few bits each: the scalar quantiser behind statistics and adapter codecs.

Every row has one float16 step; a number is a whole number and a half of steps, so one bit is a
sign. Called by `ood.compact` and `adapter_store.codecs`; holds no state and reads no file.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.validation import FloatArray

MAX_BITS: Final = 8

# The best step for normal numbers at 1..8 bits, in standard deviations: Max, "Quantizing for
# minimum distortion" (1960), table II.
_NORMAL_STEP: Final = (1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
# The mean squared error it leaves, of a variance of 1; a number that is not sent at all leaves 1.
NORMAL_ERROR: Final = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.0003, 0.00009)
_TRIALS: Final = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
_REFINEMENTS: Final = 3


def quantise_rows(
    rows: npt.NDArray[np.floating[Any]], bits: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Choose for each row the step of least squared error among a few, and round to it.

    A number x becomes the code k with x ≈ (k − (2^bits − 1) / 2) · step. The steps tried are that
    of normal numbers of the row's size and its multiples, and the one that clips nothing; each
    trial is then improved by turns of least squares for the step and nearest code (Lloyd 1982). At
    one bit this is the sign times the mean magnitude.

    Args:
        rows: finite [n, d].
        bits: 1..8.

    Returns:
        Codes uint8 [n, d] and steps float16 [n]; a row of zeros has step 0.

    Raises:
        OodError: a row is too large for a float16 step.
    """
    values = rows.astype(np.float64)
    half = (2**bits - 1) / 2
    size = np.sqrt(np.square(values).mean(axis=1))
    trials = [_NORMAL_STEP[bits - 1] * factor * size for factor in _TRIALS]
    trials.append(np.abs(values).max(axis=1) / half)
    best_error = np.full(len(values), np.inf)
    best_step = np.zeros(len(values), dtype=np.float16)
    for trial in trials:
        step = trial
        for _ in range(_REFINEMENTS):
            levels = _levels(values, step, half)
            step = np.abs((levels * values).sum(axis=1)) / np.square(levels).sum(axis=1)
        with np.errstate(over="ignore"):
            rounded = step.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise OodError(f"numbers as large as {np.abs(values).max():g} do not fit this codec")
        exact = rounded.astype(np.float64)
        error = np.square(_levels(values, exact, half) * exact[:, None] - values).sum(axis=1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_step = np.where(better, rounded, best_step)
    levels = _levels(values, best_step.astype(np.float64), half)
    return (levels + half).astype(np.uint8), best_step


def restore_rows(
    codes: npt.NDArray[np.uint8], steps: npt.NDArray[np.float16], bits: int
) -> npt.NDArray[np.float32]:
    """Return what the codes stand for, float32 [n, d]; exact, so equal on every machine."""
    half = np.float32((2**bits - 1) / 2)
    result: npt.NDArray[np.float32] = (codes.astype(np.float32) - half) * steps.astype(np.float32)[
        :, None
    ]
    return result


def packed_size(rows: int, columns: int, bits: int) -> int:
    """Return the bytes of packed codes: every row begins at a whole byte."""
    return rows * ((columns * bits + 7) // 8)


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Write codes [n, d] with so many bits each, the highest bit first."""
    flags = np.unpackbits(codes[:, :, None], axis=2)[:, :, MAX_BITS - bits :]
    return np.packbits(flags.reshape(len(codes), -1), axis=1).tobytes()


def unpack_codes(data: bytes, rows: int, columns: int, bits: int) -> npt.NDArray[np.uint8]:
    """Read what `pack_codes` wrote: uint8 [rows, columns].

    Raises:
        OodError: the bytes are not as many as the shape needs.
    """
    needed = packed_size(rows, columns, bits)
    if len(data) != needed:
        raise OodError(f"codes [{rows}, {columns}] of {bits} bits need {needed} bytes")
    packed = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
    flags = np.unpackbits(packed, axis=1, count=columns * bits).reshape(rows, columns, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    result: npt.NDArray[np.uint8] = (flags * weights).sum(axis=2, dtype=np.uint8)
    return result


def _levels(values: FloatArray, step: FloatArray, half: float) -> FloatArray:
    """The nearest multiple and a half of each row's step, in steps."""
    scaled = values / np.where(step > 0, step, 1.0)[:, None]
    result: FloatArray = np.clip(np.floor(scaled) + 0.5, -half, half)
    return result
