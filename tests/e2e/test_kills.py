"""Kill -9 at awkward moments: what was acknowledged is there, and the story goes on to its end."""

from pathlib import Path

import pytest

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from tests.e2e.accounts import candidate, chunk_of
from tests.e2e.conftest import Learned
from tests.e2e.harness import (
    KNOWN,
    LABELS,
    SHIFTED,
    SHIFTED_B,
    Plant,
    chunks_kept,
    gone,
    kill,
    kill_pid,
    labels_kept,
    trainer_of,
)
from tests.e2e.waiting import until

pytestmark = pytest.mark.e2e

# Slow enough to be met in the middle, quick enough to be finished.
SLOW = {"learner": {"epochs": 60}}
EAGER = {"search": {"repeat_s": 1.0}}


def uploaded_once(plant: Plant) -> str:
    """Wait for the one upload; the catalogue must know of no other."""
    bundle = until(lambda: plant.bundles("candidate"), "the upload")
    assert len(bundle) == 1
    assert [entry["outcome"] for entry in plant.uploads()] == ["ok"]
    digest: str = bundle[0]["digest"]
    return digest


def test_a_training_outlives_its_trainer_and_then_its_agent(plant: Plant, fitted: Path) -> None:
    plant.start_catalogue()
    plant.place("device-a", fitted, SLOW)
    device = plant.start("device-a")
    labelled = device.shift(SHIFTED, labels=60)
    assert len(labelled) >= LABELS
    first = until(lambda: trainer_of(device.child), "the trainer", device.child)
    until(lambda: device.status()["training"].get("epoch"), "an epoch", device.child)
    kill_pid(first)
    second = until(
        lambda: (pid := trainer_of(device.child)) != first and pid, "another trainer", device.child
    )
    assert device.generation == 1

    kill(device.child)
    until(lambda: gone(second), "the trainer to end with its agent")
    assert labels_kept(plant.state("device-a")) == labelled
    device = plant.start("device-a")
    assert device.generation == 1
    device.until_generation(2)
    assert device.status()["trainings"] == 1
    uploaded_once(plant)
    device.child.stop()
    assert labels_kept(plant.state("device-a")) == labelled


def test_a_label_that_was_acknowledged_outlives_a_kill(plant: Plant, fitted: Path) -> None:
    plant.place("device-a", fitted)
    labelled: set[str] = set()
    for _ in range(3):
        device = plant.start("device-a")
        labelled |= device.label(device.send(KNOWN.first(4)), KNOWN)
        kill(device.child)
        assert labels_kept(plant.state("device-a")) == labelled


def test_an_agent_killed_right_after_activating_runs_what_it_activated(
    plant: Plant, fitted: Path
) -> None:
    plant.start_catalogue()
    plant.place("device-a", fitted)
    device = plant.start("device-a")
    labelled = device.shift(SHIFTED, labels=60)
    pointer = plant.state("device-a") / "current"
    before = pointer.read_bytes()
    until(lambda: pointer.read_bytes() != before, "the pointer", device.child, every_s=0.001)
    kill(device.child)

    device = plant.start("device-a")
    assert device.generation == 2
    device.until_generation(2)
    uploaded_once(plant)
    assert [g["number"] for g in device.get("/v1/generations")["generations"]] == [1, 2]
    assert device.status()["trainings"] == 1
    device.child.stop()
    assert labels_kept(plant.state("device-a")) == labelled


def test_a_catalogue_killed_in_the_middle_of_an_upload_gets_it_once(
    plant: Plant, learned: Learned
) -> None:
    data, digest = learned.bundle, bundle_digest(learned.bundle)
    catalogue = plant.start_catalogue()
    played = plant.account("device-a")
    played.say(wire.Offer(digest=digest, size_bytes=len(data)))
    asked = played.hears(wire.Get)
    played.say(chunk_of(data, asked))
    until(lambda: chunks_kept(plant.state("catalogue")), "the chunk to be kept", catalogue)
    kill(catalogue)
    played.close()
    assert asked.length < len(data)

    plant.place("device-a", learned.state)
    device = plant.start("device-a")
    device.until_connected()
    assert device.sync()["outbox"] == 2
    plant.start_catalogue()
    assert uploaded_once(plant) == digest
    until(lambda: device.sync()["outbox"] == 0, "the debt to be settled", device.child)
    plant.shell(f"approve {digest[:12]}")
    assert bundle_digest(plant.blob(digest)) == digest


def test_an_agent_killed_in_the_middle_of_a_pull_pulls_the_rest(
    plant: Plant, fitted: Path, learned: Learned
) -> None:
    data = learned.bundle
    plant.place("device-b", fitted, EAGER)
    played = plant.account("catalogue")
    device = plant.start("device-b")
    device.until_connected()
    played.hits = [candidate(plant.key, data, device.status()["encoder"]["digest"])]
    labelled = device.shift(SHIFTED_B, labels=20)
    asked = played.hears(wire.Get)
    played.say(chunk_of(data, asked), to="device-b")
    until(lambda: chunks_kept(plant.state("device-b")), "the chunk to be kept", device.child)
    kill(device.child)
    assert labels_kept(plant.state("device-b")) == labelled

    played.heard.clear()
    device = plant.start("device-b")
    assert device.generation == 1
    while device.generation == 1:
        again = played.hears(wire.Get)
        assert again.offset != asked.offset
        played.say(chunk_of(data, again), to="device-b")
        until(
            lambda: device.generation == 2 or any(isinstance(m, wire.Get) for m in played.heard),
            "the device to ask for more, or to have what it wants",
            device.child,
        )
    device.until_generation(2)
    assert device.status()["trainings"] == 0


def test_a_second_agent_on_one_state_directory_is_refused(plant: Plant, fitted: Path) -> None:
    plant.place("device-a", fitted)
    device = plant.start("device-a")
    before = device.predictions()
    said = plant.refused("agent", "--config", str(plant.config("device-a")))
    assert f"in use by process {device.child.process.pid}" in said
    assert device.predictions() == before
