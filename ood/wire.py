"""How fitted states are written: a mark, then whole numbers and names. No pickle, no floats.

Called by the scores of this package for `to_bytes` and `from_bytes`. The reader trusts nothing and
takes no memory that the bytes do not fill.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError

_COUNT: Final = struct.Struct("<I")
_MAX_COUNT: Final = 2**40


class Writer:
    """Puts one value after another.

    Args:
        magic: what the bytes begin with.
    """

    def __init__(self, magic: bytes) -> None:
        self._parts = [magic]

    def integers(self, dtype: str, values: npt.ArrayLike) -> None:
        """Write whole numbers of one type."""
        self._parts.append(np.asarray(values).astype(dtype).tobytes())

    def names(self, names: Sequence[str]) -> None:
        """Write names, their number first."""
        encoded = [name.encode() for name in names]
        self._parts.append(_COUNT.pack(len(encoded)))
        self._parts += [_COUNT.pack(len(name)) + name for name in encoded]

    def blob(self, data: bytes) -> None:
        """Write bytes, their number first."""
        self._parts.append(_COUNT.pack(len(data)) + data)

    def done(self) -> bytes:
        """Return all that was written."""
        return b"".join(self._parts)


class Reader:
    """Takes one value after another.

    Args:
        data: what a `Writer` made.
        magic: what it must begin with.

    Raises:
        OodError: it begins with something else.
    """

    def __init__(self, data: bytes, magic: bytes) -> None:
        if data[: len(magic)] != magic:
            raise OodError(f"not a state of this kind: it begins with {data[: len(magic)]!r}")
        self._data, self._at = data, len(magic)

    def integers(self, dtype: str, count: int) -> npt.NDArray[np.int64]:
        """Take whole numbers.

        Raises:
            OodError: there are not so many bytes left.
        """
        raw = self._take(count * np.dtype(dtype).itemsize)
        return np.frombuffer(raw, dtype=dtype).astype(np.int64)

    def counts(self, classes: int) -> npt.NDArray[np.int64]:
        """Take a number of samples for each class.

        Raises:
            OodError: one is not from 1 to 2^40.
        """
        counts = self.integers("<i8", classes)
        if (counts < 1).any() or (counts > _MAX_COUNT).any():
            raise OodError("every class needs a count of at least one")
        return counts

    def names(self) -> tuple[str, ...]:
        """Take names.

        Raises:
            OodError: there is none, or they are not UTF-8, sorted, unique and of some length.
        """
        found = []
        for _ in range(self._count()):
            try:
                found.append(self._take(self._count()).decode())
            except UnicodeDecodeError as error:
                raise OodError("a label is not UTF-8") from error
        if not found or not all(found) or found != sorted(set(found)):
            raise OodError("labels must be sorted, unique names, at least one")
        return tuple(found)

    def blob(self) -> bytes:
        """Take bytes."""
        return self._take(self._count())

    def end(self) -> None:
        """Make sure that nothing is left.

        Raises:
            OodError: there is more.
        """
        if self._at != len(self._data):
            raise OodError(f"{len(self._data) - self._at} bytes are left over after the state")

    def _count(self) -> int:
        return int(_COUNT.unpack(self._take(_COUNT.size))[0])

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise OodError("the state ends too early")
        self._at += size
        return self._data[self._at - size : self._at]
