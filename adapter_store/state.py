"""A device's state directory: one process at a time opens it, and finds everything in it.

driftkeel.db     journal, episodes, outbox, settings (SQLite)
blobs/           bundles by digest
generations/     immutable generations; `current` names the active one
incoming/        bundles on their way here
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sqlalchemy import Engine, create_engine

from adapter_store.blobs import BlobStore
from adapter_store.database import open_database
from adapter_store.episodes_store import EpisodeStore, Settings
from adapter_store.errors import DiskFullError, StateLockedError, StoreError, WireError
from adapter_store.generations import GenerationStore
from adapter_store.journal import Journal
from adapter_store.outbox import Inbox, Outbox
from adapter_store.wire import Offer, decode_up

MIGRATIONS: Final = Path(__file__).parent / "migrations"
_DIGEST: Final = re.compile(r"\b[0-9a-f]{64}\b")


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
            self._lock = lock_directory(path)
        except OSError as error:
            raise DiskFullError(f"cannot use {path}: {error.strerror}") from error
        engines: list[Engine] = []
        try:
            url = f"sqlite:///{path / 'driftkeel.db'}"
            self._engine = open_database(url, MIGRATIONS)
            engines.append(self._engine)
            # The journal is on the hot path: a power cut may take its last moments, never more.
            self._journal_engine = open_database(url, MIGRATIONS, durable=False)
            engines.append(self._journal_engine)
            self.journal = Journal(self._journal_engine, self._engine)
            self.episodes = EpisodeStore(self._engine)
            self.settings = Settings(self._engine)
            self.outbox = Outbox(self._engine, jitter=random.random)
            self.inbox = Inbox(self._engine)
            self.blobs = BlobStore(path / "blobs")
            self.generations = GenerationStore(path, self.blobs, keep=keep_generations)
        except BaseException as error:
            for engine in engines:
                engine.dispose()
            os.close(self._lock)
            if isinstance(error, OSError):
                raise DiskFullError(f"cannot use {path}: {error.strerror or error}") from error
            raise

    @property
    def recovered(self) -> str | None:
        """What was damaged when it was opened and what is used instead; None when all was well."""
        return self.generations.recovered

    def prune(self, protect: Collection[int] = (), protect_blobs: Collection[str] = ()) -> None:
        """Remove old generations, and bundles that nothing needs any more.

        Besides what `GenerationStore.prune` keeps: bundles offered to the catalogue and not taken
        yet, and those an open episode speaks of.

        Args:
            protect: Numbers of generations that stay too.
            protect_blobs: Digests of bundles that stay too.

        Raises:
            DiskFullError: The disk failed; what was to stay is untouched.
        """
        owed = {digest for item in self.outbox.messages() for digest in _offered(item.message)}
        spoken_of = set(_DIGEST.findall(json.dumps(self.episodes.open())))
        self.generations.prune(protect, owed | spoken_of | set(protect_blobs))

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


class StateReader:
    """A state directory that is only looked at, also while an agent runs on it.

    Args:
        path: The directory.

    Raises:
        StoreError: There is no device's state there, or another version wrote it.

    Attributes:
        path: The directory.
        journal: Samples and labels.
        episodes: Episodes.
        generations: Generations; nothing is recovered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        database = path / "driftkeel.db"
        if not database.is_file():
            raise StoreError(f"{path} is no agent's state directory: it has no driftkeel.db")
        self._engine = create_engine(f"sqlite:///file:{database}?mode=ro&uri=true")
        self.journal = Journal(self._engine, self._engine)
        self.episodes = EpisodeStore(self._engine)
        blobs = BlobStore(path / "blobs", recover=False)
        self.generations = GenerationStore(path, blobs, recover=False)

    def close(self) -> None:
        """Let the files go."""
        self._engine.dispose()


def _offered(message: bytes) -> Collection[str]:
    try:
        decoded = decode_up(message)
    except WireError:
        # Of a version that this one cannot read, which does not send it either.
        return ()
    return (decoded.digest,) if isinstance(decoded, Offer) else ()


def lock_directory(directory: Path) -> int:
    """Take a directory for this process alone, until the descriptor it returns is closed.

    Raises:
        StateLockedError: Another process has it.
        OSError: The lock file cannot be made.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StateLockedError(
            f"{directory} is in use by process {holder}; stop it first, or give this one a "
            "state directory of its own"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
