"""One MQTT connection, as both sides use it: it reconnects for ever and promises nothing else.

Durability is not its business: what must arrive waits in an outbox and is sent again until the
other side acknowledges it, so `Link` keeps no queue of its own and uses clean sessions.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

_LEAST_RECONNECT_S: Final = 0.2
_MOST_RECONNECT_S: Final = 30.0
_MOST_IN_FLIGHT: Final = 64
_REFUSED: Final = frozenset(
    {"Not authorized", "Bad user name or password", "Unsupported protocol version"}
)

log = logging.getLogger(__name__)


class Link:
    """A client that stays connected.

    Args:
        host: The broker's host.
        port: Its port.
        client_id: Unique among the broker's clients.
        username: The account; None for none.
        password: Its password.
        keepalive_s: After one and a half times this, a silent client counts as gone.
        subscriptions: Topic filters, subscribed again on every connection.
        on_message: Called with topic and payload on the network thread; must be quick.
        on_connected: Called on the network thread once every subscription is granted.
        will_topic: Where the broker announces that this client is gone; None for nowhere.
        will_payload: What it announces there, retained.
        ca_file: Certificate authorities for TLS; None for a plain connection.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        client_id: str,
        username: str | None,
        password: str | None,
        keepalive_s: int = 30,
        subscriptions: Sequence[str],
        on_message: Callable[[str, bytes], None],
        on_connected: Callable[[], None],
        will_topic: str | None = None,
        will_payload: bytes = b"",
        ca_file: str | None = None,
    ) -> None:
        self._host, self._port, self._keepalive_s = host, port, keepalive_s
        self._subscriptions = list(subscriptions)
        self._on_message = on_message
        self._on_connected = on_connected
        self._ready = threading.Event()
        self._ending = threading.Event()
        self._in_flight = 0
        self._count = threading.Lock()
        self._refusal = ""
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=True)
        client.max_queued_messages_set(_MOST_IN_FLIGHT)
        client.max_inflight_messages_set(_MOST_IN_FLIGHT)
        if username is not None:
            client.username_pw_set(username, password)
        if ca_file is not None:
            client.tls_set(ca_certs=ca_file)
        if will_topic is not None:
            client.will_set(will_topic, will_payload, qos=1, retain=True)
        client.on_socket_open = _no_delay
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        self._client = client

    @property
    def connected(self) -> bool:
        """Whether messages flow, subscriptions included."""
        return self._ready.is_set()

    @property
    def problem(self) -> str:
        """Why the broker refuses this client; empty when it does not."""
        return self._refusal

    def start(self) -> None:
        """Begin to connect; a broker that is not there is tried again and again."""
        self._thread.start()

    def stop(self) -> None:
        """Disconnect and end the network thread."""
        self._ending.set()
        self._client.disconnect()
        if self._thread.is_alive():
            self._thread.join(10)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until messages flow; False when they still do not after this long."""
        return self._ready.wait(timeout_s)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message at QoS 1.

        Returns:
            False when there is no connection or too much is under way: send it again later. True
            says only that it went out; that it arrived, only the other side can say.
        """
        with self._count:
            if not self._ready.is_set() or self._in_flight >= _MOST_IN_FLIGHT:
                return False
            self._in_flight += 1
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            with self._count:
                self._in_flight -= 1
            return False
        return True

    def _run(self) -> None:
        wait_s = _LEAST_RECONNECT_S
        while not self._ending.is_set():
            try:
                self._client.connect(self._host, self._port, self._keepalive_s)
                while not self._ending.is_set():
                    if self._client.loop(1.0) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                        break
                    if self._ready.is_set():
                        wait_s = _LEAST_RECONNECT_S
            except (OSError, ValueError) as error:
                log.debug("broker %s:%d: %s", self._host, self._port, error)
            self._ready.clear()
            # Many devices lose a broker at the same moment; they must not come back at one.
            self._ending.wait(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(_MOST_RECONNECT_S, wait_s * 2)

    def _connected(
        self, client: paho.Client, _: Any, __: Any, reason: ReasonCode, ___: Properties | None
    ) -> None:
        if reason.is_failure:
            if str(reason) != self._refusal:
                self._refusal = str(reason)
                log.error(
                    "broker %s:%d refuses this client: %s; check mqtt.username and mqtt.password",
                    self._host,
                    self._port,
                    reason,
                )
            return
        self._refusal = ""
        with self._count:
            self._in_flight = 0
        if self._subscriptions:
            client.subscribe([(topic, 1) for topic in self._subscriptions])
        else:
            self._announce()

    def _subscribed(
        self, _: paho.Client, __: Any, ___: int, reasons: list[ReasonCode], ____: Properties | None
    ) -> None:
        for topic, reason in zip(self._subscriptions, reasons, strict=False):
            if reason.is_failure:
                log.error("broker refuses the subscription to %s: %s", topic, reason)
        self._announce()

    def _announce(self) -> None:
        self._ready.set()
        self._guarded(self._on_connected)

    def _disconnected(self, *_: Any) -> None:
        self._ready.clear()

    def _received(self, _: paho.Client, __: Any, message: paho.MQTTMessage) -> None:
        self._guarded(self._on_message, message.topic, message.payload)

    def _published(self, *_: Any) -> None:
        with self._count:
            self._in_flight = max(0, self._in_flight - 1)

    @staticmethod
    def _guarded(callback: Callable[..., None], *arguments: Any) -> None:
        """An error in a callback must not end the network thread: it is logged."""
        try:
            callback(*arguments)
        except Exception:
            log.exception("a message could not be handled")


def _no_delay(_: paho.Client, __: Any, connection: Any) -> None:
    """Small messages wait for nothing: without this a short exchange takes a hundred times longer."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
