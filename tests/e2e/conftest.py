"""States that several end-to-end tests begin from, each brought about once by real processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cloud.broker import Kind, choose_kind
from tests.e2e.harness import FIT, SHIFTED, Plant
from tests.e2e.waiting import until

MakePlant = Callable[..., Plant]


@dataclass(frozen=True)
class Learned:
    """A stopped device that learned a shift while its broker was away.

    It owes the catalogue the bundle, and the explanation of its episode.

    Attributes:
        state: Its state directory, to be copied.
        labelled: The samples whose labels it acknowledged.
        bundle: The bundle it made.
    """

    state: Path
    labelled: frozenset[str]
    bundle: bytes


@pytest.fixture(scope="session")
def kind() -> Kind:
    """The broker for tests that are not about brokers."""
    return choose_kind()


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Path:
    """The state of a device fresh from `driftkeel agent fit`."""
    root = tmp_path_factory.mktemp("fitted")
    with Plant(root, kind) as plant:
        plant.start_broker()
        config = plant.configure("device-a")
        np.savez(root / "first.npz", x=FIT.images, y=FIT.labels.astype(str))
        plant.run("agent", "fit", "--config", str(config), "--data", str(root / "first.npz"))
        return plant.state("device-a")


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, fitted: Path, kind: Kind) -> Learned:
    """A device that was alone the whole time it learned."""
    with Plant(tmp_path_factory.mktemp("learned"), kind) as plant:
        plant.start_broker()
        plant.place("device-a", fitted)
        plant.stop_broker()
        device = plant.start("device-a")
        labelled = device.shift(SHIFTED, labels=60)
        device.until_generation(2)
        owed = "the offer and the explanation to be owed"
        until(lambda: device.sync()["outbox"] == 2, owed, device.child)
        bundles = [set(g["bundles"]) for g in device.get("/v1/generations")["generations"]]
        (made,) = bundles[1] - bundles[0]
        device.child.stop()
        state = plant.state("device-a")
        return Learned(state, frozenset(labelled), (state / "blobs" / made[:2] / made).read_bytes())


@pytest.fixture
def make_plant(tmp_path: Path, kind: Kind) -> Iterator[MakePlant]:
    """A plant with a running broker, under the test's own directory."""
    plants: list[Plant] = []

    def make(kind: Kind = kind) -> Plant:
        plant = Plant(tmp_path / f"plant-{len(plants)}", kind)
        plants.append(plant)
        plant.start_broker()
        return plant

    yield make
    for plant in plants:
        plant.__exit__()


@pytest.fixture
def plant(make_plant: MakePlant) -> Plant:
    """A plant with whichever broker there is."""
    return make_plant()
