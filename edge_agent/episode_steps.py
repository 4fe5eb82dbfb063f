"""What follows from what in an episode, as a pure state machine.

:func:`step` takes one event and returns the next episode and the actions to carry out,
:func:`resume` gives the actions to repeat after a restart. The conductor saves every episode before
it acts, and every action may be repeated without harm. Nothing here reads a clock, a file or a
socket.

The stages::

    suspected -> confirmed -> seeking -> trial ----------------------> installed -> closed
        |                        |         |                              ^
      closed      | closed       +---------+--> waiting_for_labels        |
    ("passed")    | ("prior                |      |  ^ (and searches on)  |
                  |  change")              +--> training --> validating --+
             sensor_fault -> closed ("healthy again")

A confirmed episode is diagnosed (`ood.kinds`) before anything is done about it. A broken sensor is
told of and waited for: nothing is searched, aligned, trained or installed. Other proportions of
known classes close it. Aligning is tried unless the classes are surely new.

A bundle is installed only after its checks (a trial when it came from the catalogue, a
validation when it was trained here). While it waits for labels, the features of the new domain may
be aligned with those of the known one: that generation runs for the time being, and the episode
goes on waiting. A training that is cancelled is not started again before more labels have come.
While the operator has pinned the device, events are still taken in but no action is given out;
unpinning gives the actions of the stage reached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from edge_agent.episode import Episode, Moment, Policy, Stage
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

MAX_HISTORY: Final = 64
# Aligning that has not helped with so many samples is not tried with more.
ALIGN_LIMIT: Final = 1024
# From this confidence on nobody doubts that classes are new, and aligning is not tried.
SURELY_NEW: Final = 0.9


Step = tuple[Episode, tuple[Action, ...]]


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
            case "new classes" if found.confidence >= SURELY_NEW:
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
