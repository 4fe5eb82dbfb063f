"""The directory that a training is: everything it needs, durable, and readable without torch.

The learner writes it whole before the trainer starts; the trainer adds a checkpoint, its progress
and at last the bundle. A job never changes once written, so that a training that is killed and
started again gives the same bundle.

Files: ``job.json`` (the settings, sample ids and labels), ``samples.safetensors`` (the images),
``earlier.safetensors`` (the mean of the earlier adapters, if any), ``checkpoint.safetensors``,
``progress.jsonl``, then ``result.bundle`` or ``failure.json``. The trainer's exit status says
which: done, refused, or unavailable (this device cannot train at all).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from adapter_store.blobs import sync_directory, write_durably
from edge_agent.errors import TrainingDataError

RESULT: Final = "result.bundle"
FAILURE: Final = "failure.json"
CHECKPOINT: Final = "checkpoint.safetensors"
PROGRESS: Final = "progress.jsonl"
EXIT_DONE: Final = 0
EXIT_REFUSED: Final = 2
EXIT_UNAVAILABLE: Final = 3
_JOB: Final = "job.json"
_SAMPLES: Final = "samples.safetensors"
_EARLIER: Final = "earlier.safetensors"

Positive = Annotated[int, msgspec.Meta(ge=1)]


class TrainingJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to train and how.

    Attributes:
        format: Layout of the directory.
        device: Who trains; the bundle's creator.
        encoder: Digest of the encoder package.
        encoder_dir: Where that package lies.
        family: The adapter family.
        rank: Width of the adapter.
        epochs: Passes over the training samples.
        batch_size: Samples in a step.
        learning_rate: Peak learning rate.
        momentum: Share of the earlier adapters' mean mixed in after every step.
        threads: Threads to use.
        max_seconds: Wall-clock budget over all starts together.
        patience: Epochs without improvement on the stopping part before training ends; 0 for none.
        checkpoint_every_s: Seconds between two checkpoints within an epoch.
        max_memory: Most memory of the training process, in MB.
        seed: Seed of everything random.
        created_at: Unix time that goes into the bundle, so that a restart gives the same bytes.
        task: Name of what is learned, for people.
        parents: Digests of the bundles the device ran.
        ids: Sample ids, in the order of the images.
        labels: Their labels.
        train: Which are trained on; the others are held out.
    """

    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    device: str
    encoder: str
    encoder_dir: str
    family: str = "bottleneck"
    rank: Positive
    epochs: Positive
    batch_size: Positive
    learning_rate: Annotated[float, msgspec.Meta(gt=0)]
    momentum: Annotated[float, msgspec.Meta(ge=0, le=1)]
    threads: Positive
    max_seconds: Annotated[float, msgspec.Meta(gt=0)]
    patience: Annotated[int, msgspec.Meta(ge=0)] = 5
    checkpoint_every_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    max_memory: Positive = 1024
    seed: int
    created_at: float
    task: str
    parents: list[str]
    ids: list[str]
    labels: list[str]
    train: list[bool]

    def held_out(self) -> list[int]:
        """Positions of the samples not trained on."""
        return [i for i, trained in enumerate(self.train) if not trained]

    def trained(self) -> list[int]:
        """Positions of the samples trained on."""
        return [i for i, trained in enumerate(self.train) if trained]


def split_samples(
    ids: Sequence[str], labels: Sequence[str], *, held_out: float = 0.25
) -> list[bool]:
    """Say which labelled samples to train on, class by class, by a hash of the sample's id.

    Args:
        ids: Sample ids.
        labels: Their labels.
        held_out: Share of every class kept back (rounded down; every class keeps one to train).

    Returns:
        True for a sample to train on; the same for the same samples in any order.

    Raises:
        TrainingDataError: Fewer than two labels, or nothing would be held out.
    """
    classes = len(set(labels))
    if classes < 2:
        raise TrainingDataError(
            f"training needs labelled samples of at least two classes; found {classes}"
        )
    train = _split(ids, labels, held_out)
    if all(train):
        raise TrainingDataError("too few labelled samples a class to hold any out; label more")
    return train


def split_stopping(
    ids: Sequence[str], labels: Sequence[str], *, share: float = 0.2, least: int = 16
) -> list[bool]:
    """Say which of the samples to train on the weights learn from; the others say when to stop.

    Args:
        ids: Ids of the samples to train on.
        labels: Their labels.
        share: Part of every class that says when to stop (rounded down).
        least: With fewer of those than this the part would say nothing: the weights learn from
            all samples, and every epoch is run.

    Returns:
        True for a sample the weights learn from; the same for the same samples in any order.
    """
    # Another order than the one the test part was taken by, or that part's neighbours would go.
    learns = _split([f"stop {name}" for name in ids], labels, share)
    return learns if learns.count(False) >= least else [True] * len(ids)


def _split(ids: Sequence[str], labels: Sequence[str], share: float) -> list[bool]:
    """False for a share of every class (rounded down), chosen by a hash of the id."""
    kept = [True] * len(ids)
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    for members in by_label.values():
        ordered = sorted(members, key=lambda i: hashlib.sha256(ids[i].encode()).digest())
        for index in ordered[: int(len(ordered) * share)]:
            kept[index] = False
    return kept


def write_job(
    directory: Path,
    job: TrainingJob,
    images: NDArray[np.uint8],
    earlier: Mapping[str, NDArray[np.float32]],
) -> None:
    """Write a job whole; one that is there already stays as it is.

    Args:
        directory: The job's directory.
        job: Settings, ids and labels.
        images: uint8 [n, h, w, 3], in the order of ``job.ids``.
        earlier: Mean of the earlier adapters' tensors; empty when there is none.
    """
    if (directory / _JOB).exists():
        return
    building = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    building.mkdir(parents=True)
    write_durably(building / _SAMPLES, save({"images": np.ascontiguousarray(images)}))
    if earlier:
        tensors = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in earlier.items()}
        write_durably(building / _EARLIER, save(tensors))
    write_durably(building / _JOB, msgspec.json.format(msgspec.json.encode(job)))
    building.rename(directory)
    sync_directory(directory.parent)


def read_job(
    directory: Path,
) -> tuple[TrainingJob, NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """Read a job back.

    Returns:
        The job, its images uint8 [n, h, w, 3] and the earlier adapters' mean (maybe empty).

    Raises:
        TrainingDataError: The directory holds no complete job.
    """
    try:
        job = msgspec.json.decode((directory / _JOB).read_bytes(), type=TrainingJob)
        images = load_file(directory / _SAMPLES)["images"]
        path = directory / _EARLIER
        earlier: dict[str, NDArray[np.float32]] = load_file(path) if path.exists() else {}
    except Exception as error:  # safetensors raises its own kinds
        raise TrainingDataError(f"{directory} holds no usable training job: {error}") from error
    count = len(job.ids)
    if not len(job.labels) == len(job.train) == len(images) == count or images.dtype != np.uint8:
        raise TrainingDataError(f"{directory}: samples, labels and ids do not match")
    return job, images, earlier


def read_progress(directory: Path) -> dict[str, Any]:
    """The newest line of the trainer's progress; empty before the first."""
    try:
        lines = (directory / PROGRESS).read_bytes().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            continue  # half a line: the trainer was killed while writing it
    return {}
