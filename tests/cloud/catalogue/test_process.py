"""How the catalogue's process starts and ends when something is in its way."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WAIT_S = 40.0
DRIFTKEEL = (sys.executable, "-c", "from adapter_store.cli import main; main()")

pytestmark = pytest.mark.e2e


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and nobody else can: a broker that is away."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def config(tmp_path: Path, closed_port: int) -> Path:
    path = tmp_path / "catalogue.toml"
    path.write_text(
        f'[catalogue]\nstate_dir = "state"\n[mqtt]\nhost = "127.0.0.1"\nport = {closed_port}\n'
        "[http]\nport = 0\n",
        encoding="utf-8",
    )
    (tmp_path / "state").mkdir()
    return path


def ends(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DRIFTKEEL, *words], capture_output=True, text=True, timeout=WAIT_S, check=False
    )


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_though_an_operator_watches_and_the_broker_is_away(
    config: Path, how: signal.Signals
) -> None:
    address = config.parent / "state" / "http.json"
    catalogue = subprocess.Popen(
        [*DRIFTKEEL, "catalogue", "--config", str(config)], stdout=subprocess.PIPE
    )
    assert catalogue.stdout is not None
    assert b"listens on http://127.0.0.1:" in catalogue.stdout.readline()
    until(address.exists, catalogue)
    refused = ends("shell", "--config", str(config), "-c", "pin nobody")
    assert refused.returncode == 1
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    watching = subprocess.Popen(
        [*DRIFTKEEL, "shell", "--config", str(config), "--json", "-c", "log", "-c", "watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert watching.stdout is not None
    assert b"pin" in watching.stdout.readline()
    catalogue.send_signal(how)
    assert catalogue.wait(WAIT_S) == 0
    _, errors = watching.communicate(timeout=WAIT_S)
    assert watching.returncode == 1
    assert b"cannot be reached" in errors
    assert not address.exists()


def test_a_port_in_use_is_named(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = config.read_text(encoding="utf-8").replace("port = 0", f"port = {port}")
        config.write_text(text, encoding="utf-8")
        done = ends("catalogue", "--config", str(config))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "set http.port" in done.stderr


def test_a_file_that_is_no_database_is_named_and_kept(config: Path) -> None:
    path = config.parent / "state" / "catalogue.db"
    path.write_bytes(b"this is no database" * 100)
    done = ends("catalogue", "--config", str(config))
    assert done.returncode == 1
    assert "catalogue.db" in done.stderr
    assert path.read_bytes() == b"this is no database" * 100


def test_a_file_that_is_no_key_is_named_and_kept(config: Path) -> None:
    path = config.parent / "state" / "catalogue.key"
    path.write_bytes(b"short")
    for words in (("catalogue", "--config"), ("catalogue", "public-key", "--config")):
        done = ends(*words, str(config))
        assert done.returncode == 1
        assert "holds no Ed25519 key" in done.stderr
    assert path.read_bytes() == b"short"


def test_a_state_directory_that_is_a_file_is_named(config: Path) -> None:
    (config.parent / "state").rmdir()
    (config.parent / "state").write_text("in the way", encoding="utf-8")
    done = ends("catalogue", "--config", str(config))
    assert done.returncode == 1
    assert "cannot use" in done.stderr
    assert "Traceback" not in done.stderr
