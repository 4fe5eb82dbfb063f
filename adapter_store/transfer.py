"""Chunked transfer of one bundle, as two pure state machines: who asks, and who answers.

The receiver drives: it asks for ranges (`Get`), takes chunks in any order and any number of times,
asks again for what did not come, and stops on `Missing`; it never gives up by itself. Both
directions use it: a device pulls from the catalogue, and the catalogue pulls what a device offers.
No clock, socket or file here; `adapter_store.partial` keeps the bytes.

Sketch of a receiver's use::

    for get in receiver.requests(now):
        send(get)
    ...
    data = receiver.accept(chunk, now)        # for every chunk that arrives
    if data is not None:
        keep(chunk.offset, data)
    if receiver.complete: ...                 # or receiver.failed
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from adapter_store import wire
from adapter_store.errors import StoreError, TransferError

# A bundle is some 40 KB: several chunks, so that a link that drops loses little.
DEFAULT_CHUNK_BYTES: Final = 16 * 1024
MAX_TRANSFER_BYTES: Final = 64 * 1024 * 1024
_TIMEOUT_S: Final = 2.0
_MAX_TIMEOUT_S: Final = 60.0


@dataclass(slots=True)
class _Asked:
    """A chunk that was asked for and has not come; ``again_at`` is None once it is too late."""

    first_at: float
    again_at: float | None
    attempts: int

    def overdue(self, now: float) -> bool:
        return self.again_at is not None and self.again_at <= now


class Receiver:
    """Decides what to ask for next, until every byte of a bundle is here.

    The window starts at ``window`` chunks, halves when a chunk has to be asked for again and
    grows back by one with each that arrives, so a thin link is not asked for everything twice.

    Args:
        digest: The bundle.
        size_bytes: Its size as vouched for; a chunk that says otherwise is ignored.
        rng: Source of the jitter in timeouts.
        held: Ranges ``(offset, length)`` that an earlier attempt brought.
        chunk_bytes: How much to ask for at once, at most `wire.MAX_CHUNK_BYTES`.
        window: Chunks asked for and not yet here, at most.
        timeout_s: Shortest wait before asking again; it grows with the round trips measured, and
            doubles with each attempt.
        max_size_bytes: Refuse anything larger.

    Raises:
        TransferError: The size is zero or over the limit.
    """

    def __init__(
        self,
        digest: str,
        size_bytes: int,
        *,
        rng: random.Random,
        held: Iterable[tuple[int, int]] = (),
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        window: int = 4,
        timeout_s: float = _TIMEOUT_S,
        max_size_bytes: int = MAX_TRANSFER_BYTES,
    ) -> None:
        check_size(digest, size_bytes, max_size_bytes)
        if not 1 <= chunk_bytes <= wire.MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes is {chunk_bytes}, not 1 to {wire.MAX_CHUNK_BYTES}")
        if window < 1:
            raise ValueError(f"window is {window}, not at least 1")
        self.digest = digest
        self.size_bytes = size_bytes
        self._chunk_bytes = chunk_bytes
        self._max_window = self._window = window
        self._min_timeout_s = timeout_s
        self._round_trip_s = 0.0
        self._rng = rng
        self._asked: dict[int, _Asked] = {}
        self._failed = ""
        covered = _union(held)
        # Offsets not here yet, in order; a dict for its ordered O(1) removal.
        self._wanted = dict.fromkeys(
            offset
            for offset in range(0, size_bytes, chunk_bytes)
            if not any(a <= offset and offset + self._length(offset) <= b for a, b in covered)
        )

    @property
    def complete(self) -> bool:
        """Whether every byte is here (their digest is for the keeper of the bytes to check)."""
        return not self._wanted

    @property
    def failed(self) -> str:
        """Why this transfer is over without success; empty while it is not."""
        return self._failed

    @property
    def received_bytes(self) -> int:
        """Bytes here so far, those held from the beginning included."""
        return self.size_bytes - sum(map(self._length, self._wanted))

    def requests(self, now: float) -> list[wire.Get]:
        """What to send now: the window filled, and what did not come asked for again."""
        if self._failed or self.complete:
            return []
        late = [asked for asked in self._asked.values() if asked.overdue(now)]
        if late:
            self._window = max(1, self._window // 2)
        for asked in late:
            asked.again_at = None
        pending = {offset for offset, asked in self._asked.items() if asked.again_at is not None}
        room = max(0, self._window - len(pending))
        idle = (offset for offset in self._wanted if offset not in pending)
        chosen = list(islice(idle, room))
        for offset in chosen:
            asked = self._asked.setdefault(offset, _Asked(now, None, 0))
            asked.attempts += 1
            asked.again_at = now + self._timeout_s(asked.attempts)
        return [
            wire.Get(digest=self.digest, offset=offset, length=self._length(offset))
            for offset in chosen
        ]

    def next_at(self) -> float | None:
        """When `requests` should be called again if nothing arrives; None when never."""
        if self._failed or self.complete:
            return None
        times = (asked.again_at for asked in self._asked.values())
        return min((at for at in times if at is not None), default=None)

    def accept(self, chunk: wire.Chunk, now: float) -> bytes | None:
        """Take in a chunk.

        Returns:
            The bytes to keep at ``chunk.offset``; None when the chunk is a duplicate, of another
            bundle, or not what was asked for.
        """
        if (
            self._failed
            or chunk.digest != self.digest
            or chunk.size_bytes != self.size_bytes
            or chunk.offset not in self._wanted
            or len(chunk.data) != self._length(chunk.offset)
        ):
            return None
        del self._wanted[chunk.offset]
        asked = self._asked.pop(chunk.offset, None)
        if asked is not None:
            # Which of several requests this answers is unknown: from the first one on is an upper
            # bound, which is what a link too slow for its timeouts has to be measured by.
            sample = max(0.0, now - asked.first_at)
            smoothed = 0.8 * self._round_trip_s + 0.2 * sample
            self._round_trip_s = max(sample, smoothed) if asked.attempts == 1 else smoothed
        self._window = min(self._max_window, self._window + 1)
        return chunk.data

    def lost(self, offset: int) -> None:
        """Ask for a chunk again although it came: it could not be kept."""
        if offset % self._chunk_bytes == 0 and 0 <= offset < self.size_bytes:
            self._wanted[offset] = None

    def missing(self, message: wire.Missing) -> None:
        """The other side will not send this bundle; the transfer is over."""
        if message.digest == self.digest and not self.complete:
            self._failed = message.reason or "the other side does not have it"

    def reconnected(self) -> None:
        """Whatever was on its way is lost; ask again at once, with patience renewed."""
        self._asked.clear()
        self._window = self._max_window

    def _length(self, offset: int) -> int:
        return min(self._chunk_bytes, self.size_bytes - offset)

    def _timeout_s(self, attempts: int) -> float:
        patience_s = max(self._min_timeout_s, 3.0 * self._round_trip_s) * 2.0 ** min(
            attempts - 1, 10
        )
        return min(_MAX_TIMEOUT_S, patience_s) * self._rng.uniform(1.0, 1.25)


def check_size(digest: str, size_bytes: int, max_size_bytes: int = MAX_TRANSFER_BYTES) -> None:
    """Refuse a bundle that cannot be transferred.

    Raises:
        TransferError: The size is zero or over the limit.
    """
    if not 1 <= size_bytes <= max_size_bytes:
        raise TransferError(
            f"bundle {digest[:12]} is said to have {size_bytes} bytes; "
            f"1 to {max_size_bytes} can be transferred"
        )


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges ``(offset, length)`` as disjoint intervals ``[start, end)``."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((offset, offset + length) for offset, length in ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class Sender:
    """Answers `Get`; whether the asker may have the bundle is decided before.

    Args:
        read: Gives a bundle's bytes by digest; a `StoreError` means it cannot be had.
        cache_bytes: Keep the bundles served last up to this size in memory, since every chunk
            of a bundle is asked for separately.
    """

    def __init__(
        self, read: Callable[[str], bytes], *, cache_bytes: int = 16 * 1024 * 1024
    ) -> None:
        self._read = read
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, bytes] = OrderedDict()

    def answer(self, get: wire.Get) -> wire.Chunk | wire.Missing:
        """The chunk asked for, or why there is none and never will be."""
        try:
            data = self._bundle(get.digest)
        except StoreError as error:
            return wire.Missing(digest=get.digest, reason=str(error)[:2000])
        if get.offset >= len(data):
            return wire.Missing(
                digest=get.digest,
                reason=f"offset {get.offset} is beyond the bundle's {len(data)} bytes",
            )
        return wire.Chunk(
            digest=get.digest,
            offset=get.offset,
            size_bytes=len(data),
            data=data[get.offset : get.offset + get.length],
        )

    def forget(self, digest: str) -> None:
        """Read this bundle anew the next time it is asked for."""
        self._cache.pop(digest, None)

    def _bundle(self, digest: str) -> bytes:
        data = self._cache.get(digest)
        if data is None:
            data = self._cache[digest] = self._read(digest)
        self._cache.move_to_end(digest)
        while len(self._cache) > 1 and sum(map(len, self._cache.values())) > self._cache_bytes:
            self._cache.popitem(last=False)
        return data
