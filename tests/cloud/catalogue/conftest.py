"""A catalogue without sockets, real bundles that are quick to make, and reports."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from adapter_store import wire
from adapter_store.bundle import Bundle, Manifest, bundle_digest, pack
from adapter_store.transfer import Sender
from cloud.config import CatalogueSection, Config, MqttSection
from cloud.handlers import Handlers
from cloud.operators import Operators
from cloud.service import make_handlers, open_store
from cloud.store import Store
from cloud.uploads import Replies, Uploads
from ood.signature import Signature, signature
from ood.statistics import ClassStatistics, l2_normalise

ENCODER = hashlib.sha256(b"an encoder").hexdigest()
DIM = 8
MakeBundle = Callable[..., bytes]


def features_of(world: int, *, samples: int = 64, draw: int = 0) -> np.ndarray:
    """Features of a world; worlds with different numbers are far from each other."""
    centre = np.random.default_rng(1000 + world).normal(size=DIM)
    noise = np.random.default_rng((world, draw)).normal(size=(samples, DIM))
    return l2_normalise(centre + 0.05 * noise)


def signature_of(world: int, *, draw: int = 1, encoder: str = ENCODER) -> Signature:
    """What a device that is in a world sees, described."""
    return signature(features_of(world, draw=draw), seed=encoder)


@cache
def bundle_of(
    world: int = 0,
    *,
    encoder: str = ENCODER,
    seed: str = "",
    labels: Sequence[str] = ("cat", "dog"),
    task: str = "a world",
    created_by: str = "device-a",
) -> bytes:
    """A packed bundle of statistics, for a world."""
    features = features_of(world)
    names = [labels[i % len(labels)] for i in range(len(features))]
    statistics = ClassStatistics.fit(features, names)
    manifest = Manifest(
        encoder=encoder,
        family="frozen",
        rank=0,
        sites=(),
        labels=statistics.labels,
        task=task,
        created_at=0.0,
        created_by=created_by,
        samples=statistics.samples,
        metrics={"accuracy": 0.9},
        score_quantiles=tuple(float(q) for q in range(101)),
    )
    sketch = signature(features, seed=seed or encoder)
    return pack(Bundle(manifest, {}, statistics, statistics, sketch))


def report_of(device: str = "device-a", **changes: object) -> wire.Report:
    """A report of a device that holds the generations 1 and 2 and runs 2."""
    generations = [
        wire.GenerationSummary(
            number=number, digest=f"{number:064x}", reason="test", created_at=1.0, bundles=[]
        )
        for number in (1, 2)
    ]
    fields: dict[str, object] = {
        "device": device,
        "sequence": 1,
        "desired_version": 0,
        "generation": 2,
        "generation_digest": f"{2:064x}",
        "pinned": False,
        "generations": generations,
    }
    return wire.Report(**fields | changes)  # type: ignore[arg-type]


@dataclass
class Desk:
    """A catalogue whose clock and messages are the test's."""

    config: Config
    store: Store
    handlers: Handlers
    uploads: Uploads
    pushed: list[tuple[str, wire.Desired]] = field(default_factory=list)
    on_push: Callable[[str, wire.Desired], None] = lambda _device, _desired: None
    unix_time: float = 1_000_000.0
    monotonic: float = 0.0

    @property
    def operators(self) -> Operators:
        return Operators(self.store, self._push)

    def _push(self, device: str, desired: wire.Desired) -> bool:
        self.pushed.append((device, desired))
        self.on_push(device, desired)
        return True

    def say(self, device: str, message: wire.UpMessage) -> list[wire.DownMessage]:
        """What the catalogue answers to a device."""
        return self.say_raw(wire.up_topic(device), wire.encode(message))

    def say_raw(self, topic: str, payload: bytes) -> list[wire.DownMessage]:
        replies = self.handlers.received(topic, payload, self.monotonic)
        return [message for device, message in replies if device == topic.rpartition("/")[2]]

    def register(self, device: str = "device-a", *, encoder: str = ENCODER) -> None:
        self.say(device, wire.Register(device=device, encoder=encoder, software="test"))

    def serve(self, device: str, replies: Sequence[wire.DownMessage], data: bytes) -> Replies:
        """Answer what the catalogue asks a device for, until it asks no more; the rest it said."""
        sender, waiting, said = Sender(lambda _: data), list(replies), []
        while waiting:
            message = waiting.pop(0)
            if isinstance(message, wire.Get):
                waiting += self.say(device, sender.answer(message))
            else:
                said.append((device, message))
        return said

    def upload(self, data: bytes, device: str = "device-a") -> wire.OfferResult:
        """Offer a bundle and serve it."""
        offer = wire.Offer(digest=bundle_digest(data), size_bytes=len(data))
        ((_, result),) = self.serve(device, self.say(device, offer), data)
        assert isinstance(result, wire.OfferResult)
        return result

    def approved(self, data: bytes, device: str = "device-a") -> str:
        """Upload and approve a bundle; returns its digest."""
        assert self.upload(data, device).stored
        digest = bundle_digest(data)
        self.operators.judge("op", "approve", digest)
        return digest

    def log(self) -> list[tuple[str, str, str, str]]:
        """Who, action, subject and outcome of the audit log, but for first contacts."""
        names = ("who", "action", "subject", "outcome")
        entries = [entry for entry in self.store.log() if entry["detail"] != "first seen"]
        return [tuple(entry[name] for name in names) for entry in entries]  # type: ignore[misc]

    def restart(self) -> "Desk":
        """The same state directory, opened anew as after `kill -9`."""
        self.store.close()
        return open_desk(self.config, self.unix_time)


def open_desk(config: Config, unix_time: float = 1_000_000.0) -> Desk:
    store = open_store(config)
    desk = Desk(config, store, *make_handlers(store, config), unix_time=unix_time)
    store.clock = lambda: desk.unix_time
    return desk


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        catalogue=CatalogueSection(state_dir=str(tmp_path / "catalogue")),
        mqtt=MqttSection(host="127.0.0.1"),
    )


@pytest.fixture
def desk(config: Config) -> Iterator[Desk]:
    opened = open_desk(config)
    yield opened
    opened.store.close()


@pytest.fixture(scope="session")
def make_bundle() -> MakeBundle:
    return bundle_of


@pytest.fixture(scope="session")
def make_report() -> Callable[..., wire.Report]:
    return report_of


@pytest.fixture(scope="session")
def make_signature() -> Callable[..., Signature]:
    return signature_of


@pytest.fixture(scope="session")
def encoder() -> str:
    return ENCODER


@pytest.fixture
def open_another() -> Callable[..., Desk]:
    return open_desk
