"""The training process: ``python -m edge_agent.trainer JOB_DIR`` makes a bundle from a job.

Runs apart from the daemon, at low priority, and dies with it. Torch is imported only here, and
only after the process has begun, so that a device without it says what to install. Whatever ends
this process, starting it again on the same directory carries on and gives the same bundle.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.blobs import write_durably
from adapter_store.bundle import Bundle, Manifest, pack
from edge_agent.errors import TrainingDataError
from edge_agent.training_job import (
    CHECKPOINT,
    EXIT_DONE,
    EXIT_REFUSED,
    EXIT_UNAVAILABLE,
    FAILURE,
    PROGRESS,
    RESULT,
    TrainingJob,
    read_job,
)
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.calibration import score_quantiles
from ood.errors import DriftkeelError
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

_NICE: Final = 10
_BATCH: Final = 32
_PR_SET_PDEATHSIG: Final = 1

Floats = NDArray[np.float32]
log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Train what the directory describes.

    Args:
        arguments: The job's directory and the process id of the daemon that started this (0: none).

    Returns:
        0 when ``result.bundle`` is there, 2 when training was refused and ``failure.json`` says
        why, 3 when this machine cannot train.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    directory = Path(arguments[0])
    parent = int(arguments[1]) if len(arguments) > 1 else 0
    if parent and not _die_with(parent):
        return EXIT_REFUSED
    os.nice(_NICE)
    with (directory / "lock").open("w") as lock:
        # A trainer of a daemon that was just killed may still be ending.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / RESULT).exists():
            return EXIT_DONE
        return _guarded(directory)


def make_bundle(directory: Path) -> bytes:
    """Train, measure and pack.

    Args:
        directory: The job.

    Returns:
        The packed bundle; a function of the job alone, unless its time budget ran out.

    Raises:
        ImportError: Torch is not installed.
        TrainingDataError: The job cannot be used.
        ExporterError: The encoder is another or damaged, or the trained adapter's graph does not
            compute what was trained.
    """
    job, images, earlier = read_job(directory)
    package = EncoderPackage.load(Path(job.encoder_dir))
    if package.digest != job.encoder:
        raise TrainingDataError(
            f"the job is for encoder {job.encoder[:12]}, {job.encoder_dir} holds "
            f"{package.digest[:12]}"
        )
    sessions = EncoderSessions(package, threads=job.threads)
    hidden = _in_batches(lambda rows: sessions.prefix(prepare(rows, package)), images)
    base = _features(sessions, hidden, None, job.family)
    labels = np.array(job.labels, dtype=object)
    trained, held = np.array(job.trained()), np.array(job.held_out())
    tensors = _trained_tensors(
        directory, job, package, hidden=hidden[trained], base=base[trained], earlier=earlier
    )
    _check_parity(package, job.family, tensors, hidden[held[:_BATCH]])
    own = _features(sessions, hidden, tensors, job.family)
    base_statistics = ClassStatistics.fit(base[trained], list(labels[trained]))
    own_statistics = ClassStatistics.fit(own[trained], list(labels[trained]))
    scores = MahalanobisScore.from_statistics([base_statistics]).score(base[held])
    manifest = Manifest(
        encoder=job.encoder,
        family=job.family,
        rank=job.rank,
        sites=package.sites,
        labels=own_statistics.labels,
        task=job.task,
        created_at=job.created_at,
        created_by=job.device,
        parents=tuple(sorted(job.parents)),
        samples=len(trained),
        metrics={
            "held_out_samples": float(len(held)),
            "held_out_accuracy": _accuracy(own_statistics, own[held], labels[held]),
            "held_out_accuracy_base": _accuracy(base_statistics, base[held], labels[held]),
        },
        score_quantiles=tuple(score_quantiles(scores)),
    )
    return pack(
        Bundle(
            manifest=manifest,
            tensors=tensors,
            base=base_statistics,
            own=own_statistics,
            signature=signature(base, seed=job.encoder),
        )
    )


def _guarded(directory: Path) -> int:
    try:
        data = make_bundle(directory)
    except ImportError as error:
        message = f"this device cannot train: install driftkeel[train] ({error})"
        status = EXIT_UNAVAILABLE
    except DriftkeelError as error:
        message, status = str(error), EXIT_REFUSED
    else:
        write_durably(directory / RESULT, data)
        return EXIT_DONE
    log.error("%s", message)
    write_durably(directory / FAILURE, msgspec.json.encode({"reason": message}))
    return status


def _trained_tensors(
    directory: Path,
    job: TrainingJob,
    package: EncoderPackage,
    *,
    hidden: Floats,
    base: Floats,
    earlier: Mapping[str, Floats],
) -> dict[str, Floats]:
    # Imported here and not above: without torch this process must still start and say so.
    import torch  # noqa: PLC0415

    from edge_agent.objectives import CosineHead  # noqa: PLC0415
    from edge_agent.trainer_loop import Progress, Recipe, train  # noqa: PLC0415
    from exporter.families import adapter_family, initial_tensors  # noqa: PLC0415
    from exporter.programs import load_training_program  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    names, targets = np.unique([job.labels[i] for i in job.trained()], return_inverse=True)
    dims = {name: site.dim for name, site in package.manifest.sites.items()}
    fresh = initial_tensors(adapter_family(job.family), dims, job.rank, job.seed)
    usable = earlier if {k: v.shape for k, v in earlier.items()} == _shapes(fresh) else {}
    if earlier and not usable:
        log.warning("earlier adapters are of other shapes; training without them")
    head = np.stack([base[targets == k].mean(axis=0) for k in range(len(names))])

    def report(progress: Progress) -> None:
        with (directory / PROGRESS).open("ab") as file:
            file.write(msgspec.json.encode(progress) + b"\n")

    return train(
        load_training_program(package, job.family),
        hidden,
        targets.astype(np.int64),
        usable or fresh,
        CosineHead(head.astype(np.float32), momentum=job.momentum, earlier=usable),
        recipe=Recipe(
            epochs=job.epochs,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            seed=job.seed,
            max_seconds=job.max_seconds,
        ),
        checkpoint=directory / CHECKPOINT,
        report=report,
    )


def _check_parity(
    package: EncoderPackage, family: str, tensors: Mapping[str, Floats], hidden: Floats
) -> None:
    # It compares with torch, so it imports it.
    from exporter.parity import parity  # noqa: PLC0415

    parity(package, family, tensors, hidden)


def _shapes(tensors: Mapping[str, Floats]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _features(
    sessions: EncoderSessions,
    hidden: Floats,
    tensors: Mapping[str, Floats] | None,
    family: str,
) -> Floats:
    return l2_normalise(_in_batches(lambda rows: sessions.suffix(rows, tensors, family), hidden))


def _in_batches(function: Callable[[Any], Floats], rows: NDArray[Any]) -> Floats:
    parts = [function(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def _accuracy(statistics: ClassStatistics, features: Floats, labels: NDArray[np.object_]) -> float:
    head = GaussianHead.from_statistics([statistics])
    guesses = head.label_probabilities(head.log_likelihoods(features)).argmax(axis=1)
    return float(
        np.mean([head.labels[g] == label for g, label in zip(guesses, labels, strict=True)])
    )


def _die_with(parent: int) -> bool:
    """Have the kernel kill this process when the daemon dies; False when it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
