"""Link: one connection to the MQTT broker that keeps coming back, for devices and the catalogue.

A thin shell around paho. It never keeps a message across a disconnection and never promises
delivery: what must arrive sits in the caller's outbox until the other side has answered. Nothing
here knows what the messages mean (`adapter_store.wire`).
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from adapter_store.errors import WireError
from adapter_store.wire import MAX_MESSAGE_BYTES

MIN_DELAY_S: Final = 0.2
MAX_DELAY_S: Final = 30.0
_QOS: Final = 1
_CONNECT_TIMEOUT_S: Final = 10.0
_HANDSHAKE_TIMEOUT_S: Final = 10.0
# A connection shorter than this does not reset the delay: two clients with one id, or a broker
# that throws us out after the handshake, must not be hammered.
_STABLE_AFTER_S: Final = 5.0
_FAREWELL_TIMEOUT_S: Final = 1.0

log = logging.getLogger(__name__)


def next_delay_s(previous_s: float, rng: random.Random) -> float:
    """How long to wait before the next attempt: growing, jittered, MIN_DELAY_S to MAX_DELAY_S.

    Args:
        previous_s: The delay before; 0 when this is the first after a good connection.
        rng: Source of the jitter, which keeps a fleet from returning in step.
    """
    return min(MAX_DELAY_S, rng.uniform(MIN_DELAY_S, max(MIN_DELAY_S, 3.0 * previous_s)))


class Link:
    """A connection that is up, or trying to be.

    MQTT 3.1.1, clean sessions, QoS 1, TCP_NODELAY. All callbacks run on the link's own thread, one
    at a time: they must be quick, may publish, and an exception in one is logged and goes no
    further. A broker that is down at the start is waited for.

    Args:
        host: The broker's address.
        port: The broker's port.
        client_id: Unique at this broker; a second client with it takes the first one's place.
        username: Name the broker knows this client by; empty for an anonymous connection.
        password: Password for ``username``.
        keepalive_s: Seconds of silence after which either side takes the other for dead.
        will: Topic and payload the broker publishes, retained, when this client vanishes.
        subscriptions: Topic filters, subscribed anew on every connection.
        on_message: Called with topic and payload of everything received.
        on_connected: Called after every connection, once the broker granted all subscriptions.
        tls: Context for an encrypted connection.
        max_in_flight: Messages the broker has not acknowledged yet; more are refused.
        max_in_flight_bytes: The same in payload bytes.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        client_id: str,
        username: str = "",
        password: str = "",
        keepalive_s: int = 30,
        will: tuple[str, bytes] | None = None,
        subscriptions: Sequence[str] = (),
        on_message: Callable[[str, bytes], None],
        on_connected: Callable[[], None] | None = None,
        tls: ssl.SSLContext | None = None,
        max_in_flight: int = 128,
        max_in_flight_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        self._host = host
        self._port = port
        self._client_id = client_id
        self._username = username
        self._password = password
        self._keepalive_s = keepalive_s
        self._will = will
        self._subscriptions = tuple(subscriptions)
        self._on_message = on_message
        self._on_connected = on_connected
        self._tls = tls
        self._max_in_flight = max_in_flight
        self._max_in_flight_bytes = max_in_flight_bytes

        self._up = threading.Event()
        self._stopping = threading.Event()
        self._stop_by = 0.0
        self._thread: threading.Thread | None = None
        # Guards the three below; publish() may be called from any thread.
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._in_flight: deque[tuple[MQTTMessageInfo, int]] = deque()
        self._in_flight_bytes = 0
        # Touched by the link's thread only.
        self._subscribe_id: int | None = None
        self._connected_at: float | None = None
        self._complaint = ""

    @property
    def connected(self) -> bool:
        """Whether messages can be sent and will be received now."""
        return self._up.is_set()

    def start(self) -> None:
        """Begin connecting, in the background; returns at once."""
        if self._thread is not None:
            raise RuntimeError("this link was started before")
        self._thread = threading.Thread(
            target=self._run, name=f"mqtt-{self._client_id}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Let the broker acknowledge what is on its way, briefly, and disconnect for good.

        The broker does not publish the last will then.
        """
        deadline = time.monotonic() + _FAREWELL_TIMEOUT_S
        self._stop_by = deadline + _FAREWELL_TIMEOUT_S
        self._stopping.set()
        with self._lock:
            client, waiting = self._client, [info for info, _ in self._in_flight]
        on_own_thread = threading.current_thread() is self._thread
        if client is not None:
            if self.connected and not on_own_thread:
                for info in waiting:
                    info.wait_for_publish(max(0.0, deadline - time.monotonic()))
            client.disconnect()
        if self._thread is not None and not on_own_thread:
            self._thread.join(_CONNECT_TIMEOUT_S + _FAREWELL_TIMEOUT_S)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected; False when that took too long."""
        return self._up.wait(timeout_s)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand one message to the broker, at QoS 1.

        Returns:
            False when there is no connection or too much is unacknowledged; the message is
            forgotten and the caller's to keep. True says it is on its way, not that it arrived.

        Raises:
            WireError: The message is larger than the protocol allows, and always will be.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise WireError(
                f"message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}; "
                "send bundles in chunks"
            )
        with self._lock:
            while self._in_flight and self._in_flight[0][0].is_published():
                self._in_flight_bytes -= self._in_flight.popleft()[1]
            if (
                self._client is None
                or not self._up.is_set()
                or len(self._in_flight) >= self._max_in_flight
                or self._in_flight_bytes + len(payload) > self._max_in_flight_bytes
            ):
                return False
            info = self._client.publish(topic, payload, qos=_QOS, retain=retain)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return False
            self._in_flight.append((info, len(payload)))
            self._in_flight_bytes += len(payload)
            return True

    # The link's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        rng = random.Random()
        delay_s = 0.0
        while not self._stopping.is_set():
            self._connected_at = None
            try:
                self._one_connection()
            except Exception as error:  # noqa: BLE001 - paho raises struct.error and more on a
                # broker that speaks something else; a link must outlive any broker.
                self._complain(f"cannot use broker {self._where}: {error or type(error).__name__}")
            held_s = 0.0 if self._connected_at is None else time.monotonic() - self._connected_at
            delay_s = next_delay_s(0.0 if held_s >= _STABLE_AFTER_S else delay_s, rng)
            self._stopping.wait(delay_s)

    def _one_connection(self) -> None:
        """Connect with a fresh client, so that nothing of an earlier connection is sent again."""
        client = self._make_client()
        try:
            client.connect(self._host, self._port, self._keepalive_s)
            with self._lock:
                self._client = client
            deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
            while not self._stop_now():
                if client.loop(timeout=1.0) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    if self._connected_at is None and not self._complaint:
                        self._complain(f"broker {self._where} closed the connection unasked")
                    break
                if self._connected_at is None and time.monotonic() > deadline:
                    self._complain(f"broker {self._where} accepts connections but does not answer")
                    break
        finally:
            was_up = self._up.is_set()
            self._up.clear()
            with self._lock:
                self._client = None
                self._in_flight.clear()
                self._in_flight_bytes = 0
            _close(client)
            if was_up and not self._stopping.is_set():
                log.info("lost broker %s; reconnecting", self._where)

    def _stop_now(self) -> bool:
        return self._stopping.is_set() and (
            not self._up.is_set() or time.monotonic() > self._stop_by
        )

    def _make_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=True,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        # The window is ours, in publish(); paho must not queue behind its own default of 20.
        client.max_inflight_messages_set(self._max_in_flight)
        client.connect_timeout = _CONNECT_TIMEOUT_S
        if self._username:
            client.username_pw_set(self._username, self._password)
        if self._will is not None:
            client.will_set(self._will[0], self._will[1], qos=_QOS, retain=True)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.on_socket_open = _no_delay
        # Registering anything here makes paho leave all writing to the thread that runs loop();
        # otherwise two publishing threads may interleave the bytes of two packets.
        client.on_socket_register_write = _leave_to_loop
        client.on_connect = self._answered
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        return client

    def _answered(
        self, client: Client, _data: object, _flags: object, code: Any, _properties: object
    ) -> None:
        if code.is_failure:
            self._complain(
                f"broker {self._where} refused client {self._client_id!r}"
                f" (user {self._username!r}): {code}; check its username and password"
            )
        elif self._subscriptions:
            _, self._subscribe_id = client.subscribe(
                [(topic, _QOS) for topic in self._subscriptions]
            )
        else:
            self._ready()

    def _subscribed(
        self, client: Client, _data: object, mid: int, codes: list[Any], _properties: object
    ) -> None:
        if mid != self._subscribe_id:
            return
        refused = [t for t, c in zip(self._subscriptions, codes, strict=False) if c.is_failure]
        if refused:
            self._complain(
                f"broker {self._where} does not let user {self._username!r} subscribe to"
                f" {', '.join(refused)}; check its access rules"
            )
            client.disconnect()
        else:
            self._ready()

    def _ready(self) -> None:
        self._connected_at = time.monotonic()
        self._complaint = ""
        self._up.set()
        log.info("connected to broker %s as %s", self._where, self._client_id)
        if self._on_connected is not None:
            try:
                self._on_connected()
            except Exception:
                log.exception("on_connected failed")

    def _received(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            self._on_message(message.topic, bytes(message.payload))
        except Exception:
            log.exception("handling a message of %d bytes failed", len(message.payload))

    @property
    def _where(self) -> str:
        return f"{self._host}:{self._port}"

    def _complain(self, what: str) -> None:
        """Say it once, not at every attempt."""
        if what != self._complaint:
            self._complaint = what
            log.error("%s; retrying", what)


def _no_delay(_client: Client, _data: object, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_to_loop(_client: Client, _data: object, _sock: Any) -> None:
    """Write nothing here; loop() is woken by every publish."""


def _close(client: Client) -> None:
    sock = client.socket()
    if sock is not None:
        # Without a DISCONNECT before it, so that the broker publishes the last will.
        sock.close()
