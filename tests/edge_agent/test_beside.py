"""A value computed beside the caller is the value, where it is begun and where it is not."""

import os
import threading

import pytest

from edge_agent.beside import Beside


@pytest.fixture(params=[1, 4])
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Beside:
    """Where there is no idle core, and where there is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(request.param)))
    return Beside(threads=1)


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_it_is_computed_once_however_often_it_is_begun(beside: Beside, begin: int) -> None:
    computed: list[int] = []

    def compute() -> int:
        computed.append(1)
        return 7

    later = beside.later(compute)
    for _ in range(begin):
        later.begin()
    assert later.value() == 7
    assert computed == [1]


def test_an_error_is_raised_where_the_value_is_wanted(beside: Beside) -> None:
    def compute() -> int:
        raise ValueError("no")

    later = beside.later(compute)
    later.begin()
    with pytest.raises(ValueError, match="no"):
        later.value()


def test_with_an_idle_core_the_caller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    caller_went_on = threading.Event()
    later = Beside(threads=1).later(lambda: caller_went_on.wait(30))
    later.begin()
    caller_went_on.set()
    assert later.value() is True


def test_without_one_nothing_runs_until_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    threads: list[threading.Thread] = []
    later = Beside(threads=1).later(lambda: threads.append(threading.current_thread()))
    later.begin()
    assert threads == []
    later.value()
    assert threads == [threading.current_thread()]
