"""Moving a bundle in chunks: the receiver asks for ranges, the sender answers; pure state machines.

Both directions are the same: to upload, a device offers a bundle and the catalogue is the receiver.
The receiver survives loss, duplication, any order and restarts; nothing here opens a socket or
reads a clock, and only `PartialFile` touches the disk.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from adapter_store.errors import DiskFullError, TransferError
from adapter_store.wire import MAX_CHUNK_BYTES, Chunk, Get, Missing

CHUNK_BYTES: Final = 64 * 1024
WINDOW: Final = 8
FIRST_TIMEOUT_S: Final = 2.0
LAST_TIMEOUT_S: Final = 60.0


@dataclass
class Receiver:
    """Asks for the chunks of one bundle until all are there.

    Args:
        digest: The bundle.
        size_bytes: Its whole size.
        have: Indices of chunks that are already here, from before a restart.
        chunk_bytes: The size of a chunk.
        window: How many requests may be under way.
    """

    digest: str
    size_bytes: int
    have: set[int] = field(default_factory=set)
    chunk_bytes: int = CHUNK_BYTES
    window: int = WINDOW
    _asked: dict[int, float] = field(default_factory=dict, init=False)
    _timeout_s: float = field(default=FIRST_TIMEOUT_S, init=False)

    def __post_init__(self) -> None:
        if self.size_bytes < 1:
            raise TransferError(f"bundle {self.digest[:12]} declares {self.size_bytes} bytes")
        self.have = {index for index in self.have if 0 <= index < self.chunks}

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return math.ceil(self.size_bytes / self.chunk_bytes)

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return len(self.have) == self.chunks

    def requests(self, now: float) -> list[Get]:
        """What to ask for now: new chunks, and those whose answer is overdue.

        Args:
            now: A monotonic clock, in seconds.
        """
        overdue = [i for i, at in self._asked.items() if now - at >= self._timeout_s]
        for index in overdue:
            del self._asked[index]
        if overdue:
            # A slow link is not helped by asking faster.
            self._timeout_s = min(LAST_TIMEOUT_S, 2 * self._timeout_s)
        wanted = (i for i in range(self.chunks) if i not in self.have and i not in self._asked)
        gets = []
        for index in wanted:
            if len(self._asked) >= self.window:
                break
            self._asked[index] = now
            offset = index * self.chunk_bytes
            gets.append(
                Get(
                    digest=self.digest,
                    offset=offset,
                    length=min(self.chunk_bytes, self.size_bytes - offset),
                )
            )
        return gets

    def restart(self) -> None:
        """Forget what was asked, as after a reconnection; what is here stays."""
        self._asked.clear()
        self._timeout_s = FIRST_TIMEOUT_S

    def accept(self, chunk: Chunk) -> bool:
        """Take a chunk; False when it is here already.

        Raises:
            TransferError: It is not a chunk of this bundle.
        """
        index, rest = divmod(chunk.offset, self.chunk_bytes)
        expected = min(self.chunk_bytes, self.size_bytes - chunk.offset)
        if (
            chunk.digest != self.digest
            or chunk.size_bytes != self.size_bytes
            or rest
            or len(chunk.data) != expected
        ):
            raise TransferError(
                f"a chunk of {len(chunk.data)} bytes at {chunk.offset} of {chunk.size_bytes} does "
                f"not fit bundle {self.digest[:12]} of {self.size_bytes} bytes"
            )
        self._asked.pop(index, None)
        self._timeout_s = FIRST_TIMEOUT_S
        if index in self.have:
            return False
        self.have.add(index)
        return True


def answer(get: Get, read: Callable[[str], bytes | None]) -> Chunk | Missing:
    """Answer a request for a range.

    Args:
        get: The request.
        read: Gives the whole bundle of a digest, or None when it is not to be had.
    """
    data = read(get.digest)
    if data is None:
        return Missing(digest=get.digest, reason="this bundle is not offered here")
    part = data[get.offset : get.offset + min(get.length, MAX_CHUNK_BYTES)]
    if not part:
        return Missing(digest=get.digest, reason="the range is past the end of the bundle")
    return Chunk(digest=get.digest, offset=get.offset, size_bytes=len(data), data=part)


class PartialFile:
    """The chunks of a bundle that are here so far, on disk.

    Beside the data one byte a chunk says whether it is there; it is written after the data is
    synced, so what it claims after a power cut is true.

    Args:
        directory: Where to keep it.
        digest: The bundle.
        size_bytes: Its whole size.
        chunk_bytes: The size of a chunk.
    """

    def __init__(
        self, directory: Path, digest: str, size_bytes: int, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.digest, self._size, self._chunk = digest, size_bytes, chunk_bytes
        # The name holds all that must agree before what is there may be continued.
        stem = f"{digest}.{size_bytes}.{chunk_bytes}"
        self._data = directory / f"{stem}.part"
        self._map = directory / f"{stem}.map"

    def have(self) -> set[int]:
        """The indices of the chunks that are here."""
        try:
            marks = self._map.read_bytes()
        except FileNotFoundError:
            return set()
        return {index for index, mark in enumerate(marks) if mark == 1} if self._whole() else set()

    def write(self, chunk: Chunk) -> None:
        """Keep a chunk.

        Raises:
            DiskFullError: It was not kept.
        """
        try:
            _write_at(self._data, chunk.offset, chunk.data, self._size)
            index = chunk.offset // self._chunk
            _write_at(self._map, index, b"\x01", -(-self._size // self._chunk))
        except OSError as error:
            raise DiskFullError(f"cannot write {self._data}: {error.strerror}") from error

    def finish(self) -> bytes:
        """The whole bundle, checked against its digest; the file stays until `discard`.

        Raises:
            TransferError: The bytes are not the bundle's; they are discarded.
        """
        data = self._data.read_bytes()
        if len(data) != self._size or hashlib.sha256(data).hexdigest() != self.digest:
            self.discard()
            raise TransferError(
                f"what arrived is not bundle {self.digest[:12]}: its digest differs"
            )
        return data

    def discard(self) -> None:
        """Remove what is here."""
        self._map.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    def _whole(self) -> bool:
        return self._data.exists() and self._data.stat().st_size == self._size


def partial_files(directory: Path) -> Iterator[tuple[str, int]]:
    """Digest and size of every bundle that is partly in a directory."""
    for path in sorted(directory.glob("*.*.*.part")):
        digest, size, chunk = path.name.removesuffix(".part").split(".")
        if size.isdigit() and chunk == str(CHUNK_BYTES):
            yield digest, int(size)


def _write_at(path: Path, offset: int, data: bytes, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
