"""The distance to the k-th nearest of a bounded bank of known samples.

The bank keeps the rows whose content hashes lowest, a uniform sample that does not depend on who
saw what first: merging two banks keeps the lowest of both, in any order with the same result.
Called by `ood.fitted`; reads and writes nothing.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.moments import on_grid
from ood.validation import FloatArray, check_features
from ood.wire import Reader, Writer

BANK_ROWS: Final = 1000
NEIGHBOUR: Final = 10
# Rows are kept as 16-bit numbers: steps of 2^-14 of a unit vector.
_BITS: Final = 14
_MAGIC: Final = b"DKN1"
_MAX_ROWS: Final = 2**20
_MAX_DIM: Final = 2**14


class NeighbourBank:
    """A bank of unit-length rows; a set, so a row seen twice is there once.

    Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest neighbors" (2022), with
    a bank that stays small: with the k-th of n samples the score estimates density, and a sample of
    the bank does so too.

    Attributes:
        rows: int16 [m, d], in units of 2^-14, in the order of their hashes.
        capacity: the most rows it keeps.

    Example:
        >>> bank = NeighbourBank.fit([[1.0, 0.0], [0.0, 1.0]])
        >>> bank.score([[1.0, 0.0]], neighbour=1).tolist()
        [0.0]
    """

    def __init__(self, rows: npt.NDArray[np.int16], capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self._bank = (rows.astype(np.float32) / np.float32(2**_BITS)).T
        self._squares = np.square(self._bank).sum(axis=0)

    @classmethod
    def fit(cls, features: npt.ArrayLike, *, capacity: int = BANK_ROWS) -> NeighbourBank:
        """Keep rows of l2-normalised features [n, d].

        Raises:
            OodError: features are empty, not finite or longer than one, or the capacity is none.
        """
        if not 1 <= capacity <= _MAX_ROWS:
            raise OodError(f"capacity is {capacity}; expected 1 to {_MAX_ROWS} rows")
        return cls(_lowest(on_grid(features, bits=_BITS).astype(np.int16), capacity), capacity)

    def merge(self, other: NeighbourBank) -> NeighbourBank:
        """Return the bank of both sets of samples.

        Raises:
            OodError: the two differ in dimension or capacity.
        """
        mine, theirs = (self.rows.shape[1], self.capacity), (other.rows.shape[1], other.capacity)
        if mine != theirs:
            raise OodError(f"cannot merge banks of (dimension, capacity) {mine} and {theirs}")
        return NeighbourBank(
            _lowest(np.concatenate([self.rows, other.rows]), self.capacity), self.capacity
        )

    def score(self, features: npt.ArrayLike, *, neighbour: int = NEIGHBOUR) -> FloatArray:
        """Return the distance to the k-th nearest row, or to the farthest of fewer, float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        probe = check_features(features, dim=self.rows.shape[1]).astype(np.float32)
        squares = np.square(probe).sum(axis=1)[:, None] - 2 * probe @ self._bank + self._squares
        k = min(neighbour, squares.shape[1]) - 1
        result: FloatArray = np.sqrt(
            np.maximum(np.partition(squares, k, axis=1)[:, k], 0).astype(np.float64)
        )
        return result

    def to_bytes(self) -> bytes:
        """Write the bank; the same bank always gives the same bytes."""
        writer = Writer(_MAGIC)
        writer.integers("<i8", [self.capacity, *self.rows.shape])
        writer.integers("<i2", self.rows)
        return writer.done()

    @classmethod
    def from_bytes(cls, data: bytes) -> NeighbourBank:
        """Read what `to_bytes` wrote, trusting nothing.

        Raises:
            OodError: the bytes are no bank: wrong mark, length, range or order.
        """
        reader = Reader(data, _MAGIC)
        capacity, count, dim = reader.integers("<i8", 3).tolist()
        if not 1 <= count <= capacity <= _MAX_ROWS or not 1 <= dim <= _MAX_DIM:
            raise OodError(f"bank declares {count} rows of {dim} numbers, capacity {capacity}")
        rows = reader.integers("<i2", count * dim).reshape(count, dim).astype(np.int16)
        reader.end()
        if not np.array_equal(_lowest(rows, capacity), rows):
            raise OodError("bank rows are not unique or not in the order of their hashes")
        return cls(rows, capacity)


def _lowest(rows: npt.NDArray[np.int16], capacity: int) -> npt.NDArray[np.int16]:
    """The rows of lowest hash, each once, in that order."""
    packed = np.ascontiguousarray(rows.astype("<i2"))
    keyed = {
        hashlib.blake2b(row.tobytes(), digest_size=16, key=b"driftkeel bank").digest(): place
        for place, row in enumerate(packed)
    }
    chosen = [keyed[key] for key in sorted(keyed)[:capacity]]
    result: npt.NDArray[np.int16] = rows[chosen]
    return result
