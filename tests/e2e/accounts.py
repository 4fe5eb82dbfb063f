"""The tests' own voice on the broker, in the place of the real catalogue or of a device.

With it a test sends what no healthy process would, and stops a transfer exactly where it wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from adapter_store.mqtt import Link
from adapter_store.trust import CatalogueKey, Statement
from tests.e2e.waiting import WAIT_S, until

M = TypeVar("M", bound=wire.Message)


class Account:
    """Speaks with the rights of the catalogue, or of a device, in place of the real one.

    Args:
        name: Whose rights.
        host: The broker.
        port: Its port.
        password: That account's password.

    Attributes:
        heard: What came and was not heard out yet.
        hits: What every search is answered with, in the catalogue's place; None: no answer.
    """

    def __init__(self, name: str, host: str, port: int, password: str) -> None:
        self.heard: list[wire.AnyMessage] = []
        self.hits: list[wire.Candidate] | None = None
        catalogue = name == "catalogue"
        self._decode = wire.decode_up if catalogue else wire.decode_down
        self._up = "" if catalogue else wire.up_topic(name)
        self._link = Link(
            host=host,
            port=port,
            client_id=f"test-{name}",
            username=name,
            password=password,
            subscriptions=[wire.ALL_UP if catalogue else wire.down_topic(name)],
            on_message=self._received,
        )
        self._link.start()
        assert self._link.wait_connected(WAIT_S)

    def say(self, message: wire.AnyMessage, *, to: str = "") -> None:
        """Send a message: to a device, or up to the catalogue."""
        self.say_bytes(wire.encode(message), to=to)

    def say_bytes(self, payload: bytes, *, to: str = "") -> None:
        """Send any bytes at all."""
        topic = wire.down_topic(to) if to else self._up
        until(lambda: self._link.publish(topic, payload), "the broker to take a message")

    def say_oversized(self, payload: bytes, *, to: str) -> None:
        """Send what the link itself would refuse to send."""
        client = self._link._client
        assert client is not None
        client.publish(wire.down_topic(to), payload, qos=1)

    def hears(self, kind: type[M], accept: Callable[[M], bool] = lambda _: True) -> M:
        """Wait for a message that was not heard out before."""

        def first() -> M | None:
            for message in list(self.heard):
                if isinstance(message, kind) and accept(message):
                    self.heard.remove(message)
                    return message
            return None

        return until(first, f"a message of kind {kind.__name__}")

    def close(self) -> None:
        """Disconnect."""
        self._link.stop()

    def _received(self, topic: str, payload: bytes) -> None:
        message = self._decode(payload)
        if isinstance(message, wire.Search) and self.hits is not None:
            result = wire.SearchResult(of=message.id, candidates=self.hits)
            self._link.publish(wire.down_topic(wire.device_of(topic)), wire.encode(result))
        self.heard.append(message)


def candidate(
    key: CatalogueKey, data: bytes, encoder: str, *, size_bytes: int = 0
) -> wire.Candidate:
    """A search hit for these bytes, signed."""
    statement = Statement(
        digest=bundle_digest(data),
        size_bytes=size_bytes or len(data),
        encoder=encoder,
        family="bottleneck",
        labels=("5", "6", "7", "8", "9"),
        status="approved",
        issued_at=0.0,
    )
    blob, signature = key.sign(statement)
    return wire.Candidate(statement=blob, signature=signature, similarity=0.9)


def chunk_of(data: bytes, asked: wire.Get) -> wire.Chunk:
    """What was asked for, from these bytes."""
    return wire.Chunk(
        digest=asked.digest,
        offset=asked.offset,
        size_bytes=len(data),
        data=data[asked.offset : asked.offset + asked.length],
    )
