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
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.blobs import write_durably
from adapter_store.bundle import FROZEN, Bundle, Manifest, pack
from edge_agent.cleaning import trusted_labels
from edge_agent.decision import GroupsDecision
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
    split_stopping,
)
from edge_agent.training_memory import (
    Activations,
    Chosen,
    MemoryBudget,
    peak_bytes,
    planned_micro_batch,
)
from edge_agent.trials import Answers, earns_its_place
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.calibration import score_quantiles
from ood.errors import DriftkeelError
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise

_NICE: Final = 10
_BATCH: Final = 32
_MAX_ROUNDS: Final = 4
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

    The samples have three parts, class by class: most are trained on; a fifth of those, where that
    is enough, only says when to stop; and what the job holds out decides whether the adapter earns
    its place. One that does not is left out, and the bundle is class statistics alone.

    Args:
        directory: The job.

    Returns:
        The packed bundle; a function of the job alone, unless its time budget ran out.

    Raises:
        ImportError: Torch is not installed.
        TrainingDataError: The job cannot be used.
        TrainingMemoryError: It does not fit into the memory the job allows.
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
    budget = MemoryBudget.of_megabytes(job.max_memory)
    sessions = EncoderSessions(package, threads=job.threads)
    hidden, base = _encoded(directory, sessions, images, budget)
    del images
    labels = np.array(job.labels, dtype=object)
    trained, held = np.array(job.trained()), np.array(job.held_out())
    trusted = trusted_labels(base[trained], list(labels[trained]))
    learned = trained[trusted]
    statistics = ClassStatistics.fit(base[learned], list(labels[learned]))
    tensors = _trained_tensors(
        directory, job, sessions, hidden, learned, earlier=earlier, budget=budget
    )
    _check_parity(package, job.family, tensors, hidden[held[:_BATCH]].astype(np.float32))
    own = _own_features(sessions, hidden, np.concatenate([learned, held]), tensors, job.family)
    own_statistics = ClassStatistics.fit(own[: len(learned)], list(labels[learned]))
    verdict = earns_its_place(
        Answers(
            truth=list(labels[held]),
            current=_answers(statistics, None, base[held], None),
            candidate=_answers(statistics, own_statistics, base[held], own[len(learned) :]),
        )
    )
    log.info("%s", verdict.reason)
    kept = verdict.accepted
    scores = MahalanobisScore.from_statistics([statistics]).score(base[held])
    manifest = Manifest(
        encoder=job.encoder,
        family=job.family if kept else FROZEN,
        rank=job.rank if kept else 0,
        sites=package.sites if kept else (),
        labels=statistics.labels,
        task=job.task,
        created_at=job.created_at,
        created_by=job.device,
        parents=tuple(sorted(job.parents)),
        samples=len(learned),
        metrics={
            "held_out_samples": float(len(held)),
            "held_out_accuracy": verdict.metrics[
                "held_out_accuracy_adapter" if kept else "held_out_accuracy_base"
            ],
            "doubted_labels": float(np.sum(~trusted)),
            **verdict.metrics,
        },
        score_quantiles=tuple(score_quantiles(scores)),
        codec="int8",
    )
    budget.check()
    return pack(
        Bundle(
            manifest=manifest,
            tensors=tensors if kept else {},
            base=statistics,
            own=own_statistics if kept else statistics,
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
    sessions: EncoderSessions,
    hidden: Activations,
    learned: NDArray[np.int64],
    *,
    earlier: Mapping[str, Floats],
    budget: MemoryBudget,
) -> dict[str, Floats]:
    # Imported here and not above: without torch this process must still start and say so.
    import torch  # noqa: PLC0415

    from edge_agent.objectives import CosineHead  # noqa: PLC0415
    from edge_agent.trainer_loop import (  # noqa: PLC0415
        Progress,
        Recipe,
        Validation,
        saved_bytes,
        train,
    )
    from exporter.families import adapter_family, initial_tensors  # noqa: PLC0415
    from exporter.programs import load_training_program  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    labels = [job.labels[i] for i in learned]
    names, targets = np.unique(labels, return_inverse=True)
    fits = np.array(split_stopping([job.ids[i] for i in learned], labels))
    package = sessions.package
    sites = package.manifest.sites
    fresh = initial_tensors(adapter_family(job.family), sites, job.rank, job.seed)
    usable = earlier if {k: v.shape for k, v in earlier.items()} == _shapes(fresh) else {}
    if earlier and not usable:
        log.warning("earlier adapters are of other shapes; training without them")
    network = _own_features(sessions, hidden, learned, {}, job.family)
    head = np.stack([network[targets == k].mean(axis=0) for k in range(len(names))])
    program = load_training_program(package, job.family)
    budget.check()
    micro_batch = planned_micro_batch(
        directory,
        lambda: budget.samples_at_once(saved_bytes(program, hidden, fresh), batch=job.batch_size),
    )

    def report(progress: Progress) -> None:
        with (directory / PROGRESS).open("ab") as file:
            file.write(msgspec.json.encode(progress) + b"\n")
        budget.check()

    tensors = train(
        program,
        Chosen(hidden, learned[fits]),
        targets[fits].astype(np.int64),
        usable or fresh,
        CosineHead(head.astype(np.float32), momentum=job.momentum, earlier=usable),
        recipe=Recipe(
            epochs=job.epochs,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            seed=job.seed,
            max_seconds=job.max_seconds,
            patience=job.patience,
            micro_batch=micro_batch,
        ),
        checkpoint=directory / CHECKPOINT,
        report=report,
        validation=None
        if fits.all()
        else Validation(Chosen(hidden, learned[~fits]), targets[~fits].astype(np.int64)),
        checkpoint_every_s=job.checkpoint_every_s,
    )
    log.info(
        "at most %d samples at once; %d MB of %d", micro_batch, peak_bytes() >> 20, job.max_memory
    )
    return tensors


def _check_parity(
    package: EncoderPackage, family: str, tensors: Mapping[str, Floats], hidden: Floats
) -> None:
    # It compares with torch, so it imports it.
    from exporter.parity import parity  # noqa: PLC0415

    parity(package, family, tensors, hidden, forms=("fed", "standalone"))


def _shapes(tensors: Mapping[str, Floats]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _encoded(
    directory: Path, sessions: EncoderSessions, images: NDArray[np.uint8], budget: MemoryBudget
) -> tuple[Activations, Floats]:
    """Prefix activations [n, ...] in float16, and normalised base features [n, d]."""
    package = sessions.package
    hidden = budget.activations(directory, len(images), package.hidden_shape)
    features = []
    for start in range(0, len(images), _BATCH):
        rows = slice(start, min(start + _BATCH, len(images)))
        activations = sessions.prefix(prepare(images[rows], package))
        hidden[rows] = activations
        features.append(sessions.base_features(activations))
    return hidden, np.concatenate(features)


def _own_features(
    sessions: EncoderSessions,
    hidden: Activations,
    rows: NDArray[np.int64],
    tensors: Mapping[str, Floats],
    family: str,
) -> Floats:
    """The network's own output with the adapter, if any, l2-normalised [rows, network_dim]."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        activations = hidden[rows[start : start + _BATCH]].astype(np.float32)
        features = sessions.suffix(activations, tensors, family)
        parts.append(features[:, : sessions.package.network_dim])
    return l2_normalise(np.concatenate(parts))


def _answers(
    statistics: ClassStatistics,
    own_statistics: ClassStatistics | None,
    base: Floats,
    own: Floats | None,
) -> list[str]:
    """What a generation of this bundle alone says of samples; without an adapter ``own`` is None.

    Decided as the serving generation decides, so that what is tested is what would run.
    """

    def own_features(_: int, rows: NDArray[np.int64]) -> Floats:
        assert own is not None  # asked only where there is an adapter
        return own[rows]

    decision = GroupsDecision([statistics], [own_statistics], max_rounds=_MAX_ROUNDS)
    return [decision.labels[k] for k in decision.route(base, own_features).label]


def _die_with(parent: int) -> bool:
    """Have the kernel kill this process when the daemon dies; False when it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
