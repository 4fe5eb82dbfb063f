"""The training process: what it makes, that nothing kills it for good, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapter_store.bundle import FROZEN, bundle_digest, check_compatible, unpack
from edge_agent import trainer
from edge_agent.training_job import (
    CHECKPOINT,
    EXIT_DONE,
    EXIT_REFUSED,
    EXIT_UNAVAILABLE,
    FAILURE,
    PROGRESS,
    RESULT,
    TrainingJob,
    split_samples,
    write_job,
)
from edge_agent.trials import Verdict
from exporter.package import EncoderPackage

MakeImages = Callable[..., tuple[np.ndarray, tuple[str, ...]]]
EPOCHS = 4


@pytest.fixture
def job_directory(tmp_path: Path, package: EncoderPackage, make_images: MakeImages) -> Path:
    images, labels = make_images((3, 4, 5), 40)
    ids = [f"sample-{i}" for i in range(len(labels))]
    job = TrainingJob(
        device="device-a",
        encoder=package.digest,
        encoder_dir=str(package.path),
        rank=4,
        epochs=EPOCHS,
        batch_size=16,
        learning_rate=0.003,
        momentum=0.1,
        threads=1,
        max_seconds=600.0,
        checkpoint_every_s=0.0,
        patience=2,
        seed=7,
        # Called within the tests' own process, which is large already.
        max_memory=16_384,
        created_at=1234.5,
        task="test",
        parents=["a" * 64],
        ids=ids,
        labels=list(labels),
        train=split_samples(ids, labels),
    )
    write_job(tmp_path / "job", job, images, {})
    return tmp_path / "job"


def start(directory: Path, log: Any = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "edge_agent.trainer", str(directory), str(os.getpid())],
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def weights(directory: Path) -> dict[str, np.ndarray]:
    """All that training left, the best epoch's weights among it."""
    return load_file(directory / CHECKPOINT)


def changed(directory: Path, **settings: object) -> None:
    path = directory / "job.json"
    job = msgspec.json.decode(path.read_bytes(), type=TrainingJob)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(job, **settings)))


def test_a_training_killed_within_an_epoch_resumes_to_the_same_bundle(
    job_directory: Path, package: EncoderPackage
) -> None:
    copy = job_directory.with_name("copy")
    shutil.copytree(job_directory, copy)
    undisturbed = start(copy)
    # The trainer appends a line a step here; through a pipe the test hears each at once.
    progress = job_directory / PROGRESS
    os.mkfifo(progress)
    process = start(job_directory)
    with progress.open() as lines:
        while '"step":7,' not in lines.readline():
            pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (job_directory / RESULT).exists()
    progress.unlink()
    assert start(job_directory).wait() == EXIT_DONE
    assert b'"step":7,' not in progress.read_bytes()
    assert undisturbed.wait() == EXIT_DONE
    resumed, straight = ((d / RESULT).read_bytes() for d in (job_directory, copy))
    assert bundle_digest(resumed) == bundle_digest(straight)

    for name, tensor in weights(copy).items():
        np.testing.assert_array_equal(weights(job_directory)[name], tensor)
    assert any(
        np.abs(tensor).max() > 0
        for name, tensor in weights(copy).items()
        if name.startswith("best:") and "up" in name
    )

    bundle = unpack(resumed)
    check_compatible(bundle, package.interface())
    assert bundle.manifest.created_at == 1234.5
    assert bundle.manifest.labels == ("stripes-3", "stripes-4", "stripes-5")
    assert bundle.manifest.samples == bundle.base.samples == 90
    assert bundle.manifest.metrics["held_out_samples"] == 30.0


def test_an_adapter_that_is_no_better_than_the_statistics_is_left_out(job_directory: Path) -> None:
    bundle = unpack(trainer.make_bundle(job_directory))
    assert bundle.manifest.metrics["held_out_accuracy_base"] == 1.0
    assert (bundle.manifest.family, bundle.manifest.rank) == (FROZEN, 0)
    assert bundle.tensors == {}
    assert bundle.manifest.metrics["held_out_accuracy"] == 1.0
    assert bundle.manifest.metrics["adapter_p_value"] > 0.05


def test_an_adapter_that_is_better_travels_with_its_statistics(
    job_directory: Path, package: EncoderPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = Verdict(True, "better", {"held_out_accuracy_adapter": 1.0, "adapter_p_value": 0.01})
    monkeypatch.setattr(trainer, "earns_its_place", lambda _: better)
    bundle = unpack(trainer.make_bundle(job_directory))
    check_compatible(bundle, package.interface())
    assert (bundle.manifest.family, bundle.manifest.rank) == ("bottleneck", 4)
    best = {
        name.removeprefix("best:"): tensor
        for name, tensor in weights(job_directory).items()
        if name.startswith("best:") and "objective." not in name
    }
    assert set(bundle.tensors) == set(best)
    assert bundle.own.dim == package.network_dim
    assert bundle.own.labels == bundle.base.labels


def test_earlier_adapters_pull_the_new_one_towards_their_mean(
    job_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Verdict(True, "kept", {"held_out_accuracy_adapter": 1.0})
    monkeypatch.setattr(trainer, "earns_its_place", lambda _: kept)
    free = unpack(trainer.make_bundle(job_directory))
    job, images, _ = trainer.read_job(job_directory)
    earlier = {name: np.full_like(tensor, 0.01) for name, tensor in free.tensors.items()}
    merged_directory = job_directory.with_name("merged")
    write_job(merged_directory, job, images, earlier)
    merged = unpack(trainer.make_bundle(merged_directory))

    def distance(tensors: dict[str, np.ndarray]) -> float:
        return sum(float(np.square(tensors[n] - earlier[n]).sum()) for n in tensors)

    assert distance(dict(merged.tensors)) < 0.1 * distance(dict(free.tensors))


def test_a_training_with_too_little_memory_refuses_and_says_how_much_it_needs(
    job_directory: Path,
) -> None:
    changed(job_directory, max_memory=120)
    assert start(job_directory).wait() == EXIT_REFUSED
    reason = msgspec.json.decode((job_directory / FAILURE).read_bytes())["reason"]
    assert "learner.max_memory is 120" in reason
    enough = int(reason.split("set it to ")[1].split()[0])
    # What it asked for may still be little, but with it a few samples fit at once.
    (job_directory / FAILURE).unlink()
    changed(job_directory, max_memory=enough + 128)
    with (job_directory / "log").open("wb") as log:
        assert start(job_directory, log).wait() == EXIT_DONE
    told = (job_directory / "log").read_text()
    peak = int(told.split("samples at once; ")[1].split(" MB")[0])
    assert peak <= enough + 128


def test_a_job_for_another_encoder_is_refused_with_the_reason(job_directory: Path) -> None:
    changed(job_directory, encoder="f" * 64)
    assert trainer._guarded(job_directory) == EXIT_REFUSED
    assert b"ffffffffffff" in (job_directory / FAILURE).read_bytes()


def test_without_torch_it_says_what_to_install(
    job_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert trainer._guarded(job_directory) == EXIT_UNAVAILABLE
    assert b"install driftkeel[train]" in (job_directory / FAILURE).read_bytes()


def test_a_trainer_whose_daemon_is_gone_does_nothing(job_directory: Path) -> None:
    command = [sys.executable, "-m", "edge_agent.trainer", str(job_directory), "1"]
    if os.getpid() == 1:
        pytest.skip("this process is the init process")
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 2
    assert not (job_directory / PROGRESS).exists()
