"""Fetching one bundle at a time from the catalogue, over whatever link there is.

A thin shell around `adapter_store.partial.Download`: chunks survive a restart, silence ends in a
failure that may be tried again, and only whole, matching bytes reach the blob store. Everything
runs on the conductor's thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapter_store.blobs import BlobStore
from adapter_store.errors import CorruptBundleError, DiskFullError, TransferError
from adapter_store.partial import Download, sweep
from adapter_store.wire import Chunk, Get, Missing
from edge_agent.episode_events import CandidateFailed, CandidatePulled

_TICK_S: Final = 0.5
_SILENCE_S: Final = 60.0

Done = Callable[[CandidatePulled | CandidateFailed], None]


@dataclass
class _Pull:
    download: Download
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
        self._rng = random.Random()
        self._pull: _Pull | None = None

    def pull(self, digest: str, size_bytes: int, done: Done) -> None:
        """Fetch a bundle, carrying on with what is here; a pull under way is given up for it."""
        if self._pull is not None and self._pull.download.digest == digest:
            self._pull.done = done
            return
        self.cancel()
        sweep(self._incoming, keep=(digest,))
        try:
            download = Download(self._incoming, digest, size_bytes, rng=self._rng)
        except TransferError as error:
            done(CandidateFailed(digest, str(error)))
            return
        except DiskFullError as error:
            done(CandidateFailed(digest, str(error), for_good=False))
            return
        self._pull = _Pull(download, done, self._clock())
        if download.complete:
            self._finish(self._pull)
        else:
            self._tick(self._pull)

    def cancel(self) -> None:
        """Give up the pull under way, without a word; what came stays for another time."""
        self._pull = None

    def reconnected(self) -> None:
        """Ask again at once for what was under way when the link was lost."""
        if self._pull is not None:
            self._pull.download.reconnected()
            self._ask(self._pull)

    def chunk(self, chunk: Chunk) -> None:
        """Take a chunk; one that nobody asked for is passed over."""
        pull = self._pull
        if pull is None:
            return
        try:
            if not pull.download.accept(chunk, self._clock()):
                return
        except DiskFullError as error:
            self._end(CandidateFailed(chunk.digest, str(error), for_good=False))
            return
        pull.heard_at = self._clock()
        if pull.download.complete:
            self._finish(pull)
        else:
            self._ask(pull)

    def missing(self, message: Missing) -> None:
        """The catalogue does not give it (any more): asking again is pointless."""
        pull = self._pull
        if pull is not None and message.digest == pull.download.digest:
            pull.download.discard()
            self._end(CandidateFailed(message.digest, f"not available: {message.reason}"))

    def progress(self) -> dict[str, Any] | None:
        """What is being pulled, as JSON-able values."""
        pull = self._pull
        if pull is None:
            return None
        return {
            "digest": pull.download.digest,
            "size_bytes": pull.download.size_bytes,
            "received_bytes": pull.download.received_bytes,
        }

    def _ask(self, pull: _Pull) -> None:
        for get in pull.download.requests(self._clock()):
            # What cannot be sent now is overdue later, and asked for again.
            self._send(get)

    def _tick(self, pull: _Pull) -> None:
        if self._pull is not pull:
            return
        self._ask(pull)
        silent = self._clock() - pull.heard_at > self._silence_s
        if pull.download.failed or silent:
            reason = pull.download.failed or f"no chunk came for {self._silence_s:g} s"
            self._end(CandidateFailed(pull.download.digest, reason, for_good=False))
            return
        self._after(_TICK_S, lambda: self._tick(pull))

    def _finish(self, pull: _Pull) -> None:
        digest = pull.download.digest
        try:
            self._blobs.put(pull.download.finish())
        except CorruptBundleError as error:
            self._end(CandidateFailed(digest, str(error)))
        except (DiskFullError, TransferError) as error:
            self._end(CandidateFailed(digest, str(error), for_good=False))
        else:
            pull.download.discard()
            self._end(CandidatePulled(digest))

    def _end(self, event: CandidatePulled | CandidateFailed) -> None:
        pull, self._pull = self._pull, None
        if pull is not None:
            pull.done(event)
