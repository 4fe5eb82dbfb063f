"""Class statistics as they travel: under 4 KB a class at 192 dimensions.

Called by the bundle format. In memory statistics stay exact; here the means become six bits a
number and the scatter a few coarse factors and a diagonal. Trusts nothing it reads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.quantiser import (
    MAX_BITS,
    NORMAL_ERROR,
    pack_codes,
    packed_size,
    quantise_rows,
    restore_rows,
    unpack_codes,
)
from ood.statistics import ClassStatistics
from ood.validation import FloatArray

MAX_DIM: Final = 2048

_MAGIC: Final = b"DKC1"
# magic, dimension, classes, factors, trace of the scatter.
_HEADER: Final = struct.Struct("<4sHHHd")
# For each dimension the classes' means around their centre; six bits cost nothing measurable.
_MEAN_BITS: Final = 6
_MAX_TRACE: Final = 1e15
_ITERATIONS: Final = 6
# How much of a direction's worth is by what it holds of the differences between the class means;
# the rest is by its variance, so that other bundles' classes are served too.
_MEANS_SHARE: Final = 0.75
# The part of a feature's variance that is never left to the factors while they are sought: without
# it a feature that the others nearly determine would take all of them. With few samples for the
# dimension it is larger, for then the others seem to determine every feature.
_LEAST_UNIQUE: Final = (0.1, 0.3)
_UNIQUE_PER_SAMPLE: Final = 0.04


def factor_bytes(classes: int, *, ten_classes: int = 22) -> int:
    """Return the bytes that factors may take for each dimension.

    Of the forms that ``benchmarks/statistics_size.py`` compares, this one loses least for its
    size; what it loses is told in ``docs/benchmarks/adapter_size.md``. One class gets what 4 KB a
    class leave it.

    Args:
        classes: how many classes the statistics are of.
        ten_classes: what up to ten classes get.
    """
    return min(14 * classes, ten_classes + max(0, classes - 10) * 8 // 5)


def to_bytes(statistics: ClassStatistics, *, budget: int | None = None) -> bytes:
    """Write statistics.

    The scatter S travels as a factor analysis of its correlations: S = A(I + RᵀR)A with A diagonal
    and few rows in R, the most likely ones by fixed-point iteration (Jöreskog 1967; Bishop 2006,
    section 12.2.4). Rows get bits by what they save: the next bit goes where it lowers the loss
    most (reverse water-filling, Cover and Thomas 2006, theorem 10.3.3), the loss being the
    divergence from S, and more so in directions in which the class means differ, for there a head
    looks. So strong directions are sent precisely, weak ones roughly, and the weakest not at all.
    A is left to the reader, who knows every variance: diagonal and trace come back whatever
    rounding did.

    Args:
        statistics: of features of about unit length.
        budget: bytes for each dimension that R may take; `factor_bytes` by default.

    Raises:
        OodError: the dimension, the number of classes or a number is too large for this form.
    """
    classes, dim = statistics.means.shape
    if dim > MAX_DIM or classes >= 2**16:
        raise OodError(
            f"statistics of {classes} classes in {dim} dimensions do not fit; at most "
            f"{2**16 - 1} classes in {MAX_DIM} dimensions"
        )
    trace = float(np.trace(statistics.scatter))
    if trace > _MAX_TRACE or np.abs(statistics.means).max() > np.finfo(np.float16).max:
        raise OodError("statistics are too large for their compact form; normalise the features")
    variances = np.diagonal(statistics.scatter)
    scale = variances.max()
    deviations = np.sqrt(variances / (scale if scale > 0 else 1.0)).astype(np.float16)
    centre = statistics.means.mean(axis=0).astype(np.float16)
    parts = [
        statistics.counts.astype("<i8").tobytes(),
        deviations.astype("<f2").tobytes(),
        centre.astype("<f2").tobytes(),
    ]
    if classes > 1:
        gaps = statistics.means - centre.astype(np.float64)
        codes, steps = quantise_rows(gaps.T, _MEAN_BITS)
        parts += [steps.astype("<f2").tobytes(), pack_codes(codes.reshape(1, -1), _MEAN_BITS)]
    factors, bits = _factors(statistics, factor_bytes(classes) if budget is None else budget)
    row_steps, packed = [], []
    for row, width in zip(factors, bits.tolist(), strict=True):
        codes_of_row, step = quantise_rows(row[None], width)
        row_steps.append(step)
        packed.append(pack_codes(codes_of_row, width))
    parts.append(bits.astype(np.uint8).tobytes())
    parts += [step.astype("<f2").tobytes() for step in row_steps]
    return _HEADER.pack(_MAGIC, dim, classes, len(bits), trace) + b"".join(parts + packed)


def from_bytes(labels: Sequence[str], data: bytes) -> ClassStatistics:
    """Read what `to_bytes` wrote, trusting nothing; sizes are checked before memory is taken.

    Whatever the bytes are, the scatter is positive semi-definite.

    Raises:
        OodError: the bytes are no statistics of these classes: wrong length, mark, range, or not
            finite.
    """
    if len(data) < _HEADER.size:
        raise OodError(f"compact statistics have {len(data)} bytes, too few for their header")
    magic, dim, classes, rows, trace = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise OodError(f"not statistics of a known version: they begin with {magic!r}")
    if classes != len(labels) or not 1 <= dim <= MAX_DIM or rows > dim or not classes:
        raise OodError(
            f"statistics declare {classes} classes, {dim} dimensions and {rows} factors; expected "
            f"{len(labels)} classes and at most {MAX_DIM} dimensions"
        )
    if not 0 <= trace <= _MAX_TRACE:
        raise OodError(f"statistics declare a scatter of trace {trace}")
    mean_bytes = packed_size(1, dim * classes, _MEAN_BITS) if classes > 1 else 0
    fixed = 8 * classes + (6 if classes > 1 else 4) * dim + mean_bytes + 3 * rows
    reader = _Reader(data, _HEADER.size)
    reader.need(fixed)
    counts = reader.take("<i8", classes).astype(np.int64)
    deviations = reader.floats(dim)
    means = np.tile(reader.floats(dim, signed=True), (classes, 1))
    if classes > 1:
        steps = reader.floats(dim).astype(np.float16)
        codes = unpack_codes(reader.bytes(mean_bytes), 1, dim * classes, _MEAN_BITS)
        means += restore_rows(codes.reshape(dim, classes), steps, _MEAN_BITS).T
    bits = reader.take("u1", rows)
    if ((bits < 1) | (bits > MAX_BITS)).any():
        raise OodError(f"factors of statistics have 1 to {MAX_BITS} bits")
    row_steps = reader.floats(rows)
    sizes = [packed_size(1, dim, int(width)) for width in bits]
    reader.need(sum(sizes), exactly=True)
    factors = np.zeros((rows, dim))
    for k, (width, size) in enumerate(zip(bits.tolist(), sizes, strict=True)):
        codes = unpack_codes(reader.bytes(size), 1, dim, width)
        factors[k] = restore_rows(codes, row_steps[k : k + 1].astype(np.float16), width)[0]
    squares = np.square(deviations)
    if trace > 0 and not squares.sum() > 0:
        raise OodError("statistics declare a scatter without any variance, but with a trace")
    variances = squares * (trace / squares.sum() if trace > 0 else 0.0)
    unique = variances / (1.0 + np.square(factors).sum(axis=0))
    scaled = factors * np.sqrt(unique)
    scatter = scaled.T @ scaled
    scatter[np.diag_indices(dim)] = variances
    return ClassStatistics(tuple(labels), counts, means, (scatter + scatter.T) / 2)


class _Reader:
    """Takes one array after another from bytes whose length was checked."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position

    def need(self, size: int, *, exactly: bool = False) -> None:
        left = len(self._data) - self._position
        if left < size or (exactly and left != size):
            raise OodError(f"compact statistics have {left} bytes where {size} are needed")

    def bytes(self, size: int) -> bytes:
        begin, self._position = self._position, self._position + size
        return self._data[begin : self._position]

    def take(self, dtype: str, count: int) -> npt.NDArray[Any]:
        return np.frombuffer(self.bytes(np.dtype(dtype).itemsize * count), dtype=dtype)

    def floats(self, count: int, *, signed: bool = False) -> FloatArray:
        numbers = self.take("<f2", count).astype(np.float64)
        if not np.isfinite(numbers).all() or (not signed and (numbers < 0).any()):
            raise OodError("compact statistics hold a number that is not finite, or negative")
        return numbers


