"""The device's story of one shift, as a pure state machine.

:func:`open_episode` starts it, :func:`step` takes one event and returns the next episode and the
actions to carry out, :func:`resume` gives the actions to repeat after a restart. The conductor
saves every episode before it acts, and every action may be repeated without harm. Nothing here
reads a clock, a file or a socket.

The stages::

    suspected -> confirmed -> seeking -> trial ----------------------> installed -> closed
        |                        |         |                              ^
      closed      | closed       +---------+--> waiting_for_labels        |
    ("passed")    | ("prior                |      |  ^ (and searches on)  |
                  |  change")              +--> training --> validating --+
             sensor_fault -> closed ("healthy again")

A confirmed episode is diagnosed (`ood.kinds`) before anything is done about it. A broken sensor is
told of and waited for: nothing is searched, aligned, trained or installed. Other proportions of
known classes close it. Aligning is tried unless the classes are new.

A bundle is installed only after its checks (a trial when it came from the catalogue, a
validation when it was trained here). While it waits for labels, the features of the new domain may
be aligned with those of the known one: that generation runs for the time being, and the episode
goes on waiting. A training that is cancelled is not started again before more labels have come.
While the operator has pinned the device, events are still taken in but no action is given out;
unpinning gives the actions of the stage reached.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from edge_agent.episode_events import (
    Action,
    Activate,
    Align,
    AlignmentTried,
    Build,
    Cancel,
    CandidateFailed,
    CandidatePulled,
    CandidateRef,
    Diagnose,
    Diagnosed,
    Event,
    FramesSeen,
    GenerationActivated,
    GenerationBuilt,
    GroupFound,
    InstallFailed,
    LabelsAvailable,
    OperatorChose,
    PinChanged,
    Pull,
    SamplesSeen,
    Search,
    SearchAnswered,
    SearchDue,
    SearchFailed,
    Train,
    TrainingCancelled,
    TrainingDone,
    TrainingFailed,
    TrialVerdict,
    Try,
    Validate,
    ValidationVerdict,
)
from ood.signature import DEFAULT_MIN_SIMILARITY

MAX_HISTORY: Final = 64
# Aligning that has not helped with so many samples is not tried with more.
ALIGN_LIMIT: Final = 1024


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


Step = tuple[Episode, tuple[Action, ...]]


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


def step(episode: Episode, event: Event, *, now: float, policy: Policy) -> Step:
    """Take one event.

    Args:
        episode: The story so far.
        event: What happened. An event that does not belong to the present stage or candidate
            (late, repeated) changes nothing.
        now: Unix time.
        policy: The numbers to go by.

    Returns:
        The episode to save, then the actions to carry out.
    """
    if not episode.open:
        return episode, ()
    after, actions = _Machine(now, policy).take(episode, event)
    if after.pinned:
        # Telling what happened changes nothing that runs.
        actions = tuple(action for action in actions if isinstance(action, Cancel | Diagnose))
    return after, actions


def resume(episode: Episode, policy: Policy) -> tuple[Action, ...]:
    """The actions to repeat after a restart (or an unpin) in the present stage."""
    if not episode.open or episode.pinned:
        return ()
    return _stage_actions(episode, policy, fresh=False)


def _stage_actions(episode: Episode, policy: Policy, *, fresh: bool) -> tuple[Action, ...]:
    match episode.stage:
        case Stage.CONFIRMED if episode.diagnosing:
            return (Diagnose(),)
        case Stage.SEEKING:
            return (Search(),)
        case Stage.WAITING_FOR_LABELS if not fresh:
            search = (Search(),) if policy.online else ()
            return (*_activate_aligned(episode), *search)
        case Stage.TRIAL:
            return (Pull(episode.candidates[0]),)
        case Stage.TRAINING:
            return (Train(episode.trainings),)
        case Stage.VALIDATING:
            return (Validate(episode.candidate, episode.trainings),)
        case Stage.INSTALLED if episode.built is None:
            return (Build(episode.candidate, episode.trained),)
        case Stage.INSTALLED:
            assert episode.built is not None
            return (Activate(episode.built, episode.candidate, episode.trained),)
    return ()


def _activate_aligned(episode: Episode) -> tuple[Action, ...]:
    return () if episode.aligned is None else (Activate(episode.aligned, "", trained=False),)


@dataclass(frozen=True)
class _Machine:
    now: float
    policy: Policy

    def take(self, ep: Episode, event: Event) -> Step:  # noqa: C901, PLR0912 (one case an event)
        match event:
            case SamplesSeen():
                return self._samples(ep, event)
            case Diagnosed() if ep.stage is Stage.CONFIRMED and ep.diagnosing:
                return self._diagnosed(ep, event)
            case FramesSeen(healthy) if ep.stage is Stage.SENSOR_FAULT:
                if healthy < self.policy.healthy_frames:
                    return ep, ()
                return self._close(ep, f"the sensor works again: {healthy} healthy frames in a row")
            case LabelsAvailable(count):
                return self._labels(ep, count)
            case SearchDue() if ep.stage is Stage.WAITING_FOR_LABELS and self.policy.online:
                return ep, (Search(),)
            case SearchAnswered(candidates):
                return self._answered(ep, candidates)
            case SearchFailed(reason) if ep.stage is Stage.SEEKING:
                return self._without_catalogue(ep, reason)
            case CandidatePulled(digest) if self._on_trial(ep, digest):
                return ep, (Try(ep.candidates[0]),)
            case CandidateFailed(digest, reason, for_good) if self._on_trial(ep, digest):
                return self._next_candidate(ep, reason, refuse=for_good)
            case TrialVerdict(digest, accepted, reason) if self._on_trial(ep, digest):
                if accepted:
                    return self._enter(ep, Stage.INSTALLED, reason, trained=False, built=None)
                return self._next_candidate(ep, reason, refuse=True)
            case TrainingDone() | TrainingFailed():
                return self._training_ended(ep, event)
            case TrainingCancelled(training) if (
                ep.stage is Stage.TRAINING and training == ep.trainings
            ):
                after, _ = self._ask_for_more(ep, "the training was cancelled by the operator")
                return after, (Cancel(),)
            case ValidationVerdict(digest, passed, reason) if (
                ep.stage is Stage.VALIDATING and digest == ep.candidate
            ):
                if passed:
                    return self._enter(ep, Stage.INSTALLED, reason, built=None)
                return self._ask_for_more(ep, reason)
            case AlignmentTried() if ep.stage is Stage.WAITING_FOR_LABELS:
                return self._alignment_tried(ep, event)
            case InstallFailed("", reason) if ep.aligned is not None:
                return replace(ep, aligned=None, history=self._history(ep, reason)), ()
            case GenerationBuilt() | InstallFailed() | GenerationActivated():
                return self._installing(ep, event)
            case PinChanged(pinned) if pinned != ep.pinned:
                after = replace(ep, pinned=pinned)
                return after, resume(after, self.policy)
            case OperatorChose(number):
                return self._close(ep, f"the operator switched to generation {number}", Cancel())
        return ep, ()

    def _samples(self, ep: Episode, seen: SamplesSeen) -> Step:
        policy = self.policy
        if ep.stage is Stage.SUSPECTED and seen.since_alarm >= policy.confirm_samples:
            if seen.foreign >= policy.foreign_share * seen.since_alarm:
                share = f"{seen.foreign} of {seen.since_alarm} samples after the alarm look foreign"
                ep, _ = self._enter(ep, Stage.CONFIRMED, share)
            elif seen.since_alarm >= policy.confirm_limit:
                return self._close(ep, "passed: the samples after the alarm look familiar again")
        if ep.stage is Stage.CONFIRMED and seen.since_onset >= policy.trial_samples:
            if policy.diagnose and ep.diagnosing:
                return ep, ()
            if policy.diagnose:
                return replace(ep, diagnosing=True), (Diagnose(),)
            return self._seek(ep)
        if ep.stage is Stage.WAITING_FOR_LABELS and ep.awaits_samples:
            return self._align(ep, seen.since_onset)
        return ep, ()

    def _seek(self, ep: Episode) -> Step:
        if self.policy.online:
            return self._enter(ep, Stage.SEEKING, "asking the catalogue for a fitting bundle")
        return self._without_catalogue(ep, "no broker is configured")

    def _diagnosed(self, ep: Episode, found: Diagnosed) -> Step:
        ep = replace(
            ep,
            diagnosing=False,
            kind=found.kind,
            confidence=found.confidence,
            evidence=found.evidence,
            groups=found.groups,
        )
        said = f"{found.kind}: {'; '.join(found.evidence)}"
        match found.kind:
            case "sensor fault":
                return self._enter(ep, Stage.SENSOR_FAULT, said, candidates=())
            case "prior change":
                return self._close(ep, f"{said}; nothing is to be learned")
            case "new classes":
                ep = replace(ep, align_at=None)
        return self._seek(replace(ep, history=self._history(ep, said)))

    def _align(self, ep: Episode, samples: int) -> Step:
        if samples < (ep.align_at or 0):
            return ep, ()
        following = 2 * samples
        return replace(ep, align_at=following if following <= ALIGN_LIMIT else None), (Align(),)

    def _alignment_tried(self, ep: Episode, tried: AlignmentTried) -> Step:
        if tried.number is None:
            return replace(ep, history=self._history(ep, tried.reason)), ()
        ep = replace(ep, aligned=tried.number, align_at=None)
        after, _ = self._enter(ep, ep.stage, f"{tried.reason}; {_waiting_note(ep)}")
        return after, _activate_aligned(after)

    def _labels(self, ep: Episode, count: int) -> Step:
        if count == ep.labels:
            return ep, ()
        ep = replace(ep, labels=count)
        if ep.stage is not Stage.WAITING_FOR_LABELS:
            return ep, ()
        if ep.can_train and count >= ep.needed:
            return self._train(ep, "labels arrived")
        return replace(ep, note=_waiting_note(ep)), ()

    def _answered(self, ep: Episode, candidates: tuple[CandidateRef, ...]) -> Step:
        if ep.stage not in (Stage.SEEKING, Stage.WAITING_FOR_LABELS):
            return ep, ()
        fitting = tuple(
            c
            for c in candidates
            if c.digest not in ep.refused and c.similarity >= self.policy.min_similarity
        )
        if fitting:
            return self._try_first(replace(ep, candidates=fitting))
        if ep.stage is Stage.WAITING_FOR_LABELS:
            return ep, ()
        return self._without_catalogue(ep, "the catalogue has no fitting bundle")

    def _on_trial(self, ep: Episode, digest: str) -> bool:
        return ep.stage is Stage.TRIAL and ep.candidate == digest

    def _try_first(self, ep: Episode) -> Step:
        first = ep.candidates[0]
        note = f"trying bundle {first.digest[:12]} (similarity {first.similarity:.2f})"
        return self._enter(ep, Stage.TRIAL, note, candidate=first.digest, trained=False)

    def _next_candidate(self, ep: Episode, reason: str, *, refuse: bool) -> Step:
        refused = (*ep.refused, ep.candidate) if refuse else ep.refused
        reason = f"bundle {ep.candidate[:12]}: {reason}"
        ep = replace(ep, candidates=ep.candidates[1:], candidate="", built=None, refused=refused)
        if ep.candidates:
            return self._try_first(replace(ep, history=self._history(ep, reason)))
        return self._without_catalogue(ep, reason)

    def _without_catalogue(self, ep: Episode, reason: str) -> Step:
        if ep.can_train and ep.labels >= ep.needed:
            return self._train(ep, reason)
        ep = replace(ep, candidates=(), candidate="", built=None, trained=False)
        return self._enter(ep, Stage.WAITING_FOR_LABELS, f"{reason}; {_waiting_note(ep)}")

    def _train(self, ep: Episode, reason: str) -> Step:
        note = f"{reason}; training an adapter on {ep.labels} labelled samples"
        return self._enter(
            ep,
            Stage.TRAINING,
            note,
            trainings=ep.trainings + 1,
            candidates=(),
            candidate="",
            built=None,
            trained=True,
        )

    def _training_ended(self, ep: Episode, event: TrainingDone | TrainingFailed) -> Step:
        if ep.stage is not Stage.TRAINING or event.training != ep.trainings:
            return ep, ()
        if isinstance(event, TrainingDone):
            if event.digest in ep.refused:
                return self._ask_for_more(ep, "training gave the bundle that was refused before")
            note = "comparing the trained bundle with what runs"
            return self._enter(ep, Stage.VALIDATING, note, candidate=event.digest)
        if event.unavailable:
            return self._without_catalogue(replace(ep, can_train=False), event.reason)
        return self._ask_for_more(ep, event.reason)

    def _ask_for_more(self, ep: Episode, reason: str) -> Step:
        refused = (*ep.refused, ep.candidate) if ep.candidate else ep.refused
        ep = replace(ep, refused=refused, needed=ep.labels + self.policy.more_labels)
        return self._without_catalogue(ep, reason)

    def _installing(
        self, ep: Episode, event: GenerationBuilt | InstallFailed | GenerationActivated
    ) -> Step:
        if ep.stage is not Stage.INSTALLED:
            return ep, ()
        match event:
            case GenerationBuilt(digest, number) if digest == ep.candidate and ep.built is None:
                after = replace(ep, built=number, note=f"activating generation {number}")
                return after, _stage_actions(after, self.policy, fresh=True)
            case InstallFailed(digest, reason) if digest == ep.candidate:
                if ep.trained:
                    return self._ask_for_more(ep, reason)
                return self._next_candidate(ep, reason, refuse=True)
            case GenerationActivated(number) if number == ep.built:
                source = "trained here" if ep.trained else "from the catalogue"
                return self._close(
                    ep, f"generation {number} runs with bundle {ep.candidate[:12]} {source}"
                )
        return ep, ()

    def _enter(self, ep: Episode, stage: Stage, note: str, **changes: Any) -> Step:
        after = replace(ep, stage=stage, note=note, **changes)
        after = replace(after, history=self._history(after, note))
        return after, _stage_actions(after, self.policy, fresh=True)

    def _close(self, ep: Episode, outcome: str, *actions: Action) -> Step:
        after, _ = self._enter(ep, Stage.CLOSED, outcome, outcome=outcome, candidates=())
        return after, actions

    def _history(self, ep: Episode, note: str) -> tuple[Moment, ...]:
        return (*ep.history, Moment(self.now, ep.stage, note))[-MAX_HISTORY:]


def _waiting_note(ep: Episode) -> str:
    aligned = "" if ep.aligned is None else "aligned, "
    shown = ", ".join(group.sample_ids[0] for group in ep.groups[:3] if group.sample_ids)
    if not ep.can_train:
        return f"{aligned}waiting for a catalogue bundle (this device does not train)"
    said = f"waiting for labels: {ep.labels} of {ep.needed} labelled samples since the shift"
    return f"{aligned}{said}" + (f"; new classes, look at samples {shown}" if shown else "")
