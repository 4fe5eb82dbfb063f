"""What the end-to-end tests start: broker, catalogue and agents as processes, on small data.

Built on the demo's stage. It adds what failures need: configurations with any section, state taken
over from an earlier run, `kill -9`, brokers that go and come back on the same port, and a catalogue
account for the tests' own messages. Everything waits by asking again until a deadline.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from adapter_store.trust import CatalogueKey
from cloud.broker import Kind, start_broker
from examples.demo.digits import FIRST, NEW, Split, worlds
from examples.demo.stage import _DRIFTKEEL, Child, Device, Stage, _environment
from tests.e2e.accounts import Account
from tests.e2e.waiting import WAIT_S, until

Sections = dict[str, dict[str, Any]]

LABELS = 40
# Labels enough for one training; a small adapter, few epochs: a second or two of training.
LEARNER: dict[str, Any] = {"min_labels": LABELS, "rank": 4, "epochs": 4}

WORLD_A, WORLD_B = worlds(seed=7)
KNOWN = WORLD_A.stream.only(FIRST)
SHIFTED = WORLD_A.stream.only(NEW).first(80)
SHIFTED_B = WORLD_B.stream.only(NEW).first(80)
PROBE = WORLD_A.probe.first(60)
FIT = WORLD_A.fit


class Edge(Device):
    """A device as its application sees it, and as its operator's console shows it."""

    def send(self, split: Split) -> list[dict[str, Any]]:
        """Answers to samples that are the device's input, a few to a request."""
        answers = []
        for start in range(0, len(split), 8):
            answers += self._post(split.images[start : start + 8], probe=False)
        return answers

    def raw(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request whose refusal is of interest."""
        return self._client.request(method, path, **options)

    def predict_raw(self, body: bytes, content_type: str) -> httpx.Response:
        """Whatever bytes, sent as a sample."""
        return self.raw("POST", "/v1/predict", content=body, headers={"content-type": content_type})

    def status(self) -> dict[str, Any]:
        """Its status."""
        answer: dict[str, Any] = self.get("/v1/status")
        return answer

    @property
    def generation(self) -> int:
        """The generation that runs."""
        number: int = self.status()["generation"]["number"]
        return number

    def predictions(self) -> list[tuple[str, float, int]]:
        """What it says about the probe set: labels, probabilities, generation."""
        return [(a["label"], a["probability"], a["generation"]) for a in self.probe(PROBE)]

    def stage(self) -> str:
        """Where its newest episode is; empty before the first."""
        episode = self.status()["episode"]
        return "" if episode is None else str(episode["state"])

    def until_stage(self, *stages: str) -> None:
        """Wait until its episode is at one of these stages."""
        until(
            lambda: self.stage() in stages,
            f"{self.name} to be {' or '.join(stages)}; {self.name}.log says more",
            self.child,
        )

    def until_generation(self, number: int) -> None:
        """Wait until a generation runs and the episode that made it is over."""
        until(
            lambda: self.generation == number and self.stage() in ("", "closed"),
            f"{self.name} to run generation {number}; {self.name}.log says more",
            self.child,
        )

    def sync(self) -> dict[str, Any]:
        """How its connection does."""
        sync: dict[str, Any] = self.status()["sync"]
        return sync

    def counted(self, name: str) -> int:
        """What its sync client counted under a name."""
        count: int = self.sync()["counters"].get(name, 0)
        return count

    def until_connected(self) -> None:
        """Wait until it speaks with its broker."""
        until(lambda: self.sync()["connected"], f"{self.name} to connect", self.child)

    def label(self, answers: Sequence[dict[str, Any]], split: Split) -> set[str]:
        """Say what samples really were; returns the ids whose label was acknowledged."""
        labels = split.labels[: len(answers)]
        items = [
            {"sample_id": a["sample_id"], "label": str(y)}
            for a, y in zip(answers, labels, strict=True)
        ]
        done = self._request("POST", "/v1/feedback", json={"feedback": items}).json()
        assert done == {"accepted": len(items), "unknown": []}
        return {item["sample_id"] for item in items}

    def shift(self, split: Split, *, labels: int = 0) -> set[str]:
        """Live through a shift: known samples, then others.

        Returns:
            The ids of the first ``labels`` of those, whose true label was acknowledged.
        """
        self.send(KNOWN.first(48))
        answers = self.send(split)
        return self.label(answers[:labels], split) if labels else set()


class Plant(Stage):
    """Broker, catalogue and devices under one directory.

    Args:
        root: An empty directory.
        kind: Which broker.
    """

    def __init__(self, root: Path, kind: Kind) -> None:
        super().__init__(root)
        self.kind: Kind = kind
        self.key = CatalogueKey.load_or_create(self.state("catalogue") / "catalogue.key")

    def state(self, name: str) -> Path:
        """The state directory of a device, or of the catalogue."""
        return self.root / name if name == "catalogue" else self.root / name / "state"

    # The broker ----------------------------------------------------------------------------------

    def start_broker(self) -> str:
        """Start it; after `stop_broker`, on the same port."""
        port = 0 if self._broker is None else self._broker.port
        directory = self.root / "broker"
        self._broker = start_broker(directory, self._users, kind=self.kind, port=port)
        self._stack.callback(self._broker.stop)
        return self._broker.kind

    def stop_broker(self) -> None:
        """End it, whoever is connected."""
        assert self._broker is not None
        self._broker.stop()

    def account(self, name: str) -> Account:
        """A connection of the tests' own, with someone's rights."""
        assert self._broker is not None
        account = Account(name, self._broker.host, self._broker.port, self._users[name])
        self._stack.callback(account.close)
        return account

    # Processes -----------------------------------------------------------------------------------

    def start_catalogue(self) -> Child:
        """Start it (again) and wait until operators can speak with it."""
        (self.state("catalogue") / "http.json").unlink(missing_ok=True)
        return super().start_catalogue()

    def config(self, name: str) -> Path:
        """A device's, or the catalogue's, configuration file."""
        return self._catalogue_config if name == "catalogue" else self._device_config(name)

    def configure(self, name: str, sections: Sections | None = None) -> Path:
        """Write a device's configuration; ``sections`` add to the usual ones or replace keys."""
        assert self._broker is not None
        usual: Sections = {
            "agent": {"device": name, "state_dir": str(self.state(name))},
            "http": {"port": 0},
            "mqtt": {
                "host": self._broker.host,
                "port": self._broker.port,
                "username": name,
                "password": self._users[name],
            },
            "catalogue": {"public_key": self.key.public_key},
            "learner": LEARNER,
        }
        for section, keys in (sections or {}).items():
            usual[section] = usual.get(section, {}) | keys
        path = self._device_config(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_toml(usual), encoding="utf-8")
        return path

    def place(self, name: str, state: Path, sections: Sections | None = None) -> None:
        """Configure a device that has lived before: with a copy of that state."""
        self.configure(name, sections)
        shutil.copytree(state, self.state(name), dirs_exist_ok=True)

    def start(self, name: str) -> Edge:
        """Start a device's agent (again) and wait until it answers."""
        child = self.spawn(name)
        http = self.state(name) / "http.json"

        def url() -> str | None:
            try:
                where = json.loads(http.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            # One that was killed leaves its file behind.
            return where["url"] if where["pid"] == child.process.pid else None

        device = Edge(name, child, until(url, f"{name}'s API", child))
        until(device.answers, f"{name} to answer", child)
        return device

    def spawn(self, name: str) -> Child:
        """Start a device's agent, and wait for nothing."""
        return self._spawn(name, "agent", "--config", str(self._device_config(name)))

    def run(self, *arguments: str) -> str:
        """Run a command that must succeed; returns what it printed."""
        return self._run(*arguments)

    def refused(self, *arguments: str) -> str:
        """Run a command that must end with status 1; returns the one line it says."""
        done = subprocess.run(
            [*_DRIFTKEEL, *arguments],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            env=_environment(),
        )
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    # What the catalogue holds --------------------------------------------------------------------

    def bundles(self, status: str) -> list[dict[str, Any]] | None:
        """The catalogue's bundles of a status; None while there are none."""
        found: list[dict[str, Any]] = self.shell_json(f"adapters --status {status}")
        return found or None

    def blob(self, digest: str) -> bytes:
        """A bundle as the catalogue keeps it."""
        return (self.state("catalogue") / "blobs" / digest[:2] / digest).read_bytes()

    def uploads(self) -> list[dict[str, Any]]:
        """The audit log's entries about finished uploads."""
        entries: list[dict[str, Any]] = self.shell_json("log -n 200")
        return [entry for entry in entries if entry["action"] == "upload"]


def kill(child: Child) -> None:
    """Kill it as a power cut would."""
    kill_pid(child.process.pid)
    child.process.wait()


def kill_pid(pid: int) -> None:
    """Kill a process that someone else waits for."""
    os.kill(pid, signal.SIGKILL)


def trainer_of(child: Child) -> int | None:
    """The process id of an agent's trainer; None while there is none."""
    for task in Path(f"/proc/{child.process.pid}/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except FileNotFoundError:
            continue
        for pid in map(int, pids):
            try:
                if b"edge_agent.trainer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
            except FileNotFoundError:
                continue
    return None


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def labels_kept(state: Path) -> set[str]:
    """The ids of the labelled samples in a stopped device's journal."""
    with closing(sqlite3.connect(state / "driftkeel.db")) as database:
        rows = database.execute("SELECT id FROM samples WHERE true_label IS NOT NULL")
        return {row[0] for row in rows}


def chunks_kept(state: Path) -> int:
    """How many chunks of a bundle on its way are on the disk, of a device or a catalogue."""
    # The first line says how large the bundle is, each other one what is here of it.
    journals = (state / "incoming").glob("*.ranges")
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in journals)


def _toml(sections: Sections) -> str:
    tables = []
    for section, keys in sections.items():
        # JSON's strings, numbers and booleans are TOML's.
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        tables.append("\n".join([f"[{section}]", *lines, ""]))
    return "\n".join(tables)
