"""The training process: what it makes, that nothing kills it for good, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from adapter_store.bundle import bundle_digest, check_compatible, unpack
from edge_agent import trainer
from edge_agent.training_job import (
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
from exporter.package import EncoderPackage

MakeImages = Callable[..., tuple[np.ndarray, tuple[str, ...]]]
EPOCHS = 4


@pytest.fixture
def job_directory(tmp_path: Path, package: EncoderPackage, make_images: MakeImages) -> Path:
    images, labels = make_images((3, 4, 5), 10)
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
        seed=7,
        created_at=1234.5,
        task="test",
        parents=["a" * 64],
        ids=ids,
        labels=list(labels),
        train=split_samples(ids, labels),
    )
    write_job(tmp_path / "job", job, images, {})
    return tmp_path / "job"


def start(directory: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "edge_agent.trainer", str(directory), str(os.getpid())],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_training_resumes_to_the_same_bundle(
    job_directory: Path, package: EncoderPackage
) -> None:
    copy = job_directory.with_name("copy")
    shutil.copytree(job_directory, copy)
    undisturbed = start(copy)
    # The trainer appends a line an epoch; through a pipe the test hears each at once.
    progress = job_directory / PROGRESS
    os.mkfifo(progress)
    process = start(job_directory)
    with progress.open() as lines:
        assert '"epoch":1,' in lines.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (job_directory / RESULT).exists()
    progress.unlink()
    assert start(job_directory).wait() == EXIT_DONE
    assert b'"epoch":1,' not in progress.read_bytes()
    assert undisturbed.wait() == EXIT_DONE
    resumed, straight = ((d / RESULT).read_bytes() for d in (job_directory, copy))
    assert bundle_digest(resumed) == bundle_digest(straight)

    bundle = unpack(resumed)
    check_compatible(bundle, package.interface())
    assert bundle.manifest.created_at == 1234.5
    assert bundle.manifest.labels == ("stripes-3", "stripes-4", "stripes-5")
    assert bundle.manifest.samples == 24
    assert bundle.manifest.metrics["held_out_samples"] == 6.0
    assert any(np.abs(tensor).max() > 0 for name, tensor in bundle.tensors.items() if "up" in name)
    assert bundle.base.samples == bundle.own.samples == 24


def test_earlier_adapters_pull_the_new_one_towards_their_mean(job_directory: Path) -> None:
    free = unpack(trainer.make_bundle(job_directory))
    job = msgspec.json.decode((job_directory / "job.json").read_bytes(), type=TrainingJob)
    images = trainer.read_job(job_directory)[1]
    earlier = {name: np.full_like(tensor, 0.01) for name, tensor in free.tensors.items()}
    merged_directory = job_directory.with_name("merged")
    write_job(merged_directory, job, images, earlier)
    merged = unpack(trainer.make_bundle(merged_directory))

    def distance(tensors: dict[str, np.ndarray]) -> float:
        return sum(float(np.square(tensors[n] - earlier[n]).sum()) for n in tensors)

    assert distance(dict(merged.tensors)) < 0.1 * distance(dict(free.tensors))


def test_a_job_for_another_encoder_is_refused_with_the_reason(job_directory: Path) -> None:
    path = job_directory / "job.json"
    job = msgspec.json.decode(path.read_bytes(), type=TrainingJob)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(job, encoder="f" * 64)))
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
