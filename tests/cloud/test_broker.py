"""Either broker keeps devices apart, tells of the vanished, and survives its clients."""

import json
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from adapter_store import wire
from adapter_store.errors import WireError
from cloud import broker as brokers
from cloud.broker import Broker, BrokerError, Kind, choose_kind, start_broker

WAIT_S = 20.0
Users = Mapping[str, str]


class Peer:
    """A plain MQTT client that hears everything into a queue, and does not reconnect."""

    def __init__(
        self,
        port: int,
        user: str,
        password: str,
        *,
        client_id: str = "",
        will: str = "",
        keepalive_s: int = 60,
    ) -> None:
        self.heard: queue.Queue[MQTTMessage] = queue.Queue()
        self.refusal: str | None = None
        self.gone = threading.Event()
        self.dealt = threading.Event()
        self._answered = threading.Event()
        self._granted = threading.Event()
        self.client = Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, reconnect_on_failure=False
        )
        if user:
            self.client.username_pw_set(user, password)
        if will:
            self.client.will_set(will, b"gone", qos=1, retain=True)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = lambda *_: self._granted.set()
        self.client.on_disconnect = self._on_disconnect
        self.client.on_publish = lambda *_: self.dealt.set()
        self.client.on_message = lambda _client, _data, message: self.heard.put(message)
        self.client.connect("127.0.0.1", port, keepalive_s)
        self.client.loop_start()
        assert self._answered.wait(WAIT_S)

    def _on_connect(self, _: Client, __: object, ___: object, code: Any, ____: object) -> None:
        self.refusal = str(code) if code.is_failure else None
        self._answered.set()

    def _on_disconnect(self, *_: object) -> None:
        self.gone.set()
        self.dealt.set()

    def subscribe(self, *topics: str) -> None:
        for topic in topics:
            self._granted.clear()
            self.client.subscribe(topic, 1)
            assert self._granted.wait(WAIT_S)

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish, and wait until the broker has dealt with it."""
        info = self.client.publish(topic, payload, qos=1, retain=retain)
        info.wait_for_publish(WAIT_S)
        assert info.is_published()

    def presume(self, topic: str, payload: bytes) -> None:
        """Publish what may not be; wait until it is passed over, or the broker hangs up."""
        self.dealt.clear()
        self.client.publish(topic, payload, qos=1, retain=True)
        assert self.dealt.wait(WAIT_S)

    def next(self) -> tuple[str, bytes]:
        message = self.heard.get(timeout=WAIT_S)
        return message.topic, message.payload

    def vanish(self) -> None:
        """Cut the connection without a word."""
        connection: Any = self.client.socket()
        connection.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


Join = Callable[..., Peer]


@pytest.fixture
def join(broker: Broker, broker_users: Users) -> Iterator[Join]:
    """Connects a user to the broker."""
    peers: list[Peer] = []

    def connect(user: str, **options: Any) -> Peer:
        peers.append(Peer(broker.port, user, **{"password": broker_users.get(user, ""), **options}))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.leave()


def test_every_user_speaks_on_its_own_topics(join: Join) -> None:
    catalogue, a, b = join("catalogue"), join("device-a"), join("device-b")
    catalogue.subscribe(wire.ALL_UP, wire.ALL_PRESENCE)
    for peer, name in ((a, "device-a"), (b, "device-b")):
        peer.subscribe(wire.down_topic(name))
        peer.say(wire.up_topic(name), b"question")
        assert catalogue.next() == (wire.up_topic(name), b"question")
        peer.say(wire.presence_topic(name), b"online", retain=True)
        assert catalogue.next() == (wire.presence_topic(name), b"online")
        catalogue.say(wire.down_topic(name), b"answer")
        assert peer.next() == (wire.down_topic(name), b"answer")


def test_a_device_cannot_listen_to_another(join: Join) -> None:
    spy, catalogue, b = join("device-a"), join("catalogue"), join("device-b")
    b.say(wire.presence_topic("device-b"), b"online", retain=True)
    spy.subscribe("#", "+/#", wire.down_topic("device-b"), wire.ALL_UP, wire.ALL_PRESENCE)
    spy.subscribe("driftkeel/v1/down/+", wire.down_topic("device-a"))
    catalogue.subscribe(wire.ALL_UP)
    b.say(wire.up_topic("device-b"), b"secret")
    assert catalogue.next()[1] == b"secret"
    catalogue.say(wire.down_topic("device-b"), b"secret")
    catalogue.say(wire.down_topic("device-a"), b"own")
    assert spy.next() == (wire.down_topic("device-a"), b"own")


def test_a_device_cannot_speak_for_another_or_for_the_catalogue(join: Join) -> None:
    catalogue, b = join("catalogue"), join("device-b")
    catalogue.subscribe(wire.ALL_UP, wire.ALL_PRESENCE)
    b.subscribe(wire.down_topic("device-b"))
    for topic in (
        wire.up_topic("device-b"),
        wire.presence_topic("device-b"),
        wire.down_topic("device-b"),
    ):
        join("device-a").presume(topic, b"lie")
    honest = join("device-a")
    honest.say(wire.up_topic("device-a"), b"truth")
    assert catalogue.next() == (wire.up_topic("device-a"), b"truth")
    catalogue.say(wire.down_topic("device-b"), b"truth")
    assert b.next() == (wire.down_topic("device-b"), b"truth")
    late = join("catalogue")
    late.subscribe(wire.ALL_UP, wire.ALL_PRESENCE)
    honest.say(wire.up_topic("device-a"), b"end")
    assert late.next() == (wire.up_topic("device-a"), b"end")


def test_a_will_cannot_be_left_in_anothers_name(join: Join) -> None:
    catalogue = join("catalogue")
    catalogue.subscribe(wire.ALL_PRESENCE)
    liar = join("device-a", will=wire.presence_topic("device-b"))
    if liar.refusal is None:
        liar.vanish()
        assert liar.gone.wait(WAIT_S)
    b = join("device-b")
    b.say(wire.presence_topic("device-b"), b"online")
    assert catalogue.next()[1] == b"online"


@pytest.mark.parametrize(
    ("user", "password"),
    [("device-a", "wrong"), ("device-a", ""), ("nobody", "x"), ("", ""), ("Device-a", "x")],
)
def test_who_does_not_belong_is_refused(join: Join, user: str, password: str) -> None:
    assert join(user, password=password).refusal is not None


def test_a_wrong_password_does_not_harm_the_client_whose_id_it_names(join: Join) -> None:
    victim, catalogue = join("device-a", client_id="driftkeel-device-a"), join("catalogue")
    victim.subscribe(wire.down_topic("device-a"))
    assert join("device-a", password="wrong", client_id="driftkeel-device-a").refusal
    catalogue.say(wire.down_topic("device-a"), b"still there?")
    assert victim.next()[1] == b"still there?"
    assert not victim.gone.is_set()


def test_a_second_client_takes_the_place_of_the_first(join: Join) -> None:
    catalogue = join("catalogue")
    catalogue.subscribe(wire.ALL_PRESENCE)
    topic = wire.presence_topic("device-a")
    first = join("device-a", client_id="driftkeel-device-a", will=topic)
    second = join("device-a", client_id="driftkeel-device-a", will=topic)
    assert first.gone.wait(WAIT_S)
    second.say(topic, b"online", retain=True)
    said = [catalogue.next()[1]]
    if said == [b"gone"]:
        said.append(catalogue.next()[1])
    assert said[-1] == b"online"
    late = join("catalogue")
    late.subscribe(wire.ALL_PRESENCE)
    assert late.next() == (topic, b"online")


def test_the_embedded_broker_lets_no_other_user_take_a_client_id(
    broker_users: Users, tmp_path: Path
) -> None:
    """Mosquitto does: whoever has an account can disconnect any client. See decision 0001."""
    with start_broker(tmp_path, broker_users, kind="embedded") as broker:
        victim = Peer(broker.port, "device-a", broker_users["device-a"], client_id="x")
        thief = Peer(broker.port, "device-b", broker_users["device-b"], client_id="x")
        victim.say(wire.up_topic("device-a"), b"still here")
        assert thief.refusal
        assert not victim.gone.is_set()
        victim.leave()
        thief.leave()


def test_the_last_will_of_who_vanishes_is_published_and_kept(join: Join) -> None:
    catalogue = join("catalogue")
    catalogue.subscribe(wire.ALL_PRESENCE)
    topic = wire.presence_topic("device-a")
    join("device-a", will=topic).vanish()
    assert catalogue.next() == (topic, b"gone")
    late = join("catalogue")
    late.subscribe(wire.ALL_PRESENCE)
    message = late.heard.get(timeout=WAIT_S)
    assert (message.payload, message.retain) == (b"gone", True)


def test_a_silent_peer_is_taken_for_dead(join: Join, broker: Broker, broker_users: Users) -> None:
    catalogue = join("catalogue")
    catalogue.subscribe(wire.ALL_PRESENCE)
    silent = Peer(
        broker.port,
        "device-a",
        broker_users["device-a"],
        will=wire.presence_topic("device-a"),
        keepalive_s=1,
    )
    # Ends the thread that would send pings, and leaves the connection open.
    silent.client.loop_stop()
    assert catalogue.next()[1] == b"gone"


def test_a_retained_message_is_cleared_by_an_empty_one(join: Join) -> None:
    a, topic = join("device-a"), wire.presence_topic("device-a")
    a.say(topic, b"online", retain=True)
    a.say(topic, b"", retain=True)
    catalogue = join("catalogue")
    catalogue.subscribe(wire.ALL_PRESENCE)
    a.say(topic, b"now")
    assert catalogue.next() == (topic, b"now")


def test_many_large_messages_arrive_whole_and_in_order(join: Join) -> None:
    catalogue, a = join("catalogue"), join("device-a")
    a.subscribe(wire.down_topic("device-a"))
    chunks = [bytes([number]) * 64 * 1024 for number in range(40)]
    for chunk in chunks:
        catalogue.client.publish(wire.down_topic("device-a"), chunk, qos=1)
    assert [a.next()[1] for _ in chunks] == chunks


def test_an_oversized_message_reaches_nobody(join: Join) -> None:
    catalogue, a = join("catalogue"), join("device-a")
    catalogue.subscribe(wire.ALL_UP)
    a.client.publish(wire.up_topic("device-a"), bytes(2 * wire.MAX_MESSAGE_BYTES), qos=1)
    b = join("device-b")
    b.say(wire.up_topic("device-b"), bytes(wire.MAX_MESSAGE_BYTES))
    topic, payload = catalogue.next()
    assert (topic, len(payload)) == (wire.up_topic("device-b"), wire.MAX_MESSAGE_BYTES)


def test_the_embedded_broker_survives_noise(broker_users: Users, tmp_path: Path) -> None:
    connect = (
        b"\x10\x25\x00\x04MQTT\x04\xc2\x00\x3c\x00\x01n\x00\x08device-a\x00\x0fdevice-a's word"
    )
    connect = connect[:1] + bytes([len(connect) - 2]) + connect[2:]
    with start_broker(tmp_path, broker_users, kind="embedded") as broker:

        @settings(max_examples=60, deadline=None)
        @given(st.booleans(), st.binary(max_size=40))
        def babble(known: bool, noise: bytes) -> None:
            with socket.create_connection(("127.0.0.1", broker.port), timeout=WAIT_S) as peer:
                peer.sendall((connect if known else b"") + noise)
                peer.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    answer = peer.recv(4096)
                    assert not known or answer.startswith(b"\x20\x02\x00\x00")

        babble()
        assert broker.process.poll() is None
        peer = Peer(broker.port, "device-a", broker_users["device-a"])
        assert peer.refusal is None
        peer.leave()
        assert "Traceback" not in (tmp_path / "broker.log").read_text()


def test_a_broker_listens_on_the_loopback_address_only(broker: Broker) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", broker.port), timeout=WAIT_S)


def test_what_a_broker_was_told_is_for_its_owner_only(broker: Broker, tmp_path: Path) -> None:
    secrets = [
        path
        for path in (tmp_path / "broker").iterdir()
        if path.name in {"passwords", "acl", "accounts.json"}
    ]
    assert secrets
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)


def test_a_broker_ends_when_told(broker_kind: Kind, broker_users: Users, tmp_path: Path) -> None:
    with start_broker(tmp_path, broker_users, kind=broker_kind) as broker:
        assert broker.pid > 0
    assert broker.process.poll() is not None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((broker.host, broker.port), timeout=WAIT_S)


def test_a_taken_port_is_named(broker: Broker, broker_users: Users, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=f"port {broker.port} is taken"):
        start_broker(tmp_path / "2", broker_users, port=broker.port, kind=broker.kind)


def test_two_brokers_live_side_by_side(broker: Broker, broker_users: Users, tmp_path: Path) -> None:
    with start_broker(tmp_path / "2", broker_users, kind=broker.kind) as other:
        assert other.port != broker.port


def test_a_broker_that_does_not_start_says_why(
    broker_users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "raise SystemExit('cannot bind')"]
    monkeypatch.setattr(brokers, "_embedded", lambda *_: failing)
    with pytest.raises(BrokerError, match="cannot bind"):
        start_broker(tmp_path, broker_users, kind="embedded")


@pytest.mark.parametrize("password", ["", "a:b", "a\nb"])
def test_a_password_that_would_change_its_meaning_is_refused(password: str, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="password of 'device-a'"):
        start_broker(tmp_path, {"device-a": password}, kind="embedded")


@pytest.mark.parametrize("user", ["a b", "a/b", "#", "a\ntopic readwrite #"])
def test_a_user_that_would_change_the_rules_is_refused(user: str, tmp_path: Path) -> None:
    with pytest.raises(WireError):
        start_broker(tmp_path, {user: "x"}, kind="embedded")


def test_without_mosquitto_the_embedded_broker_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DRIFTKEEL_BROKER", raising=False)
    monkeypatch.setattr(brokers, "_find", lambda _program: None)
    assert choose_kind() == "embedded"
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        start_broker(tmp_path, {"device-a": "x"}, kind="mosquitto")
    monkeypatch.setattr(brokers, "_find", lambda program: f"/usr/sbin/{program}")
    assert choose_kind() == "mosquitto"


def test_the_environment_forces_a_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRIFTKEEL_BROKER", "embedded")
    with start_broker(tmp_path, {"device-a": "x"}) as broker:
        assert broker.kind == "embedded"
    monkeypatch.setenv("DRIFTKEEL_BROKER", "carrier pigeon")
    with pytest.raises(BrokerError, match="carrier pigeon"):
        choose_kind()


def test_the_embedded_broker_reads_what_it_is_given(broker_users: Users, tmp_path: Path) -> None:
    with start_broker(tmp_path, broker_users, kind="embedded"):
        accounts = json.loads((tmp_path / "accounts.json").read_text())
    assert {user: account["password"] for user, account in accounts.items()} == dict(broker_users)
