"""Requests share batches when they wait together, and fail alone."""

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from edge_agent.batching import Batcher


class Gate:
    """Doubles numbers, notes the batches, and can be made to wait inside one."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.entered, self.open = threading.Semaphore(0), threading.Event()
        self.open.set()

    def __call__(self, items: Sequence[int], kind: Hashable) -> list[int]:
        del kind
        self.batches.append(tuple(items))
        self.entered.release()
        assert self.open.wait(60)
        if 13 in items:
            raise ValueError("13 is no number")
        return [item * 2 for item in items]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def pool() -> ThreadPoolExecutor:
    with ThreadPoolExecutor(16) as workers:
        yield workers


def queued(
    gate: Gate,
    pool: ThreadPoolExecutor,
    batcher: Batcher[int, int],
    items: Sequence[int],
    kinds: Sequence[Hashable] = (),
) -> list[Future[int]]:
    """Submits the first item and, while that one is being answered, the others in order."""
    gate.open.clear()
    futures = [pool.submit(batcher, items[0], rows=1)]
    assert gate.entered.acquire(timeout=60)
    for count, item in enumerate(items[1:]):
        kind = kinds[count] if kinds else None
        futures.append(pool.submit(batcher, item, rows=1, kind=kind))
        while batcher.waiting <= count:
            threading.Event().wait(0.001)
    return futures


def test_a_lone_request_is_a_batch_of_its_own(gate) -> None:
    batcher = Batcher(gate)
    assert [batcher(item, rows=1) for item in (1, 2, 3)] == [2, 4, 6]
    assert gate.batches == [(1,), (2,), (3,)]


def test_requests_that_wait_together_are_answered_together(gate, pool) -> None:
    batcher = Batcher(gate, clock=lambda: 0.0)
    futures = queued(gate, pool, batcher, range(6))
    gate.open.set()
    assert [future.result(60) for future in futures] == [0, 2, 4, 6, 8, 10]
    assert gate.batches == [(0,), (1, 2, 3, 4, 5)]
    assert batcher.waiting == 0


def test_kinds_are_not_mixed_and_keep_their_order(gate, pool) -> None:
    batcher = Batcher(gate, clock=lambda: 0.0)
    futures = queued(gate, pool, batcher, range(5), kinds=("a", "a", "b", "a"))
    gate.open.set()
    for future in futures:
        future.result(60)
    assert gate.batches == [(0,), (1, 2), (3,), (4,)]


def test_a_batch_is_no_longer_than_the_latency_bound(gate, pool) -> None:
    ticks = iter(range(10_000))
    # Each batch seems to take one second; a row of the first one took one second, too.
    batcher = Batcher(gate, max_batch_s=2.0, clock=lambda: float(next(ticks)))
    batcher(7, rows=1)
    assert gate.entered.acquire(timeout=60)
    futures = queued(gate, pool, batcher, range(4))
    gate.open.set()
    for future in futures:
        future.result(60)
    assert gate.batches == [(7,), (0,), (1, 2), (3,)]


def test_only_the_request_at_fault_fails(gate, pool) -> None:
    batcher = Batcher(gate, clock=lambda: 0.0)
    futures = queued(gate, pool, batcher, [1, 2, 13, 4])
    gate.open.set()
    assert [futures[k].result(60) for k in (0, 1, 3)] == [2, 4, 8]
    with pytest.raises(ValueError, match="13 is no number"):
        futures[2].result(60)


def test_a_thousand_requests_from_many_threads_are_each_answered_once(gate, pool) -> None:
    batcher = Batcher(gate)
    futures = [pool.submit(batcher, item, rows=1) for item in range(100, 1100)]
    assert [future.result(60) for future in futures] == [2 * item for item in range(100, 1100)]
    assert sorted(item for batch in gate.batches for item in batch) == list(range(100, 1100))
