"""A queue of received messages, bounded in number and in bytes, with one reader.

The network thread puts, the worker takes. A message that finds no room is dropped and counted:
devices repeat whatever matters until it is answered.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final

MAX_MESSAGES: Final = 10_000
MAX_BYTES: Final = 64 * 1024 * 1024


class Mailbox:
    """Messages that wait for the worker.

    Args:
        max_messages: How many wait at most.
        max_bytes: How large they are together, at most.
    """

    def __init__(self, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._items: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._closed = False
        self._ready = threading.Condition()
        self.dropped = 0

    def put(self, topic: str, payload: bytes) -> bool:
        """Add a message; False when there is no room for it."""
        with self._ready:
            full = len(self._items) >= self._max_messages
            if self._closed or full or self._bytes + len(payload) > self._max_bytes:
                self.dropped += 1
                return False
            self._items.append((topic, payload))
            self._bytes += len(payload)
            self._ready.notify()
            return True

    def take(self, deadline: float) -> tuple[str, bytes] | None:
        """The oldest message; None when none came by a time on the monotonic clock."""
        with self._ready:
            while not self._items:
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    return None
                self._ready.wait(left)
            topic, payload = self._items.popleft()
            self._bytes -= len(payload)
            return topic, payload

    def close(self) -> None:
        """Accept nothing more; what is here can still be taken."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    @property
    def exhausted(self) -> bool:
        """Whether it is closed and empty."""
        with self._ready:
            return self._closed and not self._items
