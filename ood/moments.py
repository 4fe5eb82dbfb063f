"""Exact sums over labelled features: what scores keep so that merging has one result in any order.

Floating-point sums depend on their order in the last bits. Here features are rounded to a grid once
and everything after is a sum of whole numbers, so merging is associative and commutative to the
last bit, and fitting does not depend on the order of samples. `ClassStatistics` are computed from
them. Called by the scores of this package; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.statistics import ClassStatistics
from ood.validation import check_features, check_labels
from ood.wire import Reader, Writer

# The largest magnitude of a feature is 2^scale; each is rounded to 2^20 steps up to it, finer than
# what any score can tell.
_BITS: Final = 20
# Products of two such numbers have 40 bits; so many of them add up exactly in a float64.
_ROWS: Final = 2 ** (53 - 2 * _BITS)
_MAX_SCALE: Final = 20
# Sums of products stay within 63 bits.
_MAX_SAMPLES: Final = 2**22
_MAX_DIM: Final = 2048
_MAGIC: Final = b"DKM1"
_Number = TypeVar("_Number", np.int64, np.float64)


@dataclass(frozen=True, eq=False)
class Moments:
    """Counts, sums and one matrix of second moments, in whole numbers.

    Attributes:
        labels: class names, sorted, unique.
        counts: int64 [c], all ≥ 1.
        sums: int64 [c, d], in units of 2^(scale − 20).
        squares: int64 [d, d], the sum of x·xᵀ over all samples, in that unit squared.
        scale: features are at most 2^scale in magnitude.

    Example:
        >>> one = Moments.fit([[0.25], [0.5]], ["a", "b"])
        >>> one.merge(Moments.fit([[0.75]], ["a"])).statistics().means.tolist()
        [[0.5], [0.5]]
    """

    labels: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]
    squares: npt.NDArray[np.int64]
    scale: int

    @classmethod
    def fit(cls, features: npt.ArrayLike, labels: Sequence[str], *, scale: int = 0) -> Moments:
        """Sum up labelled features [n, d].

        Raises:
            OodError: features or labels are empty, not finite, larger than 2^scale, too many, or do
                not match.
        """
        rows = on_grid(features, bits=_BITS, scale=scale)
        names, index = class_index(labels, samples=len(rows))
        _check_size(len(rows), rows.shape[1])
        sums = np.zeros((len(names), rows.shape[1]), np.int64)
        np.add.at(sums, index, rows)
        squares = np.zeros((rows.shape[1], rows.shape[1]), np.int64)
        for at in range(0, len(rows), _ROWS):
            part = rows[at : at + _ROWS].astype(np.float64)
            squares += (part.T @ part).astype(np.int64)
        counts = np.bincount(index, minlength=len(names)).astype(np.int64)
        return cls(names, counts, sums, squares, scale)

    @property
    def dim(self) -> int:
        """The dimension of the features."""
        return int(self.sums.shape[1])

    def merge(self, other: Moments) -> Moments:
        """Return the sums over both sets of samples.

        Raises:
            OodError: the two differ in dimension or scale, or hold too many samples together.
        """
        if (other.dim, other.scale) != (self.dim, self.scale):
            raise OodError(
                f"cannot merge sums of dimension {self.dim}, scale {self.scale} and dimension "
                f"{other.dim}, scale {other.scale}"
            )
        _check_size(int(self.counts.sum() + other.counts.sum()), self.dim)
        labels = tuple(sorted({*self.labels, *other.labels}))
        counts = add_by_label(labels, (self.labels, self.counts), (other.labels, other.counts))
        sums = add_by_label(labels, (self.labels, self.sums), (other.labels, other.sums))
        return Moments(labels, counts, sums, self.squares + other.squares, self.scale)

    def statistics(self) -> ClassStatistics:
        """Return the class statistics of the samples."""
        unit = 2.0 ** (self.scale - _BITS)
        means = self.sums / self.counts[:, None]
        # Both terms are taken about the overall mean, so that little is lost in the difference.
        total, centre = int(self.counts.sum()), self.sums.sum(axis=0) / self.counts.sum()
        spread = self.squares - total * np.outer(centre, centre)
        gaps = (means - centre) * np.sqrt(self.counts)[:, None]
        scatter = spread - gaps.T @ gaps
        scatter = (scatter + scatter.T) / 2 * unit**2
        np.fill_diagonal(scatter, np.maximum(np.diagonal(scatter), 0.0))
        return ClassStatistics(self.labels, self.counts.copy(), means * unit, scatter)

    def to_bytes(self) -> bytes:
        """Write the sums; the same sums always give the same bytes."""
        writer = Writer(_MAGIC)
        writer.integers("<i8", [self.scale, self.dim])
        writer.names(self.labels)
        writer.integers("<i8", self.counts)
        writer.integers("<i8", self.sums)
        writer.integers("<i8", self.squares[np.triu_indices(self.dim)])
        return writer.done()

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Read what `to_bytes` wrote, trusting nothing.

        Raises:
            OodError: the bytes are no sums: wrong mark, length or range.
        """
        reader = Reader(data, _MAGIC)
        scale, dim = reader.integers("<i8", 2).tolist()
        if not 1 <= dim <= _MAX_DIM or not 0 <= scale <= _MAX_SCALE:
            raise OodError(f"sums declare dimension {dim} and scale {scale}")
        labels = reader.names()
        counts = reader.counts(len(labels))
        sums = reader.integers("<i8", len(labels) * dim).reshape(-1, dim)
        half = np.zeros((dim, dim), np.int64)
        half[np.triu_indices(dim)] = reader.integers("<i8", dim * (dim + 1) // 2)
        reader.end()
        total = int(counts.sum())
        _check_size(total, dim)
        if (np.abs(sums) > counts[:, None] << _BITS).any():
            raise OodError("sums are larger than their counts allow")
        diagonal = np.diagonal(half)
        if (diagonal < 0).any() or (np.abs(half) > total << (2 * _BITS)).any():
            raise OodError("second moments are out of range")
        return cls(labels, counts, sums, half + np.triu(half, 1).T, scale)


def on_grid(features: npt.ArrayLike, *, bits: int, scale: int = 0) -> npt.NDArray[np.int64]:
    """Return features as whole numbers of 2^(scale − bits), int64 [n, d].

    Raises:
        OodError: features are empty, not finite, or larger than 2^scale.
    """
    rows = check_features(features)
    if not 0 <= scale <= _MAX_SCALE:
        raise OodError(f"scale is {scale}; expected 0 to {_MAX_SCALE}")
    top = float(np.abs(rows).max())
    if top > 2.0**scale * (1 + 1e-6):
        raise OodError(f"a feature is {top:g}; expected at most {2**scale} (scale {scale})")
    limit = 2**bits
    result: npt.NDArray[np.int64] = np.clip(
        np.rint(rows * 2.0 ** (bits - scale)), -limit, limit
    ).astype(np.int64)
    return result


def class_index(
    labels: Sequence[str], *, samples: int
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the sorted names and each sample's place among them.

    Raises:
        OodError: a label is no name, or their number is not the number of samples.
    """
    names, index = np.unique(
        np.array(check_labels(labels, samples=samples), dtype=object), return_inverse=True
    )
    return tuple(names.tolist()), index.astype(np.int64)


def add_by_label(
    labels: Sequence[str], *parts: tuple[Sequence[str], npt.NDArray[_Number]]
) -> npt.NDArray[_Number]:
    """Add arrays [c, …] class by class into one with a row for each of `labels`."""
    row = {label: k for k, label in enumerate(labels)}
    total = np.zeros((len(labels), *parts[0][1].shape[1:]), parts[0][1].dtype)
    for names, values in parts:
        total[[row[name] for name in names]] += values
    return total


def _check_size(samples: int, dim: int) -> None:
    if samples > _MAX_SAMPLES or dim > _MAX_DIM:
        raise OodError(
            f"found {samples} samples in {dim} dimensions; expected at most {_MAX_SAMPLES} in "
            f"{_MAX_DIM}"
        )
