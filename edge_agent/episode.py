"""What an episode is: the durable story of one shift on a device, and the numbers it goes by.

Plain frozen values that are saved as JSON; :func:`open_episode` gives the first one. What follows
from what is in :mod:`edge_agent.episode_steps`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import msgspec

from edge_agent.episode_events import CandidateRef, GroupFound
from ood.signature import DEFAULT_MIN_SIMILARITY


class Stage(enum.StrEnum):
    """Where an episode is."""

    SUSPECTED = "suspected"
    CONFIRMED = "confirmed"
    SENSOR_FAULT = "sensor_fault"
    SEEKING = "seeking"
    TRIAL = "trial"
    WAITING_FOR_LABELS = "waiting_for_labels"
    TRAINING = "training"
    VALIDATING = "validating"
    INSTALLED = "installed"
    CLOSED = "closed"


@dataclass(frozen=True)
class Policy:
    """The numbers an episode goes by.

    Attributes:
        min_labels: Labelled samples since the onset before training starts.
        online: A broker is configured, so the catalogue can be asked.
        can_train: This device may train.
        min_similarity: Search hits less similar than this are not pulled.
        confirm_samples: Samples after the alarm before it can be confirmed.
        confirm_limit: Samples after which an unconfirmed alarm is closed as passed.
        foreign_share: Share of them that must look foreign (one in ten does by chance).
        trial_samples: Samples since the onset that a search and a trial need.
        more_labels: Further labelled samples asked for when a training did not succeed.
        align_samples: Samples since the onset before aligning is tried; None when it never is.
        diagnose: Say what kind of shift it is before anything is done about it.
        healthy_frames: Healthy frames in a row after which a sensor counts as working again.
    """

    min_labels: int = 64
    online: bool = True
    can_train: bool = True
    min_similarity: float = DEFAULT_MIN_SIMILARITY
    confirm_samples: int = 16
    confirm_limit: int = 48
    foreign_share: float = 0.2
    trial_samples: int = 32
    more_labels: int = 32
    align_samples: int | None = None
    diagnose: bool = False
    healthy_frames: int = 64


@dataclass(frozen=True)
class Moment:
    """One entry of an episode's history."""

    at: float
    stage: Stage
    note: str


@dataclass(frozen=True)
class Episode:
    """One shift, from alarm to close.

    Attributes:
        number: Counts this device's episodes from 1.
        stage: Where it is.
        opened_at: Unix time of the alarm.
        alarm_seq: Journal number of the sample that raised the alarm.
        onset_seq: Journal number of the first sample believed to be shifted.
        generation: The generation that ran when it opened.
        pinned: The operator holds the device where it is.
        can_train: False once training turned out to be impossible here.
        labels: Labelled samples since the onset.
        needed: Labelled samples to have before (the next) training.
        trainings: Trainings started; names the training job.
        candidates: Search hits not tried yet, best first.
        candidate: Digest on trial, in validation or being installed; empty otherwise.
        trained: The candidate was trained here.
        built: Number of the generation built from the candidate; None before.
        align_at: Samples since the onset with which aligning is tried next; None for no more.
        aligned: Number of the generation that aligns while labels are waited for; None without.
        refused: Digests that failed here; none is tried twice in one episode.
        diagnosing: It was asked what kind of shift this is.
        kind: What kind of shift it is, as `ood.kinds` calls it; empty before it is known.
        confidence: How sure that is, 0.5..1; 0 before.
        evidence: What speaks for it, for a person.
        groups: Groups of samples that a person is asked to name.
        note: What happens now or what is missing, for a person.
        outcome: How it ended; empty while open.
        history: The stages passed through.
    """

    number: int
    stage: Stage
    opened_at: float
    alarm_seq: int
    onset_seq: int
    generation: int
    needed: int
    pinned: bool = False
    can_train: bool = True
    labels: int = 0
    trainings: int = 0
    candidates: tuple[CandidateRef, ...] = ()
    candidate: str = ""
    trained: bool = False
    built: int | None = None
    align_at: int | None = None
    aligned: int | None = None
    refused: tuple[str, ...] = ()
    diagnosing: bool = False
    kind: str = ""
    confidence: float = 0.0
    evidence: tuple[str, ...] = ()
    groups: tuple[GroupFound, ...] = ()
    note: str = ""
    outcome: str = ""
    history: tuple[Moment, ...] = ()

    @property
    def open(self) -> bool:
        """Whether the story goes on."""
        return self.stage is not Stage.CLOSED

    @property
    def awaits_samples(self) -> bool:
        """Whether what it does next depends on more samples."""
        if self.stage is Stage.WAITING_FOR_LABELS:
            return self.align_at is not None and not self.pinned
        return self.stage in (Stage.SUSPECTED, Stage.CONFIRMED, Stage.SENSOR_FAULT)

    def to_dict(self) -> dict[str, Any]:
        """The episode as JSON-able values."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Episode:
        """The episode :meth:`to_dict` wrote.

        Raises:
            msgspec.ValidationError: The values are not an episode's.
        """
        return msgspec.convert(values, cls)


def open_episode(
    number: int,
    *,
    now: float,
    alarm_seq: int,
    onset_seq: int,
    generation: int,
    pinned: bool,
    policy: Policy,
) -> Episode:
    """The episode an alarm opens.

    Args:
        number: One more than the last episode's.
        now: Unix time.
        alarm_seq: Journal number of the sample that raised the alarm.
        onset_seq: Journal number of the first sample believed to be shifted.
        generation: The generation that runs.
        pinned: Whether the operator holds the device where it is.
        policy: The numbers to go by.

    Returns:
        A suspected episode.
    """
    note = "the input looks foreign; watching the next samples"
    return Episode(
        number=number,
        stage=Stage.SUSPECTED,
        opened_at=now,
        alarm_seq=alarm_seq,
        onset_seq=min(onset_seq, alarm_seq),
        generation=generation,
        needed=policy.min_labels,
        pinned=pinned,
        can_train=policy.can_train,
        align_at=policy.align_samples,
        note=note,
        history=(Moment(now, Stage.SUSPECTED, note),),
    )