def _factors(statistics: ClassStatistics, budget: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """The rows of R, the strongest first, float64 [r, d], and the bits each is worth, int64 [r]."""
    scatter = statistics.scatter
    dim = len(scatter)
    deviations = np.sqrt(np.diagonal(scatter))
    inverse = np.where(deviations > 0, 1.0 / np.where(deviations > 0, deviations, 1.0), 0.0)
    correlations = scatter * inverse[:, None] * inverse
    gaps = (statistics.means - statistics.means.mean(axis=0)) * inverse
    freedom = max(statistics.samples - len(statistics.labels), 1)
    least = float(np.clip(_UNIQUE_PER_SAMPLE * dim / freedom, *_LEAST_UNIQUE))
    unique = np.full(dim, _LEAST_UNIQUE[1])
    rows, bits = np.zeros((0, dim)), np.zeros(0, dtype=np.int64)
    for _ in range(_ITERATIONS):
        root = np.sqrt(unique)
        values, vectors = np.linalg.eigh(correlations / root[:, None] / root)
        strength = np.maximum(values[::-1] - 1.0, 0.0)
        vectors = vectors[:, ::-1]
        seen = np.square((gaps / root) @ vectors).sum(axis=0)
        bits = _water_filling(_losses(strength, seen), 8 * budget)
        kept = np.flatnonzero(bits)
        bits = bits[kept]
        rows = np.sqrt(strength[kept])[:, None] * vectors[:, kept].T
        unique = np.clip(1.0 - np.square(rows).sum(axis=0) * unique, least, 1.0)
    return rows, bits


def _losses(strength: FloatArray, seen: FloatArray) -> FloatArray:
    """What is lost if a direction is not sent, float64 [d], up to a factor.

    Args:
        strength: float64 [d], its variance above what is a feature's own.
        seen: float64 [d], the squares of what the class means differ by along it.
    """
    worth = strength / max(strength.sum(), np.finfo(np.float64).tiny)
    if seen.sum() > 0:
        worth = (1.0 - _MEANS_SHARE) * worth + _MEANS_SHARE * seen / seen.sum()
    result: FloatArray = worth * strength / (1.0 + strength)
    return result


def _water_filling(losses: FloatArray, total: int) -> npt.NDArray[np.int64]:
    """Bits for a number of each row, int64 [d].

    Args:
        losses: float64 [d], what is lost if a row is not sent.
        total: the sum of all bits.
    """
    error = np.array(NORMAL_ERROR)
    # A bit more always saves less than the one before, so the best are simply the largest savings.
    savings = losses[:, None] * -np.diff(error)
    order = np.argsort(-savings.ravel(), kind="stable")[:total]
    chosen = order[savings.ravel()[order] > 0]
    return np.bincount(chosen // MAX_BITS, minlength=len(losses)).astype(np.int64)
