"""Requests that wait at the same time are answered in one batch.

A caller that finds nobody at work works itself, at once, so a lone request pays nothing. Those that
come meanwhile queue up, and one of them takes all that may go together for the next batch: under
load, samples share encoder passes and journal writes. Nothing here knows what a sample is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Weight of the newest batch in the running estimate of what a row costs.
_NEWEST: Final = 0.2


@dataclass(eq=False)
class _Request(Generic[Item, Result]):
    """One call in the queue."""

    item: Item
    rows: int
    kind: Hashable
    results: list[Result] = field(default_factory=list)
    error: Exception | None = None
    done: bool = False


class Batcher(Generic[Item, Result]):
    """Answers requests in batches, in the order in which they came; thread-safe.

    Args:
        answer: ``answer(items, kind)`` gives one result for each of the items. When it raises for
            several of them, each is asked alone, so that only the one at fault fails.
        max_batch_s: About how long one batch may take, in seconds, judged by what a row took so
            far: the most that joining a batch adds to a request's latency. A request that takes
            longer by itself is a batch of its own.
        clock: Seconds that only grow.

    Example:
        >>> batcher = Batcher(lambda items, kind: [item * 2 for item in items])
        >>> batcher(21, rows=1)
        42
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Item], Hashable], Sequence[Result]],
        *,
        max_batch_s: float = 0.1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._answer = answer
        self._max_batch_s = max_batch_s
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[_Request[Item, Result]] = deque()
        self._working = False
        self._row_s = 0.0

    def __call__(self, item: Item, *, rows: int, kind: Hashable = None) -> Result:
        """Have one item answered, with others or alone; blocks until it is.

        Args:
            item: What to answer.
            rows: What it counts for in a batch.
            kind: Only items of equal kinds go together.
        """
        request: _Request[Item, Result] = _Request(item, rows, kind)
        with self._changed:
            self._queue.append(request)
        while not request.done:
            with self._changed:
                while self._working and not request.done:
                    self._changed.wait()
                if request.done:
                    break
                self._working = True
                batch = self._next()
            self._run(batch)
        if request.error is not None:
            raise request.error
        return request.results[0]

    @property
    def waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._queue)

    def _next(self) -> list[_Request[Item, Result]]:
        """Take the first request and those behind it that may go with it."""
        batch = [self._queue.popleft()]
        rows = batch[0].rows
        while self._queue:
            following = self._queue[0]
            rows += following.rows
            if following.kind != batch[0].kind or rows * self._row_s > self._max_batch_s:
                break
            batch.append(self._queue.popleft())
        return batch

    def _run(self, batch: Sequence[_Request[Item, Result]]) -> None:
        started = self._clock()
        try:
            self._answered(batch)
        finally:
            took_s = (self._clock() - started) / max(sum(request.rows for request in batch), 1)
            with self._changed:
                self._row_s += (_NEWEST if self._row_s else 1.0) * (took_s - self._row_s)
                self._working = False
                for request in batch:
                    request.done = True
                self._changed.notify_all()

    def _answered(self, batch: Sequence[_Request[Item, Result]]) -> None:
        try:
            results = self._answer([request.item for request in batch], batch[0].kind)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller handles it
            if len(batch) == 1:
                batch[0].error = error
                return
            for request in batch:
                self._answered([request])
            return
        for request, result in zip(batch, results, strict=True):
            request.results = [result]
