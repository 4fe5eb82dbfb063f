"""The catalogue on MQTT: takes messages in, has them handled one after another, sends answers.

One worker thread does all handling, so handlers need no locks of their own; the network thread
only fills its mailbox. Nothing is kept in memory that a restart would miss.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from adapter_store import wire
from adapter_store.errors import WireError
from adapter_store.mqtt import Link
from cloud.config import MqttSection
from cloud.handlers import Handlers
from cloud.mailbox import Mailbox
from cloud.uploads import Replies, Uploads

CLIENT_ID: Final = "driftkeel-catalogue"
_TICK_S: Final = 0.5
_STOP_S: Final = 10.0

log = logging.getLogger(__name__)


class Sync:
    """Speaks with devices.

    Args:
        settings: The broker.
        handlers: Acts on messages.
        uploads: Asks for what is missing of uploads.
    """

    def __init__(self, settings: MqttSection, handlers: Handlers, uploads: Uploads) -> None:
        self._handlers = handlers
        self._uploads = uploads
        self._mailbox = Mailbox()
        self._reconnected = threading.Event()
        self._worker = threading.Thread(target=self._work, name="devices", daemon=True)
        self._link = Link(
            host=settings.host,
            port=settings.port,
            client_id=CLIENT_ID,
            username=settings.username,
            password=settings.password,
            keepalive_s=settings.keepalive_s,
            subscriptions=[wire.ALL_UP, wire.ALL_PRESENCE],
            on_message=self._received,
            on_connected=self._reconnected.set,
        )

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""
        return self._link.connected

    def start(self) -> None:
        """Connect, and stay connected; uploads that a restart interrupted go on."""
        self._worker.start()
        self._link.start()

    def stop(self) -> None:
        """Handle what has arrived, answer it, and disconnect."""
        self._mailbox.close()
        self._worker.join(_STOP_S)
        self._link.stop()

    def send(self, device: str, message: wire.DownMessage) -> bool:
        """Send a message to a device; False when it cannot be sent now."""
        try:
            return self._link.publish(wire.down_topic(device), wire.encode(message))
        except WireError as error:
            log.warning("a message to %s cannot be sent: %s", device, error)
            return False

    def statistics(self) -> dict[str, int]:
        """What was counted since the start, by kind."""
        return {**self._handlers.statistics(), "messages_dropped": self._mailbox.dropped}

    def _received(self, topic: str, payload: bytes) -> None:
        """On the network thread: hand over, or drop; devices repeat what matters."""
        self._mailbox.put(topic, payload)

    # On the worker thread ------------------------------------------------------------------------

    def _work(self) -> None:
        next_tick = time.monotonic()
        while not self._mailbox.exhausted:
            item = self._mailbox.take(next_tick)
            try:
                if item is not None:
                    self._send_all(self._handlers.received(*item, time.monotonic()))
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + _TICK_S
                    self._tick()
            except Exception:
                # No single message may end the worker; the device will repeat it.
                self._handlers.counters["messages_failed"] += 1
                log.exception("a message could not be handled: %s", item and item[0])

    def _tick(self) -> None:
        if not self.connected:
            return
        if self._reconnected.is_set():
            self._reconnected.clear()
            self._send_all(self._uploads.reconnected(time.monotonic()))
        else:
            self._send_all(self._uploads.tick(time.monotonic()))

    def _send_all(self, replies: Replies) -> None:
        for device, message in replies:
            self.send(device, message)
