"""What was away comes back: broker, catalogue, disk space. What must not start says why."""

import hashlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_store.bundle import bundle_digest
from tests.e2e.conftest import Learned
from tests.e2e.harness import KNOWN, Edge, Plant
from tests.e2e.waiting import until

pytestmark = pytest.mark.e2e

SPARE_BYTES = 3_000_000
BLOCK_BYTES = 4096


def test_what_was_learned_without_a_broker_arrives_when_there_is_one(
    plant: Plant, learned: Learned
) -> None:
    """Broker and catalogue are down when the agent starts; then each goes away once more."""
    digest = bundle_digest(learned.bundle)
    plant.stop_broker()
    plant.place("device-a", learned.state)
    device = plant.start("device-a")
    second = device.predictions()
    assert {generation for _, _, generation in second} == {2}
    assert not device.sync()["connected"]
    assert device.sync()["outbox"] == 2

    catalogue = plant.start_catalogue()
    assert device.predictions() == second
    plant.start_broker()
    (bundle,) = until(lambda: plant.bundles("candidate"), "the upload", catalogue, device.child)
    assert bundle["digest"] == digest
    until(lambda: device.sync()["outbox"] == 0, "the debt to be settled", device.child)

    assert reported(plant) == (2, False)

    plant.stop_broker()
    until(lambda: not device.sync()["connected"], "the device to notice", device.child)
    told = plant.shell_json("rollback device-a --wait 0")
    assert not told["confirmed"]
    assert device.predictions() == second
    plant.start_broker()
    until(lambda: device.generation == 1, "the device to be told", device.child, catalogue)
    assert reported(plant) == (1, True)

    catalogue.stop()
    until(lambda: device.sync()["connected"], "the device to be connected", device.child)
    assert {generation for _, _, generation in device.predictions()} == {1}
    catalogue = plant.start_catalogue()
    forth = plant.shell_json("rollback device-a --to 2 --wait 60")
    assert (forth["confirmed"], forth["generation"]) == (True, 2)
    assert device.predictions() == second
    assert [entry["outcome"] for entry in plant.uploads()] == ["ok"]
    assert device.failed == 0


def reported(plant: Plant) -> tuple[int, bool]:
    """The generation the device reports once that is the desired one, and whether it is pinned."""

    def settled() -> tuple[int, bool] | None:
        device = plant.shell_json("device device-a")
        report = device["reported"]
        if report is None or report["desired_version"] < device["desired"]["version"]:
            return None
        return report["generation"], report["pinned"]

    return until(settled, "the device's report")


def test_a_full_disk_stops_no_answer_and_is_over_when_there_is_space(
    plant: Plant, learned: Learned
) -> None:
    state = plant.state("device-a")
    state.mkdir(parents=True)
    size = sum(p.stat().st_size for p in learned.state.rglob("*") if p.is_file())
    with small_disk(state, size + SPARE_BYTES):
        catalogue = plant.start_catalogue()
        plant.place("device-a", learned.state)
        device = plant.start("device-a")
        device.until_connected()
        until(lambda: device.sync()["outbox"] == 0, "the upload", catalogue, device.child)
        assert reported(plant) == (2, False)
        second = device.predictions()
        (kept,) = device.send(KNOWN.first(1))
        assert device.status()["journal_problem"] == ""

        ballast = state / "ballast"
        fill(ballast)
        answers = until(lambda: not_journalled(device), "the disk to be full", device.child)
        assert len(answers) == 8
        assert "full" in device.status()["journal_problem"]
        label = {"sample_id": kept["sample_id"], "label": "3"}
        refused = device.raw("POST", "/v1/feedback", json=label)
        assert refused.status_code == 507, refused.text
        assert "free some space" in refused.json()["error"]
        assert device.predictions() == second
        told = plant.shell_json("rollback device-a --wait 1")
        assert not told["confirmed"] or told["problem"]

        ballast.unlink()
        until(
            lambda: device.raw("POST", "/v1/feedback", json=label).is_success,
            "the label to be kept",
            device.child,
        )
        device.send(KNOWN.first(8))
        assert device.status()["journal_problem"] == ""
        until(lambda: device.generation == 1, "the device to do what it was told", device.child)
        assert reported(plant) == (1, True)
        device.child.stop()


def not_journalled(device: Edge) -> list[dict[str, Any]] | None:
    """Answers to eight samples, once the device says that it could not journal them."""
    answers = device.send(KNOWN.first(8))
    return answers if device.status()["journal_problem"] else None


def fill(path: Path) -> None:
    """Write until not a block is left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(BLOCK_BYTES))
        except OSError:
            return


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[None]:
    """A file system of that size in memory; skips where it cannot be mounted."""
    if os.geteuid():
        pytest.skip("only root can mount the small disk this needs")
    options = f"size={size_bytes},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "driftkeel-test", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: on a failure the agent still has it open.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_typo_in_a_configuration_is_named(plant: Plant) -> None:
    config = plant.configure("device-a", {"learner": {"epoch": 3}})
    said = plant.refused("agent", "--config", str(config))
    assert "unknown key 'learner.epoch'" in said
    assert "did you mean 'epochs'?" in said
    plant.configure("device-a", {"learner": {"epochs": "many"}})
    assert "'learner.epochs'" in plant.refused("agent", "--config", str(config))
    assert not plant.state("device-a").exists()

    plant.start_catalogue().stop()
    config = plant.config("catalogue")
    config.write_text(config.read_text().replace("port = 0", "prot = 0"))
    said = plant.refused("catalogue", "--config", str(config))
    assert "unknown key 'http.prot'" in said
    assert "did you mean 'port'?" in said


def test_a_database_of_a_newer_version_is_refused_and_left_alone(
    plant: Plant, fitted: Path
) -> None:
    plant.start_catalogue().stop()
    plant.place("device-a", fitted)
    for name, command in (("device-a", "agent"), ("catalogue", "catalogue")):
        (path,) = plant.state(name).glob("*.db")
        with sqlite3.connect(path) as database:
            database.execute("UPDATE alembic_version SET version_num = '9999_from_the_future'")
        database.close()
        before = digest_of(path)
        said = plant.refused(command, "--config", str(plant.config(name)))
        assert "9999_from_the_future" in said
        assert "install the version that wrote it" in said
        assert digest_of(path) == before


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
