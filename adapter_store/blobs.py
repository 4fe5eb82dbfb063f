"""Content-addressed files, and the durable way to write any file.

A blob is named by the SHA-256 of its bytes; it is there whole or not at all, whenever the power
goes. Used for bundles on both sides, and by the generation store for its own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from adapter_store.errors import CorruptBundleError, DiskFullError, StoreError

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file: written beside it, synced, renamed, directory synced.

    Raises:
        DiskFullError: The disk is full or failed; the file is what it was (only when the very last
            step, syncing the directory, failed may it be the new one, whole).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        # What cannot be removed now either is removed at the next start.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DiskFullError(
            f"cannot write {path}: {error.strerror or error}; free some space, nothing was changed"
        ) from error


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable.

    Raises:
        OSError: The disk failed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobStore:
    """A directory of blobs, two levels deep.

    Thread-safe: a blob never changes, and appears by one rename.

    Args:
        root: The directory; it is made if it is not there.
        recover: False where it is only read, perhaps beside a process that writes; then opening it
            removes nothing and makes nothing.
    """

    def __init__(self, root: Path, *, recover: bool = True) -> None:
        self.root = root
        if not recover:
            return
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("*/.*.tmp"):
            leftover.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Where a blob is, or would be.

        Raises:
            StoreError: That is no digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise StoreError(f"{digest[:80]!r} is no SHA-256 digest")
        return self.root / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """Keep bytes; returns their digest. Keeping the same bytes again writes nothing.

        Raises:
            DiskFullError: They could not be written; nothing is left of them.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        try:
            if path.is_file() and path.read_bytes() == data:
                return digest
            path.parent.mkdir(exist_ok=True)
            sync_directory(self.root)
        except OSError as error:
            raise DiskFullError(
                f"cannot write {path}: {error.strerror or error}; free some space"
            ) from error
        write_durably(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of a blob, checked against their name.

        Raises:
            CorruptBundleError: The file on disk is damaged.
            StoreError: It is not here, or cannot be read.
        """
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"bundle {digest[:12]} is not on this disk; fetch it again") from error
        except OSError as error:
            raise StoreError(
                f"bundle {digest[:12]} cannot be read from the disk: {error.strerror or error}"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptBundleError(
                f"bundle {digest[:12]} is damaged on disk; delete {self.path(digest)} to have it "
                "fetched again"
            )
        return data

    def has(self, digest: str) -> bool:
        """Whether a blob of that name is here."""
        return self.path(digest).is_file()

    def delete(self, digest: str) -> None:
        """Remove a blob if it is here.

        Raises:
            DiskFullError: The disk failed.
        """
        try:
            self.path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise DiskFullError(
                f"cannot remove bundle {digest[:12]}: {error.strerror or error}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return (p.name for p in sorted(self.root.glob("??/*")) if _DIGEST.fullmatch(p.name))
