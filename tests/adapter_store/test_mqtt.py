"""A link comes up, stays up, keeps nothing it should not, and survives every broker."""

import logging
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store import mqtt, wire
from adapter_store.errors import WireError
from adapter_store.mqtt import Link
from cloud.broker import Broker, Kind, start_broker

WAIT_S = 20.0
Users = Mapping[str, str]
MakeLink = Callable[..., Link]
Heard = queue.Queue[tuple[str, bytes]]


@pytest.fixture
def link(broker_users: Users) -> Iterator[MakeLink]:
    """Makes started links as a user, stopped at the end."""
    made: list[Link] = []

    def make(port: int, user: str, heard: Heard | None = None, **options: Any) -> Link:
        sink: Heard = queue.Queue() if heard is None else heard
        new = Link(
            **{
                "host": "127.0.0.1",
                "port": port,
                "client_id": f"driftkeel-{user}",
                "username": user,
                "password": broker_users[user],
                "on_message": lambda topic, payload: sink.put((topic, payload)),
                **options,
            }
        )
        made.append(new)
        new.start()
        return new

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Reconnect at once; the semaphore counts the attempts that ended."""
    ended = threading.Semaphore(0)

    def soon(previous_s: float, rng: random.Random) -> float:
        ended.release()
        return 0.01

    monkeypatch.setattr(mqtt, "next_delay_s", soon)
    return ended


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def scripted(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that treats every connection as the script says; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            try:
                serve(connection)
            except OSError:
                connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            connection.close()
        thread.join(5)


def welcome(connection: socket.socket) -> None:
    """Accept the client, and acknowledge nothing after."""
    connection.recv(4096)
    connection.sendall(b"\x20\x02\x00\x00")


@given(st.floats(0, 1e6), st.integers())
def test_the_delay_is_within_its_bounds(previous_s: float, seed: int) -> None:
    delay_s = mqtt.next_delay_s(previous_s, random.Random(seed))
    assert mqtt.MIN_DELAY_S <= delay_s <= mqtt.MAX_DELAY_S


def test_the_delay_grows_to_its_bound() -> None:
    rng, delay_s, worst_s = random.Random(0), 0.0, 0.0
    for _ in range(50):
        delay_s = mqtt.next_delay_s(delay_s, rng)
        worst_s = max(worst_s, delay_s)
    assert worst_s > mqtt.MAX_DELAY_S / 2


def test_messages_travel_both_ways(broker: Broker, link: MakeLink) -> None:
    up, down = Heard(), Heard()
    catalogue = link(broker.port, "catalogue", up, subscriptions=[wire.ALL_UP])
    device = link(broker.port, "device-a", down, subscriptions=[wire.down_topic("device-a")])
    assert catalogue.wait_connected(WAIT_S)
    assert device.wait_connected(WAIT_S)
    largest = bytes(wire.MAX_MESSAGE_BYTES)
    assert device.publish(wire.up_topic("device-a"), largest)
    assert up.get(timeout=WAIT_S) == (wire.up_topic("device-a"), largest)
    assert catalogue.publish(wire.down_topic("device-a"), b"answer")
    assert down.get(timeout=WAIT_S) == (wire.down_topic("device-a"), b"answer")


def test_being_connected_means_that_answers_arrive(broker: Broker, link: MakeLink) -> None:
    """The first thing a catalogue says after on_connected reaches the device that triggered it."""
    heard = Heard()
    catalogue = link(broker.port, "catalogue")
    assert catalogue.wait_connected(WAIT_S)
    device = link(
        broker.port,
        "device-a",
        heard,
        subscriptions=[wire.down_topic("device-a")],
        on_connected=lambda: catalogue.publish(wire.down_topic("device-a"), b"hello"),
    )
    assert heard.get(timeout=WAIT_S)[1] == b"hello"
    assert device.connected


def test_a_broker_that_is_down_at_the_start_is_waited_for(
    broker_kind: Kind,
    broker_users: Users,
    link: MakeLink,
    impatient: threading.Semaphore,
    tmp_path: Path,
) -> None:
    port = free_port()
    device = link(port, "device-a")
    assert impatient.acquire(timeout=WAIT_S)
    assert not device.connected
    assert not device.publish(wire.up_topic("device-a"), b"x")
    with start_broker(tmp_path, broker_users, port=port, kind=broker_kind):
        assert device.wait_connected(WAIT_S)


def test_a_broker_that_goes_away_is_found_again(
    broker_kind: Kind,
    broker_users: Users,
    link: MakeLink,
    impatient: threading.Semaphore,
    tmp_path: Path,
) -> None:
    heard, times = Heard(), threading.Semaphore(0)
    with start_broker(tmp_path / "1", broker_users, kind=broker_kind) as first:
        device = link(
            first.port,
            "device-a",
            heard,
            subscriptions=[wire.down_topic("device-a")],
            on_connected=times.release,
        )
        assert times.acquire(timeout=WAIT_S)
        first.process.kill()
        first.process.wait()
    assert impatient.acquire(timeout=WAIT_S)
    assert not device.publish(wire.up_topic("device-a"), b"x")
    with start_broker(tmp_path / "2", broker_users, port=first.port, kind=broker_kind):
        assert times.acquire(timeout=WAIT_S)
        catalogue = link(first.port, "catalogue")
        assert catalogue.wait_connected(WAIT_S)
        assert catalogue.publish(wire.down_topic("device-a"), b"welcome back")
        assert heard.get(timeout=WAIT_S)[1] == b"welcome back"


def test_an_exception_in_a_callback_goes_no_further(
    broker: Broker, link: MakeLink, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()

    def fail_first(topic: str, payload: bytes) -> None:
        heard.put((topic, payload))
        raise RuntimeError("handler broke")

    def fail() -> None:
        raise RuntimeError("greeting broke")

    device = link(
        broker.port,
        "device-a",
        subscriptions=[wire.down_topic("device-a")],
        on_message=fail_first,
        on_connected=fail,
    )
    catalogue = link(broker.port, "catalogue")
    assert device.wait_connected(WAIT_S)
    assert catalogue.wait_connected(WAIT_S)
    for word in (b"one", b"two"):
        assert catalogue.publish(wire.down_topic("device-a"), word)
        assert heard.get(timeout=WAIT_S)[1] == word
    assert device.connected
    assert "greeting broke" in caplog.text


def test_refused_credentials_are_named_once_and_tried_again(
    broker: Broker,
    link: MakeLink,
    impatient: threading.Semaphore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = link(broker.port, "device-a", password="wrong")
    for _ in range(4):
        assert impatient.acquire(timeout=WAIT_S)
    assert not device.connected
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "device-a" in errors[0]
    assert "password" in errors[0]
    assert "wrong" not in errors[0]


def test_refused_subscriptions_are_named(
    broker_users: Users,
    link: MakeLink,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    impatient: threading.Semaphore,
) -> None:
    """Mosquitto grants every subscription and stays silent; the embedded broker says no."""
    with start_broker(tmp_path, broker_users, kind="embedded") as broker:
        device = link(broker.port, "device-a", subscriptions=[wire.down_topic("device-b")])
        assert impatient.acquire(timeout=WAIT_S)
        assert not device.connected
    assert wire.down_topic("device-b") in caplog.text


def test_too_much_unacknowledged_is_refused_not_hoarded(link: MakeLink) -> None:
    with scripted(welcome) as port:
        device = link(port, "device-a", max_in_flight=3, max_in_flight_bytes=100)
        assert device.wait_connected(WAIT_S)
        assert [device.publish("t", b"x") for _ in range(4)] == [True, True, True, False]
        device.stop()
        device = link(port, "device-a", max_in_flight=3, max_in_flight_bytes=100)
        assert device.wait_connected(WAIT_S)
        assert [device.publish("t", bytes(60)) for _ in range(2)] == [True, False]


def test_acknowledgements_make_room(broker: Broker, link: MakeLink) -> None:
    heard = Heard()
    catalogue = link(broker.port, "catalogue", heard, subscriptions=[wire.ALL_UP])
    device = link(broker.port, "device-a", max_in_flight=2)
    assert catalogue.wait_connected(WAIT_S)
    assert device.wait_connected(WAIT_S)
    for number in range(20):
        # What the catalogue heard the broker acknowledges at about the same time.
        deadline = time.monotonic() + WAIT_S
        while not device.publish(wire.up_topic("device-a"), b"%d" % number):
            assert time.monotonic() < deadline
        assert heard.get(timeout=WAIT_S)[1] == b"%d" % number


def test_nothing_of_an_earlier_connection_is_sent_again(
    link: MakeLink, impatient: threading.Semaphore
) -> None:
    """The outbox repeats what matters; a library that repeats too would send stale reports."""
    received: queue.Queue[bytes] = queue.Queue()

    def take_one(connection: socket.socket) -> None:
        welcome(connection)
        received.put(connection.recv(4096))
        connection.close()

    with scripted(take_one) as port:
        device = link(port, "device-a")
        assert device.wait_connected(WAIT_S)
        assert device.publish("t", b"stale")
        assert b"stale" in received.get(timeout=WAIT_S)
        assert impatient.acquire(timeout=WAIT_S)
        while not device.publish("t", b"fresh"):
            assert device.wait_connected(WAIT_S)
        again = received.get(timeout=WAIT_S)
        assert b"fresh" in again
        assert b"stale" not in again


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\x02\x00\x09", b""]
)
def test_a_server_that_is_no_broker_is_survived(
    greeting: bytes,
    link: MakeLink,
    impatient: threading.Semaphore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def babble(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(greeting)
        connection.close()

    with scripted(babble) as port:
        device = link(port, "device-a")
        for _ in range(3):
            assert impatient.acquire(timeout=WAIT_S)
        assert not device.connected
    assert f"127.0.0.1:{port}" in caplog.text


def test_a_server_that_never_answers_is_given_up(
    link: MakeLink,
    impatient: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mqtt, "_HANDSHAKE_TIMEOUT_S", 0.0)
    with scripted(lambda _connection: None) as port:
        link(port, "device-a")
        assert impatient.acquire(timeout=WAIT_S)
    assert "does not answer" in caplog.text


def test_small_messages_are_not_held_back(broker: Broker, link: MakeLink) -> None:
    device = link(broker.port, "device-a")
    assert device.wait_connected(WAIT_S)
    assert device._client is not None
    connection: Any = device._client.socket()
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_message_the_protocol_never_allows_is_an_error(link: MakeLink) -> None:
    device = link(free_port(), "device-a")
    with pytest.raises(WireError, match="over the limit"):
        device.publish("t", bytes(wire.MAX_MESSAGE_BYTES + 1))


def test_the_will_is_for_those_who_vanish_not_for_those_who_leave(
    broker: Broker, link: MakeLink
) -> None:
    heard = Heard()
    catalogue = link(broker.port, "catalogue", heard, subscriptions=[wire.ALL_PRESENCE])
    assert catalogue.wait_connected(WAIT_S)
    topic = wire.presence_topic("device-a")
    leaver = link(broker.port, "device-a", will=(topic, b"vanished"))
    assert leaver.wait_connected(WAIT_S)
    assert leaver.publish(topic, b"left", retain=True)
    leaver.stop()
    assert not leaver.connected
    vanisher = link(broker.port, "device-a", will=(topic, b"vanished"))
    assert vanisher.wait_connected(WAIT_S)
    assert vanisher._client is not None
    connection: Any = vanisher._client.socket()
    connection.shutdown(socket.SHUT_RDWR)
    assert [heard.get(timeout=WAIT_S)[1] for _ in range(2)] == [b"left", b"vanished"]


def test_stopping_is_possible_at_any_time(link: MakeLink, broker: Broker) -> None:
    never = Link(host="127.0.0.1", port=1, client_id="x", on_message=lambda *_: None)
    never.stop()
    waiting = link(free_port(), "device-a")
    waiting.stop()
    waiting.stop()
    itself: queue.Queue[Link] = queue.Queue()
    stopped = threading.Event()

    def stop_itself() -> None:
        itself.get(timeout=WAIT_S).stop()
        stopped.set()

    itself.put(link(broker.port, "device-b", on_connected=stop_itself))
    assert stopped.wait(WAIT_S)
