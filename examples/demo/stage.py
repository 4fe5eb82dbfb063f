"""The demo's processes: broker, catalogue, devices; each its own, each with its own state.

Everything is started through the commands a user would type, and asked through the same HTTP and
shell interfaces; nothing here reaches inside.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import httpx
import numpy as np

from cloud.broker import Broker, start_broker
from examples.demo.digits import Images, Split

T = TypeVar("T")
_DRIFTKEEL = (sys.executable, "-c", "from adapter_store.cli import main; main()")


class DemoError(Exception):
    """A step of the demo did not happen."""


@dataclass
class Child:
    """One running process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise when the process has ended on its own."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise DemoError(f"{self.name} ended with {self.process.returncode}:\n{tail}")

    def stop(self) -> None:
        """End the process; it gets time to finish what it does."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Device:
    """A device as its application sees it: a local HTTP API.

    Args:
        name: The device's name.
        child: Its daemon.
        url: Where the daemon answers.
    """

    def __init__(self, name: str, child: Child, url: str) -> None:
        self.name = name
        self.child = child
        self.failed = 0
        self.requests = 0
        self._client = httpx.Client(base_url=url, timeout=30)
        self._count = threading.Lock()

    def predict(self, image: Images) -> dict[str, Any]:
        """One sample's answer."""
        return self._post(image[None], probe=False)[0]

    def probe(self, split: Split) -> list[dict[str, Any]]:
        """Answers for a probe set, which leaves no trace in the device's journal."""
        return self._post(split.images, probe=True)

    def accuracy(self, split: Split) -> float:
        """The share of a probe set that is answered rightly."""
        answers = self.probe(split)
        right = [a["label"] == str(y) for a, y in zip(answers, split.labels, strict=True)]
        return float(np.mean(right))

    def feedback(self, sample_id: str, label: int) -> None:
        """Tell the device what a sample really was."""
        self._request("POST", "/v1/feedback", json={"sample_id": sample_id, "label": str(label)})

    def answers(self) -> bool:
        """Whether the daemon is up."""
        try:
            return self._client.get("/healthz").is_success
        except httpx.ConnectError:
            return False

    def get(self, path: str) -> Any:
        """What a GET endpoint answers."""
        return self._request("GET", path).json()

    def _post(self, images: Images, *, probe: bool) -> list[dict[str, Any]]:
        answer = self._request(
            "POST",
            "/v1/predict",
            params={"probe": "1"} if probe else {},
            content=npy(images[..., None]),
            headers={"content-type": "application/x-npy"},
        )
        samples: list[dict[str, Any]] = answer.json()["samples"]
        return samples

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            self._counted(ok=False)
            self.child.check()
            raise DemoError(f"{self.name} did not answer {path}: {error}") from error
        self._counted(ok=response.status_code == httpx.codes.OK)
        if response.status_code != httpx.codes.OK:
            raise DemoError(f"{self.name} answered {path} with {response.text}")
        return response

    def _counted(self, *, ok: bool) -> None:
        with self._count:
            self.requests += 1
            self.failed += not ok


