"""The catalogue as a process: everything opened, locked, started, and ended in order."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from adapter_store.blobs import BlobStore, write_durably
from adapter_store.database import open_database
from adapter_store.errors import ConfigError, DiskFullError
from adapter_store.state import lock_directory
from adapter_store.trust import CatalogueKey
from cloud.api import make_api
from cloud.complaints import Complaints
from cloud.config import Config, HttpSection
from cloud.handlers import Handlers
from cloud.operators import Operators
from cloud.store import Store
from cloud.sync import Sync
from cloud.uploads import Uploads

MIGRATIONS: Final = Path(__file__).parent / "migrations"
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_SHUTDOWN_S: Final = 5

log = logging.getLogger(__name__)


def open_store(config: Config) -> Store:
    """Open the database, the bundles and the key.

    Raises:
        StoreError: One of them cannot be opened.
    """
    _make_directory(config.state_dir)
    try:
        blobs = BlobStore(config.state_dir / "blobs")
    except OSError as error:
        raise DiskFullError(f"cannot use {config.state_dir}: {error.strerror}") from error
    key = open_key(config)
    return Store(open_database(config.database_url, MIGRATIONS), blobs, key)


def open_key(config: Config) -> CatalogueKey:
    """The catalogue's signing key; it is made the first time.

    Raises:
        TrustError: The file holds no key.
        DiskFullError: It cannot be read or made.
    """
    _make_directory(config.state_dir)
    path = config.state_dir / "catalogue.key"
    try:
        return CatalogueKey.load_or_create(path)
    except OSError as error:
        raise DiskFullError(f"cannot use {path}: {error.strerror}") from error


def make_handlers(store: Store, config: Config) -> tuple[Handlers, Uploads]:
    """The devices' side of the catalogue, short of the connection."""
    complaints = Complaints(store)
    uploads = Uploads(
        store,
        config.state_dir / "incoming",
        complaints,
        max_bundle_bytes=config.catalogue.max_bundle_bytes,
        max_concurrent=config.catalogue.max_uploads,
    )
    handlers = Handlers(store, uploads, complaints, min_similarity=config.catalogue.min_similarity)
    return handlers, uploads


def operator_token(config: Config) -> str:
    """What operators present; it is made the first time, in a file that only its owner reads.

    Raises:
        DiskFullError: It cannot be read or made.
    """
    if config.http.token:
        return config.http.token
    path = config.token_file
    try:
        if path.exists() and (token := path.read_text(encoding="utf-8").strip()):
            return token
        path.unlink(missing_ok=True)
        token = secrets.token_urlsafe(32)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DiskFullError(f"cannot use {path}: {error.strerror}") from error
    return token


def run(config: Config, *, announce: Callable[[str], None]) -> None:
    """Run the catalogue until it is told to end (SIGTERM or SIGINT).

    Args:
        config: The whole configuration.
        announce: Called once it listens, with a line that says where, and the public key.

    Raises:
        StateLockedError: Another catalogue uses this state directory.
        StoreError: Something cannot be opened; the message says what.
        ConfigError: The port cannot be had.
    """
    with ExitStack() as stack:
        _make_directory(config.state_dir)
        stack.callback(os.close, lock_directory(config.state_dir))
        store = open_store(config)
        stack.callback(store.close)
        handlers, uploads = make_handlers(store, config)
        sync = Sync(config.mqtt, handlers, uploads)
        api = make_api(Operators(store, sync.send), store, sync, operator_token(config))
        listening = stack.enter_context(_listen(config.http))
        server = _Server(
            uvicorn.Config(
                api,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=_SHUTDOWN_S,
            ),
            store.release,
        )
        stack.enter_context(_ending_in_order())
        sync.start()
        stack.callback(sync.stop)
        url = _url(listening)
        write_durably(config.address_file, json.dumps({"url": url}).encode())
        stack.callback(config.address_file.unlink, missing_ok=True)
        announce(f"catalogue listens on {url}, public key {store.key.public_key}")
        server.run(sockets=[listening])
        log.info("ending")


class _Server(uvicorn.Server):
    """A server that ends all long waits when it is told to end."""

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_end = on_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        self.should_exit = True
        self._on_end()
        del sig, frame


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGINT unwind what is open while the server does not listen to them."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    earlier = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskFullError(f"cannot use {path}: {error.strerror}") from error


def _listen(http: HttpSection) -> socket.socket:
    if http.host not in _LOOPBACK:
        log.warning(
            "the operators' API listens on %s without TLS; the token can be read on the way",
            http.host,
        )
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        return socket.create_server((http.host, http.port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {http.host}:{http.port}: {error.strerror or error}; set http.port"
        ) from error


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
