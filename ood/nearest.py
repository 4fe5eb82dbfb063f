"""The nearest of many signatures, in memory: a cheap look at all, an exact one at the best.

The catalogue keeps one beside its database. What is compared is decided by the query's encoder,
and by families and states if they are named. Locks nothing, reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ood.signature import (
    SIZE_BYTES,
    Signature,
    similarities,
    unexplained,
    unpacked,
)

# Directions that the cheap look uses: a random projection's first ones are a random projection.
_COARSE = 128
_SHORTLIST = 256
_SMALLEST = 64

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Hit(Generic[Key]):
    """A signature found: its key and how alike it is, 0..1."""

    key: Key
    similarity: float


class Nearest(Generic[Key]):
    """Signatures by key, with the family and the state of what they belong to."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._rows: dict[Key, int] = {}
        self._numbers: dict[Hashable, int] = {}
        self._packed = np.empty((_SMALLEST, SIZE_BYTES), np.uint8)
        self._coarse = np.empty((_SMALLEST, _COARSE), np.float32)
        # Squared length of the coarse vector, and the variance that distances are divided by.
        self._length = np.empty(_SMALLEST, np.float32)
        self._left = np.empty(_SMALLEST, np.float32)
        # Numbers of the encoder (seed and dimension), the family and the state.
        self._kinds = np.empty((3, _SMALLEST), np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def size_bytes(self) -> int:
        """What the arrays take."""
        arrays = (self._packed, self._coarse, self._length, self._left, self._kinds)
        return sum(array.nbytes for array in arrays)

    def put(self, key: Key, signature: Signature, *, family: str = "", status: str = "") -> None:
        """Add a signature, or change what is known of a key."""
        row = self._rows.get(key)
        if row is None:
            row = len(self._keys)
            if row == len(self._packed):
                self._grow()
            self._keys.append(key)
            self._rows[key] = row
        packed = np.frombuffer(signature.to_bytes(), dtype=np.uint8)
        arrays = unpacked(packed[None])
        self._packed[row] = packed
        self._coarse[row] = arrays.means[0, :_COARSE]
        self._length[row] = np.square(self._coarse[row]).sum()
        self._left[row] = unexplained(arrays)[0]
        kinds = (_encoder(signature), ("family", family), ("status", status))
        self._kinds[:, row] = [self._number(kind) for kind in kinds]

    def remove(self, key: Key) -> None:
        """Forget a key; one that is not here is no error."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        last = self._keys.pop()
        if row < len(self._keys):  # the last one takes its place
            self._keys[row] = last
            self._rows[last] = row
            end = len(self._keys)
            for array in (self._packed, self._coarse, self._length, self._left):
                array[row] = array[end]
            self._kinds[:, row] = self._kinds[:, end]

    def search(
        self,
        wanted: Signature,
        *,
        limit: int,
        min_similarity: float = 0.0,
        families: Sequence[str] = (),
        statuses: Sequence[str] = (),
        exclude: Collection[Key] = (),
    ) -> list[Hit[Key]]:
        """Find the most similar signatures of the same encoder, the best first.

        All are compared exactly where 256 or fewer pass the filters; otherwise those 256 whose
        means are nearest, by half of the directions.

        Args:
            wanted: What to look for.
            limit: How many at most.
            min_similarity: The least similarity.
            families: Those wanted; all when empty.
            statuses: Those wanted; all when empty.
            exclude: Keys to leave out.
        """
        query = unpacked(np.frombuffer(wanted.to_bytes(), dtype=np.uint8)[None])
        rows = self._passing(wanted, families, statuses, exclude)
        if len(rows) > _SHORTLIST:
            rows = self._shortlist(query.means[0, :_COARSE], float(unexplained(query)[0]), rows)
        if not len(rows):
            return []
        alike = similarities(query, unpacked(self._packed[rows]))
        order = np.argsort(-alike, kind="stable")[:limit]
        return [
            Hit(self._keys[rows[k]], float(alike[k])) for k in order if alike[k] >= min_similarity
        ]

    def _passing(
        self,
        wanted: Signature,
        families: Sequence[str],
        statuses: Sequence[str],
        exclude: Collection[Key],
    ) -> npt.NDArray[np.int64]:
        encoders, families_, statuses_ = self._kinds[:, : len(self._keys)]
        passing = encoders == self._numbers.get(_encoder(wanted), -1)
        for column, kind, values in (
            (families_, "family", families),
            (statuses_, "status", statuses),
        ):
            if values:
                chosen = np.zeros(len(passing), bool)
                for value in values:
                    chosen |= column == self._numbers.get((kind, value), -1)
                passing &= chosen
        for key in exclude:
            if (row := self._rows.get(key)) is not None:
                passing[row] = False
        return np.flatnonzero(passing)

    def _shortlist(
        self, mean: npt.NDArray[np.float32], left: float, rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        count = len(self._keys)
        gaps = self._coarse[:count] @ mean
        gaps *= -2
        gaps += self._length[:count]
        gaps += np.square(mean).sum()
        gaps = gaps[rows] * (1 / self._left[rows] + np.float32(1 / left))
        return np.sort(rows[np.argpartition(gaps, _SHORTLIST)[:_SHORTLIST]])

    def _number(self, kind: Hashable) -> int:
        return self._numbers.setdefault(kind, len(self._numbers))

    def _grow(self) -> None:
        for name in ("_packed", "_coarse", "_length", "_left"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.empty_like(array)]))
        self._kinds = np.concatenate([self._kinds, np.empty_like(self._kinds)], axis=1)


def _encoder(signature: Signature) -> Hashable:
    return ("encoder", signature.seed_digest, signature.dim)
