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
from typing import Final, Literal

from adapter_store import wire
from adapter_store.errors import StoreError

Kind = Literal["mosquitto", "embedded"]
HOST: Final = "127.0.0.1"
CATALOGUE: Final = "catalogue"
_KIND_VARIABLE: Final = "DRIFTKEEL_BROKER"
_START_TIMEOUT_S: Final = 15.0


class BrokerError(StoreError):
    """A broker cannot be started."""


@dataclass
class Broker:
    """A running broker."""

    kind: Kind
    host: str
    port: int
    process: subprocess.Popen[bytes]

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
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("mosquitto", path=path)


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
    directory: Path, users: Mapping[str, str], *, port: int = 0, kind: Kind | None = None
) -> Broker:
    """Start a broker and wait until it accepts connections.

    Args:
        directory: Where its configuration and log go.
        users: Passwords by user. ``catalogue`` is the catalogue; every other is a device.
        port: The port; 0 takes a free one.
        kind: Which broker; by default what `choose_kind` says.

    Raises:
        BrokerError: It cannot be started; the message ends with what it logged.
    """
    kind = kind or choose_kind()
    port = port or _free_port()
    directory.mkdir(parents=True, exist_ok=True)
    arguments = (
        _mosquitto(directory, users, port)
        if kind == "mosquitto"
        else _embedded(directory, users, port)
    )
    log_path = directory / "broker.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
    broker = Broker(kind, HOST, port, process)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _accepts(port):
        if process.poll() is not None or time.monotonic() > deadline:
            broker.stop()
            tail = log_path.read_text(errors="replace")[-500:]
            raise BrokerError(f"{kind} broker does not start on port {port}: {tail}")
        time.sleep(0.02)
    return broker


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
    program = find_mosquitto()
    if program is None:
        raise BrokerError("mosquitto is not installed; use apt-get install mosquitto")
    passwords, rules = directory / "passwords", directory / "acl"
    passwords.write_text("".join(f"{user}:{word}\n" for user, word in users.items()))
    passwords.chmod(0o600)
    beside = Path(program).with_name("mosquitto_passwd")
    hasher = str(beside) if beside.exists() else "mosquitto_passwd"
    subprocess.run([hasher, "-U", str(passwords)], check=True, capture_output=True)
    rules.write_text(
        "".join(
            f"user {user}\n" + "".join(f"topic {verb} {topic}\n" for verb, topic in acl(user))
            for user in users
        )
    )
    rules.chmod(0o600)
    config = directory / "mosquitto.conf"
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous false",
        f"password_file {passwords}",
        f"acl_file {rules}",
        "set_tcp_nodelay true",
        "max_queued_messages 0",
        "persistence false",
        # Started by root it would become another user and could not read its own files.
        *(["user root"] if os.geteuid() == 0 else []),
    ]
    config.write_text("\n".join(lines) + "\n")
    return [program, "-c", str(config)]


def _embedded(directory: Path, users: Mapping[str, str], port: int) -> list[str]:
    accounts = directory / "accounts.json"
    accounts.write_text(
        json.dumps({user: {"password": word, "acl": acl(user)} for user, word in users.items()})
    )
    accounts.chmod(0o600)
    return [sys.executable, "-m", "cloud.embedded_broker", str(port), str(accounts)]


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
