"""The catalogue as its own process, and devices that speak with it over a real broker.

`FieldDevice` answers on its own what a device must answer (requests for what it offered, desired
states) and keeps everything it hears; tests wait for what they expect with `hears`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from adapter_store import wire
from adapter_store.bundle import Bundle, Manifest, bundle_digest, pack
from adapter_store.mqtt import Link
from adapter_store.transfer import Sender
from cloud.broker import Broker
from cloud.shell_client import Client
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise

WAIT_S = 60.0
ENCODER = "e" * 64
DRIFTKEEL = [sys.executable, "-c", "from adapter_store.cli import main; main()"]

M = TypeVar("M", bound=wire.Message)


def features(world: int, *, dim: int = 6, sample: int = 0) -> NDArray[np.float32]:
    """Features from one of several distributions that have little in common."""
    centre = np.random.default_rng(world).normal(size=dim)
    noise = np.random.default_rng((world, sample)).normal(size=(96, dim))
    return l2_normalise(centre + 0.2 * noise)


def bundle(world: int = 0, *, dim: int = 6, task: str = "animals") -> bytes:
    """A bundle made of that distribution; with 400 features it takes three chunks."""
    rows = features(world, dim=dim)
    base = ClassStatistics.fit(rows, ["cat", "dog"] * 48)
    manifest = Manifest(
        encoder=ENCODER,
        family="frozen",
        rank=0,
        sites=(),
        labels=base.labels,
        task=task,
        created_at=1.5,
        created_by="device-a",
        samples=base.samples,
        metrics={"accuracy": 0.9},
        score_quantiles=tuple(np.linspace(0.0, 9.0, 101).tolist()),
    )
    return pack(Bundle(manifest, {}, base, base, signature(rows, seed=ENCODER)))


class CatalogueProcess:
    """``driftkeel catalogue`` under a directory, started and ended at will.

    Args:
        root: For its configuration and its state.
        broker: The broker it uses, or where one would be.
        password: Its password there.
    """

    def __init__(self, root: Path, broker: tuple[str, int], password: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.config = root / "catalogue.toml"
        self.state = root / "state"
        self.url = ""
        self._log = root / "catalogue.log"
        self._process: subprocess.Popen[str] | None = None
        host, port = broker
        self.config.write_text(
            f'[catalogue]\nstate_dir = "{self.state}"\n'
            f'[mqtt]\nhost = "{host}"\nport = {port}\nusername = "catalogue"\n'
            f'password = "{password}"\n[http]\nport = 0\n',
            encoding="utf-8",
        )

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*DRIFTKEEL, "catalogue", "--config", str(self.config)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("catalogue listens on "), self.log
        self.url = line.split()[3].rstrip(",")

    def kill(self) -> None:
        """Give it no chance to end in order."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.terminate()
        self._process.communicate(timeout=WAIT_S)
        return self._process.returncode

    @property
    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text(encoding="utf-8")

    @property
    def client(self) -> Client:
        """An operator named tester."""
        return Client(self.url, self.token, "tester")

    @property
    def token(self) -> str:
        """What it gave operators to present."""
        return (self.state / "operator.token").read_text(encoding="utf-8").strip()

    def wait_until(self, accept: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait for devices and log to be as wanted; asks only when something changed."""
        client, revision = self.client, 0
        for _ in range(1000):
            answer: dict[str, Any] = client.get("events", revision=revision, wait_s=WAIT_S)
            if accept(answer):
                return answer
            assert answer["revision"] != revision, (answer, self.log)
            revision = answer["revision"]
        raise AssertionError(answer)

    def refusals(self, count: int) -> list[dict[str, Any]]:
        """The refused entries of the audit log, once there are so many."""

        def refused(answer: dict[str, Any]) -> list[dict[str, Any]]:
            return [entry for entry in answer["log"] if entry["outcome"] == "refused"]

        return refused(self.wait_until(lambda answer: len(refused(answer)) >= count))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


class FieldDevice:
    """A device on the broker.

    Args:
        name: Its name, and its account.
        broker: Host and port.
        password: Its password.
        waits: Whether ``with`` waits for the broker.
    """

    def __init__(
        self, name: str, broker: tuple[str, int], password: str, *, waits: bool = True
    ) -> None:
        self._waits = waits
        self.name = name
        self.generation, self.pinned, self.version = 2, False, 0
        self.generations: dict[int, Sequence[str]] = {1: [], 2: []}
        # Whether it answers requests for what it offered; cleared, it says nothing.
        self.answering = threading.Event()
        self.answering.set()
        self.obedient = True
        self.bundles: dict[str, bytes] = {}
        self._sequence = 0
        self._sender = Sender(lambda digest: self.bundles[digest])
        self._heard: list[wire.DownMessage] = []
        self._news = threading.Condition()
        self._link = Link(
            host=broker[0],
            port=broker[1],
            client_id=f"driftkeel-{name}",
            username=name,
            password=password,
            will=(wire.presence_topic(name), b"offline"),
            subscriptions=[wire.down_topic(name)],
            on_message=self._received,
        )

    def __enter__(self) -> Self:
        self._link.start()
        if self._waits:
            self.wait_connected()
        return self

    def __exit__(self, *_: object) -> None:
        self._link.stop()

    def wait_connected(self) -> None:
        """Wait for the broker."""
        assert self._link.wait_connected(WAIT_S)

    # What it says --------------------------------------------------------------------------------

    def say(self, message: wire.UpMessage) -> None:
        """Send a message."""
        self.say_bytes(wire.encode(message))

    def say_bytes(self, payload: bytes) -> None:
        """Send any bytes."""
        assert self._link.publish(wire.up_topic(self.name), payload)

    def join(self) -> None:
        """Register and report, and wait for both to be taken; repeats what gets no answer."""
        register = wire.Register(device=self.name, encoder=ENCODER, software="driftkeel 0.1.0")
        self.repeat(register, wire.Ack, lambda ack: ack.of == register.id)
        report = self.report_message()
        self.repeat(report, wire.Ack, lambda ack: ack.of == report.id)

    def offer(self, data: bytes) -> str:
        """Offer a bundle; returns its digest."""
        digest = bundle_digest(data)
        self.bundles[digest] = data
        self.say(wire.Offer(digest=digest, size_bytes=len(data)))
        return digest

    def upload(self, data: bytes) -> str:
        """Offer a bundle until it is stored."""
        digest = self.offer(data)
        again = wire.Offer(digest=digest, size_bytes=len(data))
        assert self.repeat(again, wire.OfferResult, lambda r: r.digest == digest).stored
        return digest

    def search(self, world: int, *, sample: int = 1) -> list[wire.Candidate]:
        """What fits samples of a distribution."""
        packed = signature(features(world, sample=sample), seed=ENCODER).to_bytes()
        message = wire.Search(encoder=ENCODER, signature=packed)
        return self.repeat(message, wire.SearchResult, lambda r: r.of == message.id).candidates

    def report_message(self) -> wire.Report:
        """What it says of what it runs."""
        self._sequence += 1
        return wire.Report(
            device=self.name,
            sequence=self._sequence,
            desired_version=self.version,
            generation=self.generation,
            generation_digest="0" * 64,
            pinned=self.pinned,
            generations=[
                wire.GenerationSummary(
                    number=number,
                    digest="0" * 64,
                    reason="learned",
                    created_at=1.0,
                    bundles=list(held),
                )
                for number, held in self.generations.items()
            ],
        )

    # What it hears -------------------------------------------------------------------------------

    def hears(
        self, kind: type[M], accept: Callable[[M], bool] = lambda _: True, *, within_s: float = 0
    ) -> M:
        """Wait for a message."""
        with self._news:
            assert self._news.wait_for(
                lambda: self._find(kind, accept) is not None, within_s or WAIT_S
            ), f"{self.name} heard only {[type(m).__name__ for m in self._heard]}"
            found = self._find(kind, accept)
            assert found is not None
            return found

    def repeat(self, message: wire.UpMessage, kind: type[M], accept: Callable[[M], bool]) -> M:
        """Send a message until its answer comes, as devices do."""
        for _ in range(int(WAIT_S)):
            self._link.publish(wire.up_topic(self.name), wire.encode(message))
            with self._news:
                self._news.wait_for(lambda: self._find(kind, accept) is not None, 1.0)
                found = self._find(kind, accept)
            if found is not None:
                return found
        raise AssertionError(f"{type(message).__name__} got no answer in {WAIT_S} s")

    def _find(self, kind: type[M], accept: Callable[[M], bool]) -> M | None:
        return next((m for m in self._heard if isinstance(m, kind) and accept(m)), None)

    def _received(self, _: str, payload: bytes) -> None:
        message = wire.decode_down(payload)
        with self._news:
            self._heard.append(message)
            self._news.notify_all()
        match message:
            case wire.Get() if self.answering.is_set():
                self.say(self._sender.answer(message))
            case wire.Desired() if self.obedient and message.version > self.version:
                self.version, self.pinned = message.version, message.pinned
                if message.generation is not None:
                    self.generation = message.generation
                self.say(self.report_message())
            case _:
                pass


@contextmanager
def field(
    root: Path, broker: Broker, users: dict[str, str]
) -> Iterator[tuple[CatalogueProcess, FieldDevice]]:
    """A running catalogue and one device that has joined."""
    where = (broker.host, broker.port)
    with (
        CatalogueProcess(root / "catalogue", where, users["catalogue"]) as catalogue,
        FieldDevice("device-a", where, users["device-a"]) as device,
    ):
        device.join()
        yield catalogue, device
