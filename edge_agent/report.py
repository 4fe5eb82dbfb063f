"""What this device says about itself: the reported state, and an episode's status.

A pure reading of the agent and its episode; the conductor sends the report on every change and
every few seconds, and answers with the status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from adapter_store.wire import EpisodeSummary, GenerationSummary, Report, TrainingProgress
from edge_agent.agent import Agent
from edge_agent.desired import DesiredState
from edge_agent.episode import Episode

_TEXT = 2000
_GENERATIONS = 100


def build_report(
    agent: Agent,
    desired: DesiredState,
    episode: Episode | None,
    *,
    sequence: int,
    device: str,
    problem: str,
    training: Mapping[str, Any],
) -> Report | None:
    """The report of this moment; None before the first generation."""
    serving = agent.serving
    if serving is None:
        return None
    held = agent.state.generations.list()[-_GENERATIONS:]
    return Report(
        device=device,
        sequence=sequence,
        desired_version=desired.version,
        generation=serving.number,
        generation_digest=serving.describe()["digest"],
        pinned=desired.pinned,
        generations=[
            GenerationSummary(
                number=generation.number,
                digest=generation.digest,
                reason=generation.manifest.reason[:_TEXT],
                created_at=generation.manifest.created_at,
                bundles=generation.manifest.bundles[:1000],
            )
            for generation in held
        ],
        episode=None
        if episode is None
        else EpisodeSummary(
            number=episode.number,
            state=str(episode.stage),
            detail=describe_episode(episode)[:_TEXT],
            kind=episode.kind,
        ),
        counters={name: float(count) for name, count in agent.status()["counters"].items()},
        problem=(desired.problem or problem or agent.refusals.problem)[:_TEXT],
        training=training_progress(training),
    )


def training_progress(progress: Mapping[str, Any]) -> TrainingProgress | None:
    """What the trainer last wrote of itself, for people elsewhere; None when nothing runs.

    Args:
        progress: As the learner gives it: ``step``, ``steps``, ``epoch``, ``epochs``,
            ``accuracy``, ``seconds``; empty when no training runs or none has told yet.
    """
    if "steps" not in progress:
        return None
    done, steps = progress["step"], progress["steps"]
    left = progress["seconds"] * (steps - done) / done if done else 0.0
    try:
        return msgspec.convert({**progress, "eta_s": left}, TrainingProgress)
    except msgspec.ValidationError:
        return None  # written by another version of the trainer


def describe_episode(episode: Episode) -> str:
    """What happens now or what is missing, for a person."""
    said = episode.outcome or episode.note
    if episode.kind and not said.startswith(episode.kind):
        said = f"{episode.kind}: {said}"
    if episode.pinned and episode.open:
        return f"pinned by the operator, goes on when unpinned; {said}"
    return said


def alarm_status(episode: Episode) -> Mapping[str, Any]:
    """The alarm that opened an episode, as JSON-able values."""
    return {
        "at": episode.opened_at,
        "generation": episode.generation,
        "seq": episode.alarm_seq,
    }


def episode_status(episode: Episode) -> Mapping[str, Any]:
    """An episode for the status of the device, as JSON-able values."""
    return {
        "number": episode.number,
        "state": str(episode.stage),
        "detail": describe_episode(episode),
        "opened_at": episode.opened_at,
        "onset_seq": episode.onset_seq,
        "alarm_seq": episode.alarm_seq,
        "generation": episode.generation,
        "labels": episode.labels,
        "labels_needed": episode.needed,
        "aligned": episode.aligned,
        "kind": episode.kind,
        "confidence": episode.confidence,
        "evidence": list(episode.evidence),
        "groups": [
            {
                "size": group.size,
                "sample_ids": list(group.sample_ids),
                "nearest": group.nearest,
                "distance": group.distance,
            }
            for group in episode.groups
        ],
        "trainings": episode.trainings,
        "pinned": episode.pinned,
        "outcome": episode.outcome,
        "refused": list(episode.refused),
        "history": [
            {"at": moment.at, "state": str(moment.stage), "note": moment.note}
            for moment in episode.history
        ],
    }
