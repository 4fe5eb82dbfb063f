"""One thread that runs functions one after another: posted ones at once, timers when they are due.

The conductor's. It knows nothing of what it runs; a function that fails is logged and the next one
runs.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

Task = Callable[[], None]

log = logging.getLogger(__name__)


class EventLoop:
    """Runs functions on a thread of its own.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Task]] = []
        self._count = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to run what was posted and what will be."""
        self._thread.start()

    def stop(self) -> None:
        """Run what was posted before, then end; timers that are not due are dropped."""
        self.post(self._end)
        if self._thread.is_alive():
            self._thread.join()

    def post(self, task: Task) -> None:
        """Run a function soon; from any thread."""
        self._queue.put(task)

    def after(self, seconds: float, task: Task) -> None:
        """Run a function some seconds later; called on the loop's thread only."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), task))

    def _run(self) -> None:
        while not self._stopping:
            try:
                wait = self._timers[0][0] - time.monotonic() if self._timers else None
                if wait is not None and wait <= 0:
                    task = heapq.heappop(self._timers)[2]
                else:
                    task = self._queue.get(timeout=wait)
            except queue.Empty:
                continue
            try:
                task()
            except Exception:
                log.exception("an event could not be handled")

    def _end(self) -> None:
        self._stopping = True
