"""What has arrived of a bundle, kept on disk so that a transfer survives a restart.

`PartialFile` keeps the bytes, `Download` joins one to a `Receiver`: everything a device or the
catalogue needs to fetch a bundle, short of the connection. A finished bundle is handed over as
bytes, checked against its digest, for `adapter_store.blobs` to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import zlib
from collections.abc import Collection
from pathlib import Path

from adapter_store import wire
from adapter_store.errors import CorruptBundleError, DiskFullError, TransferError
from adapter_store.transfer import DEFAULT_CHUNK_BYTES, Receiver, check_size

_DIGEST = re.compile(r"[0-9a-f]{64}")


class PartialFile:
    """A bundle's bytes as far as they are here: ``<digest>.part`` and ``<digest>.ranges``.

    The second is a journal: a line of JSON per chunk with its offset, length and CRC-32. Nothing
    is synced while chunks arrive; after a restart a chunk counts only if the bytes in the first
    file still have the CRC its line gives, so a power cut costs the chunks it tore and no more.

    Args:
        directory: Where partial files are; it is made if it is not there.
        digest: The bundle.
        size_bytes: Its size; what an earlier attempt kept under another size is thrown away.

    Raises:
        TransferError: That is no digest.
        DiskFullError: The directory cannot be read or written.
    """

    def __init__(self, directory: Path, digest: str, size_bytes: int) -> None:
        if not _DIGEST.fullmatch(digest):
            raise TransferError(f"{digest[:80]!r} is no SHA-256 digest")
        self.digest = digest
        self.size_bytes = size_bytes
        self._data = directory / f"{digest}.part"
        self._journal = directory / f"{digest}.ranges"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.ranges = self._recover()
        except OSError as error:
            raise _disk_full(self._data, error) from error

    def write(self, offset: int, data: bytes) -> None:
        """Keep a chunk.

        Raises:
            DiskFullError: It could not be kept; what was kept before still is.
        """
        line = json.dumps([offset, len(data), zlib.crc32(data)])
        try:
            with self._data.open("r+b", buffering=0) as file:
                file.seek(offset)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            with self._journal.open("a", encoding="ascii") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _disk_full(self._data, error) from error
        self.ranges.append((offset, len(data)))

    def read(self) -> bytes:
        """The whole bundle.

        Raises:
            CorruptBundleError: The bytes do not have the digest they were promised under; they are
                thrown away, so that another attempt starts from nothing.
            DiskFullError: They could not be read.
        """
        try:
            data = self._data.read_bytes()
        except OSError as error:
            raise _disk_full(self._data, error) from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.digest:
            self.discard()
            raise CorruptBundleError(
                f"what arrived as bundle {self.digest[:12]} has digest {found[:12]}; "
                "it was thrown away, fetch it again or from elsewhere"
            )
        return data

    def discard(self) -> None:
        """Remove what is here."""
        self.ranges = []
        with contextlib.suppress(OSError):
            self._journal.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)

    def _recover(self) -> list[tuple[int, int]]:
        """The ranges an earlier attempt kept; both files are rewritten to say just that."""
        kept: list[tuple[int, int, int]] = []
        stored = self._data.read_bytes() if self._data.exists() else b""
        lines = self._journal.read_text("ascii", "replace").split("\n") if stored else [""]
        if _parsed(lines[0]) == [self.size_bytes]:
            for line in lines[1:]:
                match _parsed(line):
                    case [int(offset), int(length), int(crc)] if offset >= 0 and length > 0:
                        piece = stored[offset : offset + length]
                        if len(piece) == length and zlib.crc32(piece) == crc:
                            kept.append((offset, length, crc))
        else:
            self._data.write_bytes(b"")
        with self._data.open("ab") as file:
            file.truncate(self.size_bytes)
        entries = [[self.size_bytes], *(list(entry) for entry in dict.fromkeys(kept))]
        self._journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "ascii")
        return [(offset, length) for offset, length, _ in kept]


class Download:
    """A bundle on its way here: what to ask for, and where it is kept meanwhile.

    Args:
        directory: Where partial files are.
        digest: The bundle.
        size_bytes: Its size, as vouched for.
        rng: Source of the jitter in timeouts.
        chunk_bytes: How much to ask for at once.
        window: Chunks under way, at most.
        timeout_s: Shortest wait before asking again.

    Raises:
        TransferError: The size is zero or over the limit, or that is no digest.
        DiskFullError: The directory cannot be read or written.
    """

    def __init__(
        self,
        directory: Path,
        digest: str,
        size_bytes: int,
        *,
        rng: random.Random,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        window: int = 4,
        timeout_s: float = 2.0,
    ) -> None:
        check_size(digest, size_bytes)  # before a file of that size is made
        self._file = PartialFile(directory, digest, size_bytes)
        self._receiver = Receiver(
            digest,
            size_bytes,
            rng=rng,
            held=self._file.ranges,
            chunk_bytes=chunk_bytes,
            window=window,
            timeout_s=timeout_s,
        )

    @property
    def digest(self) -> str:
        """The bundle."""
        return self._receiver.digest

    @property
    def size_bytes(self) -> int:
        """The bundle's size."""
        return self._receiver.size_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes here so far."""
        return self._receiver.received_bytes

    @property
    def complete(self) -> bool:
        """Whether every byte is here; `finish` then checks and returns them."""
        return self._receiver.complete

    @property
    def failed(self) -> str:
        """Why this is over without success; empty while it is not."""
        return self._receiver.failed

    def requests(self, now: float) -> list[wire.Get]:
        """What to send now; see `Receiver.requests`."""
        return self._receiver.requests(now)

    def next_at(self) -> float | None:
        """When to call `requests` again if nothing arrives."""
        return self._receiver.next_at()

    def accept(self, chunk: wire.Chunk, now: float) -> bool:
        """Keep a chunk; False when it was a duplicate or not part of this bundle.

        Raises:
            DiskFullError: It could not be kept; it will be asked for again.
        """
        data = self._receiver.accept(chunk, now)
        if data is None:
            return False
        try:
            self._file.write(chunk.offset, data)
        except DiskFullError:
            self._receiver.lost(chunk.offset)
            raise
        return True

    def missing(self, message: wire.Missing) -> None:
        """The other side will not send this bundle."""
        self._receiver.missing(message)

    def reconnected(self) -> None:
        """Whatever was on its way is lost; ask again at once."""
        self._receiver.reconnected()

    def finish(self) -> bytes:
        """The whole bundle, its digest checked; call `discard` once it is kept elsewhere.

        Raises:
            TransferError: Not every byte is here.
            CorruptBundleError: The bytes are not those promised; they were thrown away.
            DiskFullError: They could not be read.
        """
        if not self.complete:
            raise TransferError(
                f"{self.received_bytes} of {self.size_bytes} bytes of bundle"
                f" {self.digest[:12]} are here"
            )
        return self._file.read()

    def discard(self) -> None:
        """Remove what is here of the bundle."""
        self._file.discard()


def sweep(directory: Path, keep: Collection[str] = ()) -> None:
    """Remove partial files of bundles that are not to be fetched any more."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.suffix in {".part", ".ranges"} and path.stem not in keep:
                path.unlink(missing_ok=True)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _disk_full(path: Path, error: OSError) -> DiskFullError:
    return DiskFullError(f"cannot use {path}: {error.strerror}; free some space or check the disk")
