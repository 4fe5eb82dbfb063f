"""Functions run one after another on one thread, whatever each of them does."""

import threading

from edge_agent.event_loop import EventLoop


def test_what_was_posted_runs_in_order_on_one_thread_before_it_ends() -> None:
    loop, ran = EventLoop("test"), []
    for k in range(20):
        loop.post(lambda k=k: ran.append((k, threading.current_thread().name)))
    loop.start()
    loop.stop()
    assert ran == [(k, "test") for k in range(20)]


def test_a_function_that_fails_is_logged_and_the_next_one_runs(caplog) -> None:
    loop, ran = EventLoop("test"), []
    loop.post(lambda: 1 // 0)
    loop.post(lambda: ran.append("next"))
    loop.start()
    loop.stop()
    assert ran == ["next"]
    assert "ZeroDivisionError" in caplog.text


def test_timers_run_in_the_order_they_are_due_and_those_not_due_are_dropped() -> None:
    loop, ran, done = EventLoop("test"), [], threading.Event()

    def begin() -> None:
        loop.after(3600.0, lambda: ran.append("never"))
        loop.after(0.02, done.set)
        loop.after(0.01, lambda: ran.append("later"))
        loop.after(0.0, lambda: ran.append("sooner"))

    loop.post(begin)
    loop.start()
    assert done.wait(60.0)
    loop.stop()
    assert ran == ["sooner", "later"]


def test_one_that_was_never_started_can_be_stopped() -> None:
    before = threading.active_count()
    EventLoop("test").stop()
    assert threading.active_count() == before
