"""The queue before the worker is bounded in number and in bytes."""

import threading
import time

from cloud.mailbox import Mailbox

PAST = 0.0


def test_messages_come_out_in_order() -> None:
    mailbox = Mailbox()
    for number in range(3):
        assert mailbox.put("t", b"%d" % number)
    assert [mailbox.take(PAST) for _ in range(4)] == [
        ("t", b"0"),
        ("t", b"1"),
        ("t", b"2"),
        None,
    ]


def test_what_finds_no_room_is_dropped_and_counted() -> None:
    mailbox = Mailbox(max_messages=2, max_bytes=10)
    assert mailbox.put("t", b"12345678")
    assert not mailbox.put("t", b"123")
    assert mailbox.put("t", b"12")
    assert not mailbox.put("t", b"")
    assert mailbox.dropped == 2
    mailbox.take(PAST)
    assert mailbox.put("t", b"12345678")


def test_taking_waits_for_what_comes_from_another_thread() -> None:
    mailbox = Mailbox()
    thread = threading.Thread(target=mailbox.put, args=("t", b"x"))
    thread.start()
    assert mailbox.take(time.monotonic() + 30) == ("t", b"x")
    thread.join()


def test_a_closed_one_gives_what_it_has_and_takes_no_more() -> None:
    mailbox = Mailbox()
    mailbox.put("t", b"x")
    mailbox.close()
    assert not mailbox.put("t", b"y")
    assert not mailbox.exhausted
    assert mailbox.take(time.monotonic() + 30) == ("t", b"x")
    assert mailbox.exhausted
    assert mailbox.take(time.monotonic() + 30) is None
