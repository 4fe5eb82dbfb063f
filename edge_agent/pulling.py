"""Fetching one bundle at a time from the catalogue, over whatever link there is.

A thin shell around the transfer's state machine and its partial file: chunks survive a restart,
silence ends in a failure that may be tried again, and only whole, matching bytes reach the blob
store. Everything runs on the conductor's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapter_store.blobs import BlobStore
from adapter_store.errors import DiskFullError, TransferError
from adapter_store.transfer import PartialFile, Receiver, partial_files
from adapter_store.wire import Chunk, Get, Missing
from edge_agent.episode_events import CandidateFailed, CandidatePulled

_TICK_S: Final = 0.5
_SILENCE_S: Final = 60.0
_LARGEST_BYTES: Final = 64 * 1024 * 1024

Done = Callable[[CandidatePulled | CandidateFailed], None]

log = logging.getLogger(__name__)


@dataclass
class _Pull:
    receiver: Receiver
    file: PartialFile
    done: Done
    heard_at: float


class Puller:
    """Pulls bundles into the blob store.

    Args:
        incoming: Directory for partial bundles.
        blobs: Where whole ones go.
        send: Sends a message; False when there is no link.
        after: Runs a function some seconds later on the same thread.
        silence_s: Seconds without a chunk after which a pull fails for now.
        clock: A monotonic clock.
    """

    def __init__(
        self,
        incoming: Path,
        blobs: BlobStore,
        send: Callable[[Get], bool],
        after: Callable[[float, Callable[[], None]], None],
        *,
        silence_s: float = _SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._incoming = incoming
        self._blobs = blobs
        self._send = send
        self._after = after
        self._silence_s = silence_s
        self._clock = clock
        self._pull: _Pull | None = None

    def pull(self, digest: str, size_bytes: int, done: Done) -> None:
        """Fetch a bundle, carrying on with what is here; a pull under way is given up for it."""
        current = self._pull
        if current is not None and current.receiver.digest == digest:
            current.done = done
            return
        self.cancel()
        if not 1 <= size_bytes <= _LARGEST_BYTES:
            done(CandidateFailed(digest, f"its size of {size_bytes} bytes is absurd"))
            return
        for other, size in partial_files(self._incoming):
            if other != digest:
                PartialFile(self._incoming, other, size).discard()
        file = PartialFile(self._incoming, digest, size_bytes)
        receiver = Receiver(digest, size_bytes, file.have())
        self._pull = _Pull(receiver, file, done, self._clock())
        if receiver.complete:
            self._finish(self._pull)
        else:
            self._ask()
            self._tick(self._pull)

    def cancel(self) -> None:
        """Give up the pull under way, without a word; what came stays for another time."""
        self._pull = None

    def reconnected(self) -> None:
        """Ask again at once for what was under way when the link was lost."""
        if self._pull is not None:
            self._pull.receiver.restart()
            self._ask()

    def chunk(self, chunk: Chunk) -> None:
        """Take a chunk; one that nobody asked for is passed over."""
        pull = self._pull
        if pull is None or chunk.digest != pull.receiver.digest:
            return
        index = chunk.offset // pull.receiver.chunk_bytes
        if index in pull.receiver.have:
            return
        try:
            fresh = pull.receiver.accept(chunk)
        except TransferError as error:
            log.warning("a chunk was ignored: %s", error)
            return
        if fresh:
            try:
                pull.file.write(chunk)
            except DiskFullError as error:
                self._end(CandidateFailed(chunk.digest, str(error), for_good=False))
                return
        pull.heard_at = self._clock()
        if pull.receiver.complete:
            self._finish(pull)
        else:
            self._ask()

    def missing(self, message: Missing) -> None:
        """The catalogue does not give it (any more): asking again is pointless."""
        pull = self._pull
        if pull is not None and message.digest == pull.receiver.digest:
            pull.file.discard()
            self._end(CandidateFailed(message.digest, f"not available: {message.reason}"))

    def progress(self) -> dict[str, Any] | None:
        """What is being pulled, as JSON-able values."""
        pull = self._pull
        if pull is None:
            return None
        receiver = pull.receiver
        return {
            "digest": receiver.digest,
            "chunks": receiver.chunks,
            "chunks_here": len(receiver.have),
        }

    def _ask(self) -> None:
        if self._pull is not None:
            for get in self._pull.receiver.requests(self._clock()):
                # What is not sent now is overdue later, and asked for again.
                self._send(get)

    def _tick(self, pull: _Pull) -> None:
        if self._pull is not pull:
            return
        if self._clock() - pull.heard_at > self._silence_s:
            reason = f"no chunk came for {self._silence_s:g} s"
            self._end(CandidateFailed(pull.receiver.digest, reason, for_good=False))
            return
        self._ask()
        self._after(_TICK_S, lambda: self._tick(pull))

    def _finish(self, pull: _Pull) -> None:
        digest = pull.receiver.digest
        try:
            self._blobs.put(pull.file.finish())
        except TransferError as error:
            self._end(CandidateFailed(digest, str(error)))
        except (DiskFullError, OSError) as error:
            self._end(CandidateFailed(digest, str(error), for_good=False))
        else:
            pull.file.discard()
            self._end(CandidatePulled(digest))

    def _end(self, event: CandidatePulled | CandidateFailed) -> None:
        pull, self._pull = self._pull, None
        if pull is not None:
            pull.done(event)
