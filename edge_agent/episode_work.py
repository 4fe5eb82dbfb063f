"""The heavy parts of an episode: trials, training jobs, validation, building generations.

Each function reads the journal and the blobs, runs the encoder where it must, and returns a value;
the conductor calls them on its worker thread and turns what they return into events. Nothing here
decides what comes next, activates anything or talks to the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import check_compatible, unpack
from adapter_store.errors import GenerationError
from adapter_store.generation import Generation
from adapter_store.journal import SampleRecord
from adapter_store.trust import verify_bundle, verify_statement
from edge_agent.agent import Agent
from edge_agent.alignment import try_alignment
from edge_agent.config import Config
from edge_agent.diagnosis import healthy
from edge_agent.episode import Episode
from edge_agent.episode_events import CandidateRef
from edge_agent.errors import TrainingDataError
from edge_agent.learner import Learner
from edge_agent.serving import Serving
from edge_agent.snapshot import unpack_snapshots
from edge_agent.training_job import TrainingJob, read_job, split_samples, write_job
from edge_agent.trials import (
    SURE,
    Answers,
    Verdict,
    balanced_calibration,
    does_not_hurt,
    try_out,
    validate,
)
from ood.calibration import fits
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import l2_normalise

MAX_TRAINED: Final = 1024
MAX_COMPARED: Final = 192
_ALL: Final = 1_000_000
# Samples less likely than this to be of the known world are what a candidate must explain.
_FOREIGN: Final = 0.2
_LEAST_FOREIGN: Final = 16

Features = NDArray[np.float32]


def shifted(agent: Agent, episode: Episode) -> list[SampleRecord]:
    """The journalled samples since the onset, oldest first."""
    return agent.state.journal.recent(_ALL, since_seq=episode.onset_seq - 1)


def search_signature(agent: Agent, episode: Episode) -> bytes:
    """The signature of the samples since the onset, to search the catalogue by."""
    features = _features(shifted(agent, episode))
    return signature(features, seed=agent.package.digest).to_bytes()


def try_candidate(
    agent: Agent, config: Config, episode: Episode, candidate: CandidateRef
) -> Verdict:
    """Verify a pulled bundle and try it on the samples since the onset.

    Raises:
        TrustError: The statement or the bytes are not what the catalogue vouches for.
        BundleError: The bundle is damaged or for another encoder.
        InstallError: A generation with it does not load.
    """
    statement = verify_statement(
        candidate.statement, candidate.signature, config.catalogue.public_key
    )
    data = agent.state.blobs.get(candidate.digest)
    verify_bundle(statement, data)
    bundle = unpack(data)
    check_compatible(bundle, agent.package.interface())
    rows = shifted(agent, episode)
    foreign = [row for row in rows if row.p_value <= _FOREIGN]
    tried = foreign if len(foreign) >= _LEAST_FOREIGN else rows
    scores = MahalanobisScore.from_statistics([bundle.base]).score(_features(tried))
    fit = fits(scores, bundle.manifest.score_quantiles)
    with_it = _candidate_serving(agent, candidate.digest)
    labelled = [row for row in rows if row.true_label is not None][-MAX_COMPARED:]
    return try_out(
        fit,
        len(tried),
        _compare(agent, with_it, labelled),
        _compare(agent, with_it, _known_before(agent, episode)),
    )


def prepare_training(
    agent: Agent, config: Config, learner: Learner, episode: Episode, *, name: str, now: float
) -> None:
    """Write the job of this training, unless it is there already.

    Raises:
        TrainingDataError: The labelled samples do not allow a training.
    """
    if not config.buffer.keep_images:
        raise TrainingDataError("no images are kept (buffer.keep_images is false)")
    journal = agent.state.journal
    labelled = journal.labelled(since_seq=episode.onset_seq - 1)
    rows = [row for row in healthy(journal, labelled, episode.onset_seq) if row.image is not None][
        -MAX_TRAINED:
    ]
    if labelled and not rows:
        raise TrainingDataError(
            f"none of {len(labelled)} labelled samples has a healthy frame with its image kept; "
            "check the sensor"
        )
    ids, labels = [row.id for row in rows], [str(row.true_label) for row in rows]
    settings = config.learner
    serving = _serving(agent)
    job = TrainingJob(
        device=config.agent.device,
        encoder=agent.package.digest,
        encoder_dir=str(agent.package.path.resolve()),
        rank=settings.rank,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        threads=settings.threads,
        max_seconds=settings.max_seconds,
        patience=settings.patience,
        checkpoint_every_s=settings.checkpoint_every_s,
        max_memory=settings.max_memory,
        seed=settings.seed,
        created_at=now,
        task=f"{config.agent.device} episode {episode.number}",
        parents=sorted(serving.bundles),
        ids=ids,
        labels=labels,
        train=split_samples(ids, labels),
    )
    write_job(
        learner.job_directory(name), job, _images(agent, rows), _earlier(serving, settings.rank)
    )


def validate_trained(
    agent: Agent, learner: Learner, episode: Episode, *, name: str, digest: str
) -> Verdict:
    """Compare the generation with the trained bundle to the running one.

    Raises:
        TrainingDataError: The training's job is gone.
        BundleError: The bundle is damaged.
        InstallError: A generation with it does not load.
    """
    job, images, _ = read_job(learner.job_directory(name))
    held = job.held_out()[-MAX_COMPARED:]
    with_it = _candidate_serving(agent, digest)
    held_out = Answers(
        truth=[job.labels[i] for i in held],
        current=[answer.label for answer in _serving(agent).predict(images[held])],
        candidate=[answer.label for answer in with_it.predict(images[held])],
    )
    return validate(held_out, _compare(agent, with_it, _known_before(agent, episode)))


def build(
    agent: Agent,
    learner: Learner,
    episode: Episode,
    *,
    name: str,
    digest: str,
    trained: bool,
    reason: str,
) -> Generation:
    """Build the running generation plus the candidate; the one built before a restart is reused.

    Raises:
        BundleError: The bundle is damaged.
        InstallError: The candidate generation gives unusable outputs.
        DiskFullError: It could not be written.
    """
    running = _running(agent)
    bundles = sorted({*running.manifest.bundles, digest})
    for known in agent.state.generations.list():
        if known.manifest.parent == running.number and sorted(known.manifest.bundles) == bundles:
            return known
    skip: set[str] = set()
    if trained:
        job, _, _ = read_job(learner.job_directory(name))
        skip = {job.ids[i] for i in job.trained()}
    new = [row for row in shifted(agent, episode) if row.id not in skip]
    calibration = balanced_calibration(
        running.calibration_features(), _features(new) if new else np.empty((0, 0), np.float32)
    )
    return agent.build_generation(bundles, calibration, parent=running.number, reason=reason)


def align(agent: Agent, episode: Episode) -> tuple[int | None, str]:
    """Build the running generation with an alignment of the samples since the onset, if it helps.

    Its calibration features stay the running generation's: new samples are calibration only once
    something was learned of their domain.

    Returns:
        The generation's number, None when aligning does not help; and why.

    Raises:
        InstallError: The candidate generation gives unusable outputs.
        DiskFullError: It could not be written.
    """
    running, serving = _running(agent), _serving(agent)
    rows = shifted(agent, episode)
    labelled = [row for row in rows if row.true_label is not None]
    new = {str(row.true_label) for row in labelled} - set(serving.labels)
    if new:
        return None, f"not aligned: {', '.join(sorted(new))} came, which are new classes"
    bundles, calibration = sorted(serving.bundles), running.calibration_features()
    alignment, verdict = try_alignment(
        _features(rows), calibration, [serving.bundles[digest].base for digest in bundles]
    )
    if alignment is None:
        return None, verdict.reason
    candidate = agent.load_candidate(bundles, calibration, alignment=alignment)
    kept = does_not_hurt(
        _compare(agent, candidate, labelled[-MAX_COMPARED:]),
        _compare(agent, candidate, _known_before(agent, episode)),
    )
    if not kept.accepted:
        return None, f"not aligned: {kept.reason}"
    made = agent.build_generation(
        bundles,
        calibration,
        parent=running.number,
        reason=f"episode {episode.number}: aligned without labels; {verdict.reason}",
        metrics=verdict.metrics | kept.metrics,
        alignment=alignment,
    )
    return made.number, verdict.reason


def _candidate_serving(agent: Agent, digest: str) -> Serving:
    running = _running(agent)
    bundles = sorted({*running.manifest.bundles, digest})
    return agent.load_candidate(bundles, running.calibration_features())


def _running(agent: Agent) -> Generation:
    current = agent.state.generations.current()
    if current is None:
        raise GenerationError("no generation runs; nothing can be built on it")
    return current


def _serving(agent: Agent) -> Serving:
    if agent.serving is None:
        raise GenerationError("no generation runs; nothing can be compared with it")
    return agent.serving


def _known_before(agent: Agent, episode: Episode) -> list[SampleRecord]:
    """Samples from before the onset that are labelled, or were answered surely."""
    first = max(0, episode.onset_seq - 1 - 2 * MAX_COMPARED)
    rows = agent.state.journal.recent(_ALL, since_seq=first)
    before = [
        row
        for row in rows
        if row.seq < episode.onset_seq and (row.true_label is not None or row.probability >= SURE)
    ]
    return before[-MAX_COMPARED:]


def _compare(agent: Agent, candidate: Serving, rows: Sequence[SampleRecord]) -> Answers:
    rows = [row for row in rows if row.image is not None]
    if not rows:
        return Answers((), (), ())
    images = _images(agent, rows)
    return Answers(
        truth=[row.label if row.true_label is None else row.true_label for row in rows],
        current=[answer.label for answer in _serving(agent).predict(images)],
        candidate=[answer.label for answer in candidate.predict(images)],
    )


def _earlier(serving: Serving, rank: int) -> dict[str, NDArray[np.float32]]:
    """The mean of the installed adapters a new one can be merged with; empty without any."""
    adapters = [
        bundle.tensors
        for bundle in serving.bundles.values()
        if bundle.manifest.family == "bottleneck" and bundle.manifest.rank == rank
    ]
    if not adapters:
        return {}
    means = {}
    for name in sorted(adapters[0]):
        stacked = np.stack([tensors[name] for tensors in adapters]).astype(np.float64)
        means[name] = np.asarray(stacked.mean(axis=0), dtype=np.float32)
    return means


def _features(rows: Sequence[SampleRecord]) -> Features:
    return l2_normalise(np.stack([np.asarray(row.features, dtype=np.float32) for row in rows]))


def _images(agent: Agent, rows: Sequence[SampleRecord]) -> NDArray[np.uint8]:
    snapshots: list[Any] = [row.image for row in rows]
    return unpack_snapshots(snapshots, agent.package.image_size)
