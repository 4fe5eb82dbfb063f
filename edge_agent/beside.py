"""One function's value, computed beside the caller where another core is idle.

While an adapter's suffix runs, ONNX Runtime holds no lock of Python's and a device with two cores
has one that waits: the shift score, which needs neither, is computed there. Called by
`edge_agent.serving` for every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from edge_agent.runtime_settings import cores

T = TypeVar("T")


class Beside:
    """A thread to compute in, where there is a core for it.

    Args:
        threads: Threads that the caller's own work keeps busy.
    """

    def __init__(self, *, threads: int) -> None:
        self._pool = ThreadPoolExecutor(1, "beside") if cores() > threads else None

    def later(self, compute: Callable[[], T]) -> Later[T]:
        """A value that is computed when it is asked for, or before, once it is begun."""
        return Later(compute, self._pool)


class Later(Generic[T]):
    """A value still to be computed; for one thread.

    Args:
        compute: Gives the value.
        pool: Where it can be begun; None for nowhere.
    """

    def __init__(self, compute: Callable[[], T], pool: ThreadPoolExecutor | None) -> None:
        self._compute = compute
        self._pool = pool
        self._future: Future[T] | None = None

    def begin(self) -> None:
        """Start computing beside the caller, if that is possible; asked again, it does nothing."""
        if self._future is None and self._pool is not None:
            self._future = self._pool.submit(self._compute)

    def value(self) -> T:
        """The value; what computing it raises is raised here."""
        return self._compute() if self._future is None else self._future.result()