class Stage:
    """Starts and stops everything; use as a context manager.

    Args:
        root: An empty directory for all state and logs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._users = {
            name: secrets.token_hex(12) for name in ("catalogue", "device-a", "device-b")
        }
        self._stack = ExitStack()
        self._broker: Broker | None = None
        self._catalogue_config = root / "catalogue.toml"
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self.children):
            child.stop()
        self._stack.close()

    def start_broker(self) -> str:
        """Start the broker; returns which kind it is."""
        self._broker = start_broker(self.root / "broker", self._users)
        self._stack.callback(self._broker.stop)
        return f"{self._broker.kind} on {self._broker.host}:{self._broker.port}"

    def start_catalogue(self) -> Child:
        """Start the catalogue and wait until its operator API answers."""
        self._catalogue_config.write_text(
            f"[catalogue]\nstate_dir = {_toml(self.root / 'catalogue')}\n\n"
            f"{self._mqtt('catalogue')}\n[http]\nport = 0\n",
            encoding="utf-8",
        )
        child = self._spawn("catalogue", "catalogue", "--config", str(self._catalogue_config))
        http = self.root / "catalogue" / "http.json"
        wait_for(lambda: http.exists() or None, "the catalogue's API", child=child)
        return child

    def shell(self, command: str) -> str:
        """Run one operator command; returns what it printed."""
        return self._shell("-c", command)

    def shell_json(self, command: str) -> Any:
        """Run one operator command with ``--json``."""
        return json.loads(self._shell("--json", "-c", command))

    def fit_device(self, name: str, fit: Split, *, min_labels: int) -> str:
        """Write a device's configuration and give it its first generation."""
        key = self._run("catalogue", "public-key", "--config", str(self._catalogue_config))
        (self.root / name).mkdir(exist_ok=True)
        self._device_config(name).write_text(
            f"[agent]\ndevice = {name!r}\nstate_dir = {_toml(self.root / name / 'state')}\n\n"
            f"{self._mqtt(name)}\n[http]\nport = 0\n\n"
            f"[catalogue]\npublic_key = {key.strip().splitlines()[-1]!r}\n\n"
            f"[learner]\nmin_labels = {min_labels}\n",
            encoding="utf-8",
        )
        data = self.root / name / "first.npz"
        np.savez(data, x=fit.images, y=fit.labels.astype(str))
        return self._run(
            "agent", "fit", "--config", str(self._device_config(name)), "--data", str(data)
        )

    def start_device(self, name: str) -> Device:
        """Start a device's daemon and wait until it answers."""
        child = self._spawn(name, "agent", "--config", str(self._device_config(name)))
        http = self.root / name / "state" / "http.json"
        wait_for(lambda: http.exists() or None, f"{name}'s API", child=child)
        url = json.loads(http.read_text(encoding="utf-8"))["url"]
        device = Device(name, child, url)
        wait_for(lambda: device.answers() or None, f"{name} to answer", child=child)
        return device

    def _device_config(self, name: str) -> Path:
        return self.root / name / "agent.toml"

    def _mqtt(self, user: str) -> str:
        if self._broker is None:
            raise DemoError("the broker is not running")
        return (
            f"[mqtt]\nhost = {self._broker.host!r}\nport = {self._broker.port}\n"
            f"username = {user!r}\npassword = {self._users[user]!r}\n"
        )

    def _shell(self, *arguments: str) -> str:
        return self._run("shell", "--config", str(self._catalogue_config), *arguments)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*_DRIFTKEEL, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=_environment(),
        )
        if done.returncode != 0:
            raise DemoError(
                f"driftkeel {' '.join(arguments)} ended with {done.returncode}: "
                f"{done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def _spawn(self, name: str, *arguments: str) -> Child:
        path = self.root / f"{name}.log"
        log: IO[bytes] = self._stack.enter_context(path.open("wb"))
        process = subprocess.Popen(
            [*_DRIFTKEEL, *arguments], stdout=log, stderr=subprocess.STDOUT, env=_environment()
        )
        child = Child(name, process, path)
        self.children.append(child)
        return child


def npy(images: Images) -> bytes:
    """Images as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    return buffer.getvalue()


def wait_for(
    probe: Callable[[], T | None], what: str, *, child: Child, timeout_s: float = 60.0
) -> T:
    """Ask again and again until something is there.

    Raises:
        DemoError: It did not come in time, or the process that should bring it ended.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = probe()
        if value is not None:
            return value
        child.check()
        if time.monotonic() > deadline:
            raise DemoError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.1)


def _toml(path: Path) -> str:
    return json.dumps(str(path.resolve()))


def _environment() -> dict[str, str]:
    # The devices share one machine here; idle threads must not spin against each other.
    return os.environ | {"COLUMNS": "110", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
