"""A small world for the agent's tests: striped images, the shipped encoder, bundles over both."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_store.bundle import Bundle, Manifest, pack
from edge_agent.agent import Agent
from edge_agent.config import AgentSection, AlarmSection, Config, HttpSection
from edge_agent.fit import encode, fit
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.calibration import score_quantiles
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise

SIDE = 32
Images = NDArray[np.uint8]
MakeImages = Callable[..., tuple[Images, tuple[str, ...]]]
MakeBundle = Callable[..., bytes]


def striped(
    classes: Sequence[int], per_class: int, *, seed: int = 0
) -> tuple[Images, tuple[str, ...]]:
    """Noisy stripes: class k has its own direction, width and colour; shuffled."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    images, labels = [], []
    for k in classes:
        angle, width = k * np.pi / 6, 3 + k % 3
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / (2 * width))
        colour = 0.5 + 0.5 * np.cos(k + np.array([0.0, 2.0, 4.0]))
        for _ in range(per_class):
            clean = 128 + 90 * wave[..., None] * colour
            noisy = clean + rng.normal(0, 20, (SIDE, SIDE, 3)) + rng.normal(0, 8)
            images.append(np.clip(noisy, 0, 255).astype(np.uint8))
            labels.append(f"stripes-{k}")
    order = rng.permutation(len(images))
    return np.stack(images)[order], tuple(labels[i] for i in order)


@pytest.fixture(scope="session")
def make_images() -> MakeImages:
    return striped


@pytest.fixture(scope="session")
def package() -> EncoderPackage:
    return default_encoder_package()


@pytest.fixture(scope="session")
def sessions(package: EncoderPackage) -> EncoderSessions:
    return EncoderSessions(package)


@pytest.fixture(scope="session")
def make_bundle(sessions: EncoderSessions) -> MakeBundle:
    """Packed bundles: ``make_bundle(classes, adapter=seed)``; without a seed statistics only."""

    @cache
    def make(classes: tuple[int, ...], *, adapter: int | None = None, seed: int = 1) -> bytes:
        images, labels = striped(classes, 24, seed=seed)
        package = sessions.package
        features = encode(sessions, images)
        if adapter is None:
            fitted = fit(
                features,
                labels,
                encoder=package.digest,
                task="test",
                created_by="test",
                created_at=0.0,
            )
            return pack(fitted.bundle)
        tensors = random_tensors(package, adapter)
        hidden = sessions.prefix(prepare(images, package))
        own = l2_normalise(sessions.suffix(hidden, tensors, "bottleneck"))
        base = ClassStatistics.fit(features, labels)
        manifest = Manifest(
            encoder=package.digest,
            family="bottleneck",
            rank=4,
            sites=package.sites,
            labels=base.labels,
            task="test",
            created_at=0.0,
            created_by="test",
            parents=(),
            samples=base.samples,
            metrics={},
            score_quantiles=tuple(score_quantiles(np.arange(101.0))),
        )
        return pack(
            Bundle(
                manifest=manifest,
                tensors=tensors,
                base=base,
                own=ClassStatistics.fit(own, labels),
                signature=signature(features, seed=package.digest),
            )
        )

    return make


def fitted_stripes(sessions: EncoderSessions, classes: Sequence[int], *, seed: int = 1) -> Bundle:
    """Statistics of stripes under any encoder, without an adapter."""
    images, labels = striped(classes, 24, seed=seed)
    return fit(
        encode(sessions, images),
        labels,
        encoder=sessions.package.digest,
        task="test",
        created_by="test",
        created_at=0.0,
    ).bundle


def random_tensors(
    package: EncoderPackage, seed: int, rank: int = 4
) -> dict[str, NDArray[np.float32]]:
    """An adapter that does something, if nothing useful."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, [rank if axis == "rank" else int(axis) for axis in shape]).astype(
            np.float32
        )
        for name, shape in package.family("bottleneck").tensors.items()
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        agent=AgentSection(device="device-a", state_dir=str(tmp_path / "state")),
        http=HttpSection(port=0),
        alarm=AlarmSection(false_alarm_every=10_000),
    )


@pytest.fixture
def agent(config: Config) -> Iterator[Agent]:
    """An agent without a generation."""
    opened = Agent.open(config)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def calibration(sessions: EncoderSessions) -> NDArray[np.float32]:
    """Base features of held-out samples of the classes 0 to 2."""
    images, _ = striped((0, 1, 2), 25, seed=77)
    return encode(sessions, images)


@pytest.fixture
def install(
    agent: Agent, make_bundle: MakeBundle, calibration: NDArray[np.float32]
) -> Callable[..., int]:
    """Build and activate a generation of the given packed bundles (the first one's by default)."""

    def install(*bundles: bytes) -> int:
        digests = [agent.state.blobs.put(data) for data in bundles or (make_bundle((0, 1, 2)),)]
        running = agent.serving
        generation = agent.build_generation(
            digests,
            calibration,
            parent=None if running is None else running.number,
            reason="test",
        )
        agent.activate(generation.number)
        return generation.number

    return install
