"""A device's state directory: one process at a time opens it, and finds everything in it.

driftkeel.db     journal, episodes, outbox, settings (SQLite)
blobs/           bundles by digest
generations/     immutable generations; `current` names the active one
incoming/        bundles on their way here
"""

from __future__ import annotations

import fcntl
import os
import random
from pathlib import Path
from types import TracebackType
from typing import Self

from adapter_store.blobs import BlobStore
from adapter_store.database import open_database
from adapter_store.episodes_store import EpisodeStore, Settings
from adapter_store.errors import DiskFullError, StateLockedError
from adapter_store.generations import GenerationStore
from adapter_store.journal import Journal
from adapter_store.outbox import Inbox, Outbox

MIGRATIONS = Path(__file__).parent / "migrations"


class StateDir:
    """An opened and locked state directory.

    Args:
        path: The directory; it is made if it is not there.
        keep_generations: How many generations stay besides the active one.

    Raises:
        StateLockedError: Another process has it open.
        DatabaseTooNewError: A newer version wrote it.
        GenerationError: Generations are there, but none is whole.
        DiskFullError: It cannot be made or written.

    Attributes:
        path: The directory.
        journal: Samples and labels.
        episodes: Episodes.
        settings: Small values.
        outbox: Messages owed.
        inbox: Messages acted on.
        blobs: Bundles.
        generations: Generations.
        incoming: Where bundles on their way are kept.
    """

    def __init__(self, path: Path, *, keep_generations: int = 5) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.incoming = path / "incoming"
            self.incoming.mkdir(exist_ok=True)
            self._lock = _lock(path / "lock")
        except OSError as error:
            raise DiskFullError(f"cannot use {path}: {error.strerror}") from error
        try:
            url = f"sqlite:///{path / 'driftkeel.db'}"
            self._engine = open_database(url, MIGRATIONS)
            # The journal is on the hot path: a power cut may take its last moments, never more.
            self._journal_engine = open_database(url, MIGRATIONS, durable=False)
            self.journal = Journal(self._journal_engine, self._engine)
            self.episodes = EpisodeStore(self._engine)
            self.settings = Settings(self._engine)
            self.outbox = Outbox(self._engine, jitter=random.random)
            self.inbox = Inbox(self._engine)
            self.blobs = BlobStore(path / "blobs")
            self.generations = GenerationStore(path, self.blobs, keep=keep_generations)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Release the directory; calling it again does nothing."""
        if self._lock >= 0:
            self._engine.dispose()
            self._journal_engine.dispose()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StateLockedError(
            f"{path.parent} is in use by process {holder}; stop it first, or give this one a "
            "state directory of its own"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
