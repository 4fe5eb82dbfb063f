"""What is owed is sent until it is acknowledged, through restarts and clocks that jump."""

import pytest

from adapter_store.outbox import Counts, Inbox, Outbox
from adapter_store.state import StateDir


@pytest.fixture
def outbox(state) -> Outbox:
    return Outbox(state._engine, jitter=lambda: 1.0)


def due(outbox, now, limit=10) -> list[str]:
    return [owed.id for owed in outbox.due(now, limit)]


def test_messages_are_due_at_once_in_the_order_they_were_put(outbox) -> None:
    for name in ("c", "a", "b"):
        outbox.put(name, name.encode(), "offer")
    assert due(outbox, 0.0) == ["c", "a", "b"]
    assert due(outbox, 0.0, limit=2) == ["c", "a"]
    first = outbox.due(0.0, 1)[0]
    assert (first.message, first.kind, first.attempts) == (b"c", "offer", 0)


def test_a_message_is_sent_again_ever_less_often_until_it_is_acknowledged(outbox) -> None:
    outbox.put("a", b"x", "offer")
    now, waits = 1000.0, []
    for _ in range(12):
        assert due(outbox, now) == ["a"]
        outbox.sent("a", now)
        assert due(outbox, now) == []
        wait = (
            next(w for w in (2.0**k for k in range(1, 9)) if due(outbox, now + w))
            if (len(waits) < 8)
            else 300.0
        )
        waits.append(wait)
        now += wait
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0, 300.0, 300.0]
    assert outbox.acknowledged("a")
    assert due(outbox, now) == []


def test_jitter_spreads_the_retries(state) -> None:
    outbox = Outbox(state._engine, jitter=lambda: 0.0)
    outbox.put("a", b"x", "offer")
    outbox.sent("a", 100.0)
    assert due(outbox, 100.9) == []
    assert due(outbox, 101.0) == ["a"]


def test_acknowledging_twice_or_something_unknown_is_fine(outbox) -> None:
    outbox.put("a", b"x", "offer")
    assert outbox.acknowledged("a")
    assert not outbox.acknowledged("a")
    outbox.sent("a", 0.0)
    assert len(outbox) == 0


def test_the_same_id_is_owed_once_and_keeps_its_schedule(outbox) -> None:
    outbox.put("a", b"x", "offer")
    outbox.sent("a", 100.0)
    outbox.put("a", b"x", "offer")
    assert len(outbox) == 1
    assert due(outbox, 100.0) == []


def test_of_messages_with_one_key_only_the_newest_is_owed(outbox) -> None:
    outbox.put("r1", b"1", "report", key="report")
    outbox.put("o", b"o", "offer")
    outbox.sent("r1", 0.0)
    outbox.put("r2", b"2", "report", key="report")
    assert due(outbox, 0.0) == ["o", "r2"]
    assert not outbox.acknowledged("r1")
    assert len(outbox) == 2


def test_debts_survive_a_restart_with_their_schedule(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        state.outbox.put("a", b"x", "offer")
        state.outbox.put("b", b"y", "offer")
        state.outbox.sent("a", 50.0)
    with StateDir(tmp_path) as state:
        assert due(state.outbox, 50.0) == ["b"]
        assert due(state.outbox, 60.0) == ["a", "b"]


def test_a_reconnection_makes_everything_due(outbox) -> None:
    outbox.put("a", b"x", "offer")
    outbox.sent("a", 100.0)
    outbox.retry_all()
    assert due(outbox, 100.0) == ["a"]


def test_a_clock_that_jumps_back_ten_years_holds_nothing_up(outbox) -> None:
    ten_years = 10 * 365 * 86400.0
    outbox.put("a", b"x", "offer")
    outbox.sent("a", ten_years)
    assert due(outbox, 0.0) == ["a"]
    outbox.sent("a", 0.0)
    assert due(outbox, 0.0) == []
    assert due(outbox, ten_years) == ["a"]


def test_what_is_owed_is_counted(outbox) -> None:
    assert outbox.counts() == Counts(owed=0, unsent=0, most_attempts=0)
    for name in ("a", "b"):
        outbox.put(name, b"x", "offer")
    for _ in range(3):
        outbox.sent("a", 0.0)
    assert outbox.counts() == Counts(owed=2, unsent=1, most_attempts=3)
    assert [owed.id for owed in outbox.messages()] == ["a", "b"]


def test_the_inbox_knows_what_was_acted_on_through_restarts(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        assert not state.inbox.seen("m")
        assert state.inbox.first_time("m")
        assert not state.inbox.first_time("m")
    with StateDir(tmp_path) as state:
        assert state.inbox.seen("m")
        assert not state.inbox.first_time("m")


def test_the_inbox_forgets_only_the_oldest(state, monkeypatch) -> None:
    monkeypatch.setattr("adapter_store.outbox._INBOX_KEPT", 3)
    inbox = Inbox(state._engine)
    for name in "abcde":
        inbox.first_time(name)
    assert [inbox.seen(name) for name in "abcde"] == [False, False, True, True, True]
