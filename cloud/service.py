"""The catalogue as a process: the MQTT side, uploads, and the operators' HTTP API.

Messages are handled one after another on one worker thread with a bounded queue; whatever cannot
be handled is counted, logged and forgotten, since a device repeats what matters until it is
acknowledged.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn

from adapter_store import wire
from adapter_store.blobs import write_durably
from adapter_store.database import open_database
from adapter_store.errors import CorruptBundleError, StoreError, TransferError, WireError
from adapter_store.mqtt import Link
from adapter_store.partial import Download
from adapter_store.transfer import Sender
from adapter_store.trust import CatalogueKey
from cloud.api import Operators, make_api
from cloud.catalogue import Catalogue, open_blobs
from cloud.config import Config

MIGRATIONS: Final = Path(__file__).parent / "migrations"
_QUEUE: Final = 10_000
_TICK_S: Final = 0.5
_COMPLAIN_EVERY_S: Final = 60.0

log = logging.getLogger(__name__)


class Service:
    """Speaks with devices on behalf of a catalogue.

    Args:
        catalogue: What it knows and decides.
        config: The whole configuration.
    """

    def __init__(self, catalogue: Catalogue, config: Config) -> None:
        self.catalogue = catalogue
        self.counters: Counter[str] = Counter()
        self._incoming = config.state_dir / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._uploads: dict[str, tuple[str, Download]] = {}
        self._sender = Sender(catalogue.read)
        self._rng = random.Random()
        self._queue: queue.Queue[tuple[str, bytes] | None] = queue.Queue(_QUEUE)
        self._reported = threading.Condition()
        self._complained: dict[str, float] = {}
        self._worker = threading.Thread(target=self._work, name="devices", daemon=True)
        self._link = Link(
            host=config.mqtt.host,
            port=config.mqtt.port,
            client_id="driftkeel-catalogue",
            username=config.mqtt.username,
            password=config.mqtt.password,
            keepalive_s=config.mqtt.keepalive_s,
            subscriptions=[wire.ALL_UP, wire.ALL_PRESENCE],
            on_message=self._received,
            on_connected=self._connected,
        )

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""
        return self._link.connected

    def start(self) -> None:
        """Resume uploads that a restart interrupted, and connect."""
        for digest, device, size_bytes in self.catalogue.uploads():
            self._pull(device, digest, size_bytes)
        self._worker.start()
        self._link.start()

    def stop(self) -> None:
        """Handle what has arrived, and disconnect."""
        self._link.stop()
        self._queue.put(None)
        self._worker.join(10)

    def send(self, device: str, message: wire.DownMessage) -> bool:
        """Publish a message to a device; False when the broker cannot be reached."""
        return self._link.publish(wire.down_topic(device), wire.encode(message))

    def wait_applied(self, device: str, version: int, timeout_s: float) -> dict[str, Any] | None:
        """Wait until a device reports that it applied a desired state; None when it did not."""
        deadline = time.monotonic() + timeout_s
        with self._reported:
            while True:
                reported = self.catalogue.device(device)["reported"]
                if reported is not None and reported["desired_version"] >= version:
                    applied: dict[str, Any] = reported
                    return applied
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._reported.wait(left)

    # On the network thread -----------------------------------------------------------------------

    def _received(self, topic: str, payload: bytes) -> None:
        try:
            self._queue.put_nowait((topic, payload))
        except queue.Full:
            self.counters["dropped"] += 1

    def _connected(self) -> None:
        self._received("", b"")

    # On the worker thread ------------------------------------------------------------------------

    def _work(self) -> None:
        next_tick = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                next_tick = time.monotonic() + _TICK_S
                for digest in list(self._uploads):
                    self._ask(digest)
                continue
            if item is None:
                return
            try:
                self._handle(*item)
            except Exception:
                # The worker must outlive any single message; the device will repeat it.
                self.counters["failed"] += 1
                log.exception("a message on %s could not be handled", item[0])

    def _handle(self, topic: str, payload: bytes) -> None:
        if not topic:
            for digest, (_, download) in list(self._uploads.items()):
                download.reconnected()
                self._ask(digest)
            return
        self.counters["messages"] += 1
        try:
            device = wire.device_of(topic)
            if topic == wire.presence_topic(device):
                self.catalogue.presence(device, online=payload == b"online")
                return
            message = wire.decode_up(payload)
            self._dispatch(device, message)
        except (WireError, TransferError, StoreError) as error:
            self.counters["refused"] += 1
            self._complain(topic, str(error))

    def _dispatch(self, device: str, message: wire.UpMessage) -> None:
        if isinstance(message, wire.Register | wire.Report) and message.device != device:
            raise WireError(f"device {device} speaks in the name of {message.device!r}")
        match message:
            case wire.Register():
                self.send(device, self.catalogue.register(device, message))
                self.send(device, wire.Ack(of=message.id))
            case wire.Report():
                desired = self.catalogue.report(device, message)
                with self._reported:
                    self._reported.notify_all()
                if desired is not None:
                    self.send(device, desired)
                self.send(device, wire.Ack(of=message.id))
            case wire.Search():
                self.send(device, self.catalogue.search(device, message))
            case wire.Offer():
                result = self.catalogue.offered(device, message)
                if result is not None:
                    self.send(device, result)
                else:
                    self._pull(device, message.digest, message.size_bytes)
                    self._ask(message.digest)
            case wire.Get():
                self._give(device, message)
            case wire.Chunk():
                self._chunk(device, message)
            case wire.Missing():
                self._missing(device, message)
            case wire.Ack():
                pass

    def _give(self, device: str, wanted: wire.Get) -> None:
        if self.catalogue.may_have(wanted.digest):
            self.send(device, self._sender.answer(wanted))
        else:
            reason = "the catalogue does not offer this bundle (any more)"
            self.send(device, wire.Missing(digest=wanted.digest, reason=reason))

    def _pull(self, device: str, digest: str, size_bytes: int) -> None:
        if digest not in self._uploads:
            download = Download(self._incoming, digest, size_bytes, rng=self._rng)
            self._uploads[digest] = (device, download)

    def _ask(self, digest: str) -> None:
        device, download = self._uploads[digest]
        if download.complete:
            self._finish(digest)
        elif self._link.connected:
            for get in download.requests(time.monotonic()):
                self.send(device, get)

    def _chunk(self, device: str, chunk: wire.Chunk) -> None:
        upload = self._uploads.get(chunk.digest)
        if upload is not None and upload[0] == device:
            upload[1].accept(chunk, time.monotonic())
            self._ask(chunk.digest)

    def _finish(self, digest: str) -> None:
        device, download = self._uploads[digest]
        try:
            result = self.catalogue.uploaded(device, digest, download.finish())
        except (TransferError, CorruptBundleError) as error:
            result = self.catalogue.upload_refused(device, digest, str(error))
        del self._uploads[digest]
        download.discard()
        log.info("upload of %s by %s: %s", digest[:12], device, result.reason or "stored")
        self.send(device, result)

    def _missing(self, device: str, message: wire.Missing) -> None:
        upload = self._uploads.get(message.digest)
        if upload is not None and upload[0] == device:
            del self._uploads[message.digest]
            upload[1].discard()
            self.catalogue.upload_refused(device, message.digest, f"gone: {message.reason}")

    def _complain(self, topic: str, problem: str) -> None:
        """Log and audit what was refused, at most once a minute a topic: an enemy sends more."""
        now = time.monotonic()
        if now - self._complained.get(topic, -_COMPLAIN_EVERY_S) < _COMPLAIN_EVERY_S:
            return
        self._complained[topic] = now
        log.warning("refused on %s: %s", topic, problem)
        self.catalogue.suspicious(topic.rpartition("/")[2], problem)


def open_catalogue(config: Config) -> Catalogue:
    """Open the database, the bundles and the key.

    Raises:
        StoreError: One of them cannot be opened.
    """
    config.state_dir.mkdir(parents=True, exist_ok=True)
    return Catalogue(
        open_database(config.database_url, MIGRATIONS),
        open_blobs(config.state_dir),
        open_key(config),
        min_similarity=config.catalogue.min_similarity,
        max_bundle_bytes=config.catalogue.max_bundle_bytes,
        clock=time.time,
    )


def open_key(config: Config) -> CatalogueKey:
    """The catalogue's signing key; it is made the first time."""
    return CatalogueKey.load_or_create(config.state_dir / "catalogue.key")


