"""Starting an MQTT broker for trying and for tests: mosquitto where there is one, else our own.

Either runs as a process of its own on the loopback address, with one account a user and access
rules that let a device speak for itself only. For production, set up a broker with the same rules.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from adapter_store import wire
from adapter_store.errors import StoreError

Kind = Literal["mosquitto", "embedded"]
Choice = Literal["auto", "mosquitto", "embedded"]
HOST: Final = "127.0.0.1"
CATALOGUE: Final = "catalogue"
_KIND_VARIABLE: Final = "DRIFTKEEL_BROKER"
_START_TIMEOUT_S: Final = 15.0
_PORT_ATTEMPTS: Final = 5
# Fixed header, topic and packet id, generously.
_HEADER_BYTES: Final = 1024


class BrokerError(StoreError):
    """A broker cannot be started."""


@dataclass(frozen=True)
class Broker:
    """A running broker; as a context manager it stops at the end.

    Attributes:
        kind: Which one it is.
        host: Where it listens.
        port: Its port there.
        process: Its process.
    """

    kind: Kind
    host: str
    port: int
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process's id."""
        return self.process.pid

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_mosquitto() -> str | None:
    """The path of mosquitto, or None; Debian keeps it where only root's PATH looks."""
    return _find("mosquitto")


def choose_kind() -> Kind:
    """Which broker to start: what ``DRIFTKEEL_BROKER`` names, else mosquitto where it is.

    Raises:
        BrokerError: The variable names no kind of broker.
    """
    match os.environ.get(_KIND_VARIABLE, ""):
        case "mosquitto":
            return "mosquitto"
        case "embedded":
            return "embedded"
        case "":
            return "mosquitto" if find_mosquitto() else "embedded"
        case other:
            raise BrokerError(f"{_KIND_VARIABLE}={other!r}: use 'mosquitto' or 'embedded'")


def start_broker(
    directory: Path, users: Mapping[str, str], *, port: int = 0, kind: Choice = "auto"
) -> Broker:
    """Start a broker and wait until it accepts connections.

    Args:
        directory: Where its configuration and log go.
        users: Passwords by user. ``catalogue`` is the catalogue; every other is a device.
        port: The port; 0 takes a free one.
        kind: Which broker; "auto" is what `choose_kind` says.

    Raises:
        BrokerError: It cannot be started, with the end of its log; or a user or password will
            not do.
        WireError: A user's name is no device name.
    """
    for user, password in users.items():
        wire.up_topic(user)
        if not password or ":" in password or not password.isprintable():
            raise BrokerError(
                f"the password of {user!r} is empty or has ':' or a control character"
            )
    chosen = choose_kind() if kind == "auto" else kind
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        try:
            return _start(directory, users, port or _free_port(), chosen)
        except BrokerError:
            # A free port may be taken by someone else before the broker has it.
            if port or attempt == _PORT_ATTEMPTS:
                raise
    raise AssertionError


def _start(directory: Path, users: Mapping[str, str], port: int, kind: Kind) -> Broker:
    if _accepts(port):
        raise BrokerError(f"port {port} is taken; stop what listens there or choose another")
    prepare = _mosquitto if kind == "mosquitto" else _embedded
    arguments = prepare(directory.resolve(), users, port)
    log_path = directory / "broker.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    broker = Broker(kind, HOST, port, process)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if _accepts(port):
            return broker
        time.sleep(0.01)
    broker.stop()
    tail = log_path.read_text(errors="replace")[-500:].strip()
    raise BrokerError(f"the {kind} broker does not start on port {port}: {tail or 'no log'}")


def acl(user: str) -> list[tuple[Literal["read", "write"], str]]:
    """What a user may do: the access rules any broker for Driftkeel must have."""
    if user == CATALOGUE:
        down = wire.down_topic("x").removesuffix("x") + "+"
        return [("read", wire.ALL_UP), ("read", wire.ALL_PRESENCE), ("write", down)]
    return [
        ("write", wire.up_topic(user)),
        ("write", wire.presence_topic(user)),
        ("read", wire.down_topic(user)),
    ]


def _mosquitto(directory: Path, users: Mapping[str, str], port: int) -> list[str]:
    program, hasher = find_mosquitto(), _find("mosquitto_passwd")
    if program is None or hasher is None:
        raise BrokerError(
            "mosquitto is not installed; use apt-get install mosquitto, or the embedded broker"
        )
    passwords, rules = directory / "passwords", directory / "acl"
    _write_secret(passwords, "".join(f"{user}:{word}\n" for user, word in users.items()))
    hashed = subprocess.run([hasher, "-U", str(passwords)], check=False, capture_output=True)
    if hashed.returncode:
        raise BrokerError(f"mosquitto_passwd failed: {hashed.stderr.decode(errors='replace')}")
    blocks = (
        "\n".join([f"user {user}", *(f"topic {verb} {topic}" for verb, topic in acl(user))])
        for user in users
    )
    _write_secret(rules, "\n\n".join(blocks) + "\n")
    config = directory / "mosquitto.conf"
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous false",
        f"password_file {passwords}",
        f"acl_file {rules}",
        "set_tcp_nodelay true",
        # Its default drops messages without a word after a thousand.
        "max_queued_messages 0",
        f"max_packet_size {wire.MAX_MESSAGE_BYTES + _HEADER_BYTES}",
        "persistence false",
        # Started by root it would become another user and could not read its own files.
        *(["user root"] if os.geteuid() == 0 else []),
    ]
    config.write_text("\n".join(lines) + "\n")
    return [program, "-c", str(config)]


def _embedded(directory: Path, users: Mapping[str, str], port: int) -> list[str]:
    accounts = directory / "accounts.json"
    rules = {user: {"password": word, "acl": acl(user)} for user, word in users.items()}
    _write_secret(accounts, json.dumps(rules))
    return [sys.executable, "-m", "cloud.embedded_broker", str(port), str(accounts)]


def _find(program: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which(program, path=path)


def _write_secret(path: Path, text: str) -> None:
    """Write a file nobody else can read, at no moment."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False
