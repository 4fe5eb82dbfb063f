"""A minimal MQTT 3.1.1 broker, for trying Driftkeel where mosquitto cannot be installed.

Not for production: loopback only, no TLS, nothing on disk, clean sessions only, no redelivery. QoS
0 and 1, accounts with access rules, retained messages, last wills, takeover of a client id by its
own user only. Run by `cloud.broker`; why it exists: docs/decisions/0001.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from adapter_store.wire import MAX_MESSAGE_BYTES

_HOST: Final = "127.0.0.1"
_MAX_PACKET: Final = MAX_MESSAGE_BYTES + 1024
_MAX_BUFFERED: Final = 8 << 20
_CONNECT_TIMEOUT_S: Final = 10.0
_FAILURE: Final = 0x80


class _ProtocolError(Exception):
    """A client does not speak MQTT 3.1.1; its connection is closed."""


class _Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.id = self.user = ""
        self.timeout_s: float | None = None
        self.will: tuple[str, bytes, int, bool] | None = None
        self.filters: dict[str, int] = {}
        self._packet_id = 0

    async def packet(self) -> tuple[int, bytes]:
        """The next packet: its first byte and its body."""
        first = (await self.reader.readexactly(1))[0]
        length = 0
        for shift in (0, 7, 14, 21):
            byte = (await self.reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            if not byte & 0x80:
                break
        else:
            raise _ProtocolError("malformed length")
        if length > _MAX_PACKET:
            raise _ProtocolError(f"packet of {length} bytes")
        return first, await self.reader.readexactly(length)

    def send(self, first: int, body: bytes) -> None:
        """Queue a packet; a client that does not read is cut off rather than buffered for."""
        length, header = len(body), bytearray([first])
        while True:
            length, byte = divmod(length, 128)
            header.append(byte | (0x80 if length else 0))
            if not length:
                break
        self.writer.write(bytes(header) + body)
        if self.writer.transport.get_write_buffer_size() > _MAX_BUFFERED:
            self.writer.transport.abort()

    def deliver(self, topic: str, payload: bytes, qos: int, *, retained: bool = False) -> None:
        """Send a message to this client."""
        name = topic.encode()
        head = struct.pack("!H", len(name)) + name
        if qos:
            self._packet_id = self._packet_id % 65535 + 1
            head += struct.pack("!H", self._packet_id)
        self.send(0x30 | qos << 1 | retained, head + payload)

    def wants(self, topic: str) -> int | None:
        """The quality this client subscribed to a topic with; None when it did not."""
        return max((q for f, q in self.filters.items() if _matches(f, topic)), default=None)


class EmbeddedBroker:
    """The broker's state; an account is a password and access rules ``[verb, topic filter]``."""

    def __init__(self, accounts: Mapping[str, Any]) -> None:
        self._accounts = accounts
        self._clients: dict[str, _Client] = {}
        self._retained: dict[str, tuple[bytes, int]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = _Client(reader, writer)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                first, body = await client.packet()
            if first != 0x10 or not self._connect(client, body):
                return
            while True:
                async with asyncio.timeout(client.timeout_s):
                    first, body = await client.packet()
                if first >> 4 == 14:
                    client.will = None
                    return
                self._handle(client, first, body)
                await writer.drain()
        except (OSError, EOFError, TimeoutError):
            return
        except (_ProtocolError, struct.error, ValueError, IndexError) as error:
            print(f"client {client.id!r} cut off: {error}", flush=True)  # noqa: T201 - its log
        finally:
            if self._clients.get(client.id) is client:
                del self._clients[client.id]
            self._bury(client)
            writer.close()

    def _bury(self, client: _Client) -> None:
        if client.will is not None:
            self._publish(*client.will)
            client.will = None

    def _connect(self, client: _Client, body: bytes) -> bool:
        name, at = _take(body, 0)
        level, flags, keepalive = struct.unpack_from("!BBH", body, at)
        if (name, level) != (b"MQTT", 4):
            client.send(0x20, b"\x00\x01")
            return False
        client_id, at = _take(body, at + 4)
        will: tuple[str, bytes, int, bool] | None = None
        if flags & 0x04:
            will_topic, at = _take(body, at)
            will_payload, at = _take(body, at)
            will = (will_topic.decode(), will_payload, flags >> 3 & 3, bool(flags & 0x20))
        user, at = _take(body, at) if flags & 0x80 else (b"", at)
        password, at = _take(body, at) if flags & 0x40 else (b"", at)
        account = self._accounts.get(user.decode())
        if account is None or not hmac.compare_digest(account["password"].encode(), password):
            client.send(0x20, b"\x00\x05")
            return False
        client_id = client_id or b"unnamed-%d" % id(client)
        # Only the same user, and only with the right password, takes over a live connection.
        earlier = self._clients.get(client_id.decode())
        if earlier is not None and earlier.user != user.decode():
            client.send(0x20, b"\x00\x02")
            return False
        if earlier is not None:
            # Now rather than when its connection ends: the newcomer's first word must come after.
            self._bury(earlier)
            earlier.writer.transport.abort()
        client.user, client.id = user.decode(), client_id.decode()
        client.timeout_s = 1.5 * keepalive or None
        if will is not None and self._allowed(client.user, "write", will[0]):
            client.will = will
        self._clients[client.id] = client
        client.send(0x20, b"\x00\x00")
        return True

    def _handle(self, client: _Client, first: int, body: bytes) -> None:
        match first >> 4:
            case 3:
                self._published(client, first, body)
            case 8:
                self._subscribe(client, body)
            case 10:
                at = 2
                while at < len(body):
                    topic, at = _take(body, at)
                    client.filters.pop(topic.decode(), None)
                client.send(0xB0, body[:2])
            case 12:
                client.send(0xD0, b"")
            case 4:
                pass  # nothing is sent again, so nothing waits for an acknowledgement
            case kind:
                raise _ProtocolError(f"packet type {kind}")

    def _published(self, client: _Client, first: int, body: bytes) -> None:
        qos = first >> 1 & 3
        topic, at = _take(body, 0)
        if qos > 1 or b"+" in topic or b"#" in topic:
            raise _ProtocolError("QoS 2 or a wildcard")
        payload = body[at + 2 * (qos > 0) :]
        # As MQTT 3.1.1 has no way to say no, what is not allowed is dropped and acknowledged.
        if self._allowed(client.user, "write", topic.decode()):
            self._publish(topic.decode(), payload, qos, bool(first & 1))
        if qos:
            client.send(0x40, body[at : at + 2])

    def _publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> None:
        if retain and payload:
            self._retained[topic] = payload, qos
        elif retain:
            self._retained.pop(topic, None)
        for client in list(self._clients.values()):
            granted = client.wants(topic)
            if granted is not None:
                client.deliver(topic, payload, min(qos, granted))

    def _subscribe(self, client: _Client, body: bytes) -> None:
        at, granted, added = 2, bytearray(), dict[str, int]()
        while at < len(body):
            raw, at = _take(body, at)
            qos, at = min(body[at], 1), at + 1
            allowed = self._allowed(client.user, "read", raw.decode())
            granted.append(qos if allowed else _FAILURE)
            if allowed:
                added[raw.decode()] = qos
        client.filters |= added
        client.send(0x90, body[:2] + bytes(granted))
        for topic, (payload, qos) in self._retained.items():
            for topic_filter, most in added.items():
                if _matches(topic_filter, topic):
                    client.deliver(topic, payload, min(qos, most), retained=True)

    def _allowed(self, user: str, verb: str, topic: str) -> bool:
        return any(v == verb and _matches(f, topic) for v, f in self._accounts[user]["acl"])


def _matches(topic_filter: str, topic: str) -> bool:
    """Whether a filter covers a topic, or another filter that is no wider."""
    wanted, found = topic_filter.split("/"), topic.split("/")
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(found) or found[index] == "#" or (part not in ("+", found[index])):
            return False
    return len(wanted) == len(found)


def _take(body: bytes, at: int) -> tuple[bytes, int]:
    """A length-prefixed field and where the next one begins."""
    (length,) = struct.unpack_from("!H", body, at)
    end = at + 2 + length
    if end > len(body):
        raise _ProtocolError("field past the end of its packet")
    return body[at + 2 : end], end


async def _main(port: int, accounts: Mapping[str, Any]) -> None:
    broker = EmbeddedBroker(accounts)
    server = await asyncio.start_server(broker.serve, _HOST, port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