def operator_token(config: Config) -> str:
    """What operators present; it is made the first time."""
    if config.http.token:
        return config.http.token
    path = config.state_dir / "operator.token"
    if not path.exists():
        write_durably(path, secrets.token_urlsafe(32).encode())
        path.chmod(0o600)
    return path.read_text(encoding="ascii").strip()


def run(config: Config) -> None:
    """Run the catalogue until it is told to end."""
    catalogue = open_catalogue(config)
    service = Service(catalogue, config)
    api = make_api(
        Operators(catalogue, service.send, service.wait_applied), service, operator_token(config)
    )
    server = uvicorn.Server(
        uvicorn.Config(
            api, host=config.http.host, port=config.http.port, log_level="warning", lifespan="off"
        )
    )
    listening = server.config.bind_socket()
    address = listening.getsockname()
    url = f"http://{address[0]}:{address[1]}"
    service.start()
    write_durably(config.state_dir / "http.json", json.dumps({"url": url}).encode())
    log.info("operators: %s   public key: %s", url, open_key(config).public_key)
    with _ending(server):
        server.run(sockets=[listening])
    service.stop()


@contextmanager
def _ending(server: uvicorn.Server) -> Iterator[None]:
    """End at once on SIGTERM, even while a client holds a connection."""

    def end(*_: Any) -> None:
        server.should_exit = server.force_exit = True

    earlier = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
