"""The daemon as a process of its own: start, memory, and what HTTP adds. Part of `runtime`.

A state directory with so many bundles is written as the agent itself would, `driftkeel agent` is
started on it, and asked over loopback with real pictures. Memory is the process's resident set.
"""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import pack
from adapter_store.state import StateDir
from benchmarks import command
from benchmarks.fleet_of_adapters import Fleet
from edge_agent.bench import datasets
from edge_agent.installer import Settings, build_generation, load_generation
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.quantise import quantise
from exporter.sessions import EncoderSessions

# Bundles by encoder. A thousand take many minutes to make, and what they add does not depend on how
# the encoder's weights are stored.
COUNTS: Final = {"float32": (1, 1000), "int8": (1,)}
_SETTINGS: Final = Settings(false_alarm_every=1e6, max_rounds=4)
_SAMPLES: Final = 400
_STARTS: Final = 5
_ASKED: Final = 400
_PATIENCE_S: Final = 120.0
_SHOWN: Final = 8000  # characters of the daemon's log
_MAIN: Final = "from adapter_store.cli import main; main()"


def measured(package: EncoderPackage, data: Path) -> dict[str, Any]:
    """Start, memory and latency, by encoder (float32 and int8) and number of bundles."""
    found = datasets.load(data / command.SET)
    rows = np.sort(np.random.default_rng(0).permutation(len(found))[:_SAMPLES])
    images = found.read(rows, package.image_size)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = quantise(package, Path(folder) / "int8", images=prepare(images[:64], package))
        for name, encoder in (("float32", package), ("int8", small)):
            for count in COUNTS[name]:
                key = f"{name}, {count} bundles"
                report[key] = _one(encoder, images, count, Path(folder) / f"{name}-{count}")
                print(f"{key}: {report[key]}", file=sys.stderr)
    return report


def write_state(
    package: EncoderPackage, images: NDArray[np.uint8], count: int, folder: Path
) -> Path:
    """A state directory with one active generation of so many bundles, and its configuration.

    Returns:
        The configuration's file.
    """
    sessions = EncoderSessions(package)
    features = sessions.base_features(sessions.prefix(prepare(images, package)))
    fleet = Fleet(package, features, count)
    folder.mkdir(parents=True)
    with StateDir(folder / "state") as state:
        digests = [state.blobs.put(pack(bundle)) for bundle in fleet.values()]
        made = build_generation(
            state,
            sessions,
            digests,
            features,
            parent=None,
            reason="to be timed",
            metrics={},
            settings=_SETTINGS,
            now=0.0,
        )
        state.generations.activate(made.number)
    config = folder / "agent.toml"
    config.write_text(
        f"[agent]\ndevice = 'timed'\nstate_dir = {str(folder / 'state')!r}\n"
        f"encoder = {str(package.path.resolve())!r}\n[http]\nport = 0\n[learner]\nenabled = false\n"
    )
    return config


class Daemon:
    """A running daemon and a connection to it.

    Attributes:
        process: The process.
        connection: A connection that is kept open.
    """

    def __init__(self, config: Path) -> None:
        where = config.parent / "state" / "http.json"
        where.unlink(missing_ok=True)
        self.log = (config.parent / "log.txt").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "agent", "--config", str(config)], stderr=self.log
        )
        until = time.monotonic() + _PATIENCE_S
        while not where.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the daemon did not start; see {self.log.name}")
            time.sleep(0.002)
        self.address = json.loads(where.read_text())["url"].removeprefix("http://")
        self.connection = Connection(self.address)

    def ask(self, image: NDArray[np.uint8], *, probe: bool) -> bytes:
        """The answer to one sample; a probe is not journalled."""
        return self.connection.ask(encoded(image), probe=probe)

    def resident_mb(self) -> float:
        """What the process holds in memory, in megabytes of 10^6 bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / 1e6

    def stop(self) -> None:
        """End it."""
        self.connection.close()
        self.process.terminate()
        self.process.wait(_PATIENCE_S)
        self.log.close()


@contextmanager
def started(config: Path) -> Iterator[Daemon]:
    """A daemon, ended when it is left; what it had to say is shown where something failed."""
    daemon = Daemon(config)
    try:
        yield daemon
    except BaseException:
        print(Path(daemon.log.name).read_text("utf-8")[-_SHOWN:], file=sys.stderr)
        raise
    finally:
        daemon.stop()


class Connection:
    """One open connection; http.client would take a good part of what is measured.

    Args:
        address: The daemon's host and port.
    """

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")

    def ask(self, body: bytes, *, probe: bool) -> bytes:
        """Send one sample and read its answer.

        Raises:
            RuntimeError: The daemon refused it.
        """
        self._socket.sendall(
            b"POST /v1/predict%b HTTP/1.1\r\nhost: device\r\ncontent-type: application/x-npy\r\n"
            b"content-length: %d\r\n\r\n%b" % (b"?probe=1" * probe, len(body), body)
        )
        status, length = self._answers.readline(), 0
        while (line := self._answers.readline().strip().lower()) != b"":
            name, _, value = line.partition(b":")
            if name == b"content-length":
                length = int(value)
        answer = self._answers.read(length)
        if b" 200 " not in status:
            raise RuntimeError(f"the daemon answered {status!r} {answer[:200]!r}")
        return answer

    def close(self) -> None:
        """Close it."""
        self._answers.close()
        self._socket.close()


def encoded(image: NDArray[np.uint8]) -> bytes:
    """A picture as a request's body."""
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def _one(
    package: EncoderPackage, images: NDArray[np.uint8], count: int, folder: Path
) -> dict[str, Any]:
    config = write_state(package, images, count, folder)
    starts = []
    for _ in range(_STARTS):
        begun = time.perf_counter()
        with started(config) as daemon:
            daemon.ask(images[0], probe=False)
            starts.append(time.perf_counter() - begun)
    report: dict[str, Any] = {
        "first_answer_s": {"minimum": min(starts), "median": float(np.median(starts))}
    }
    with StateDir(folder / "state") as state:
        generation = state.generations.current()
        assert generation is not None
        serving = load_generation(generation, EncoderSessions(package), settings=_SETTINGS)
    with started(config) as daemon:
        taken: dict[str, list[float]] = {"in process": [], "http": [], "http, journalled": []}
        for row in range(_ASKED):
            image = images[row % len(images)]
            ways = {
                "in process": lambda image=image: serving.predict(image[None]),
                "http": lambda image=image: daemon.ask(image, probe=True),
                "http, journalled": lambda image=image: daemon.ask(image, probe=False),
            }
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                taken[name].append(1000 * (time.perf_counter() - begun))
        report["resident_mb"] = daemon.resident_mb()
    report["ms"] = {
        name: {"p50": float(np.median(times)), "p99": float(np.quantile(times, 0.99))}
        for name, times in taken.items()
    }
    report["http_adds_ms"] = report["ms"]["http"]["p50"] - report["ms"]["in process"]["p50"]
    return report
