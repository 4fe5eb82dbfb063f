"""Carries out what the episode asks for and what the operator wants; the only one to do so.

One thread takes in every event (alarms, labels, messages, results of work) and alone changes what
runs: it saves the episode, then acts. Heavy work runs on one worker thread and training in another
process, so that an operator's command is obeyed at once. The agent's other threads only post.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from edge_agent import episode_events as ev
from edge_agent.agent import Agent
from edge_agent.alignment import MIN_SAMPLES
from edge_agent.config import Config
from edge_agent.diagnosis import healthy_in_a_row
from edge_agent.episode import Episode, Policy, Stage, open_episode
from edge_agent.episode_actions import RETRY_S, EpisodeActions, job_name
from edge_agent.episode_steps import resume, step
from edge_agent.event_loop import EventLoop
from edge_agent.learner import Learner, Outcome
from edge_agent.obedience import Obedience
from edge_agent.report import alarm_status, build_report, episode_status
from edge_agent.sync import SyncClient
from ood.alarm import Alarm
from ood.errors import DriftkeelError

_POLL_SAMPLES_S: Final = 0.1
_PROGRESS_EVERY_S: Final = 2.0
_CANCEL_WITHIN_S: Final = 30.0
_GATHER_LABELS_S: Final = 0.05
# One in ten samples of the known world looks this foreign.
_FOREIGN_P: Final = 0.1

log = logging.getLogger(__name__)


class Conductor:
    """The device's will.

    Args:
        agent: The agent; its generations are changed through here only.
        config: The whole configuration.
        report_every_s: Seconds between two reports when nothing changes.
        trainer_command: The trainer's command line, without the job; the default is this Python's.
        clock: Unix time.
    """

    def __init__(
        self,
        agent: Agent,
        config: Config,
        *,
        report_every_s: float = 10.0,
        trainer_command: Sequence[str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._agent = agent
        self._config = config
        self._report_every_s = report_every_s
        self._clock = clock
        self._loop = EventLoop("conductor")
        self._post, self._after = self._loop.post, self._loop.after
        command = {} if trainer_command is None else {"command": trainer_command}
        self._learner = Learner(
            agent.state.path / "training",
            lambda outcome: self._post(lambda: self._trained(outcome)),
            threads=config.learner.threads,
            max_seconds=config.learner.max_seconds,
            **command,
        )
        self._obedience = Obedience(agent, tell=self._tell, after=self._after, report=self._report)
        saved = [Episode.from_dict(values) for values in agent.state.episodes.list()]
        self._episode = max(saved, key=lambda e: e.number, default=None)
        self._trainings = sum(episode.trainings for episode in saved)
        self._policy = Policy(
            min_labels=config.learner.min_labels,
            online=config.mqtt is not None,
            can_train=config.learner.enabled,
            min_similarity=config.search.min_similarity,
            more_labels=max(16, config.learner.min_labels // 2),
            align_samples=MIN_SAMPLES if config.learner.align else None,
            diagnose=True,
        )
        self._labels_due = self._samples_due = False
        self._progress: Mapping[str, Any] = {}
        self._problem = ""
        self._sync: SyncClient | None = None
        if config.mqtt is not None:
            self._sync = SyncClient(
                config.mqtt,
                device=config.agent.device,
                encoder=agent.package.digest,
                public_key=config.catalogue.public_key,
                state=agent.state,
                post=self._post,
                after=self._after,
                on_connected=self._report,
                on_desired=self._obedience.take,
                clock=clock,
            )

        self._actions = EpisodeActions(
            agent,
            config,
            self._policy,
            self._learner,
            self._sync,
            current=lambda: self._episode,
            apply=self._apply,
            post=self._post,
            after=self._after,
            trouble=self._trouble,
            clock=clock,
        )

    def start(self) -> None:
        """Carry on with the open episode and the operator's last wish; begin to listen."""
        self._agent.on_alarm(lambda alarm, seq: self._post(lambda: self._alarmed(alarm, seq)))
        self._agent.on_feedback(lambda: self._post(self._labelled))
        self._agent.on_activated(lambda _: self._post(self._report))
        self._agent.conductor_status = self.status
        self._agent.conductor_cancel = self.cancel_training
        self._post(self._resume)
        self._loop.start()
        if self._sync is not None:
            self._sync.start()

    def stop(self) -> None:
        """Stop everything it started; what was under way is carried on with at the next start."""
        self._agent.conductor_status = self._agent.conductor_cancel = None
        if self._sync is not None:
            self._sync.stop()
        self._loop.stop()
        self._actions.close()
        self._learner.stop()

    def status(self) -> dict[str, Any]:
        """What the device is about to do and what it waits for, as JSON-able values."""
        episode, desired = self._episode, self._obedience.desired
        # The episode is durable; the agent's own memory of the alarm is not.
        opened = {} if episode is None else {"last_alarm": alarm_status(episode)}
        return {
            **opened,
            "episode": None if episode is None else episode_status(episode),
            "trainings": self._trainings,
            "training": self._learner.progress(),
            "pinned": desired.pinned,
            "desired_version": desired.version,
            "problem": self._problem or desired.problem,
            "sync": None if self._sync is None else self._sync.status(),
        }

    def cancel_training(self) -> bool:
        """End the training under way, now; its episode waits for more labels.

        Returns:
            Whether there was one.
        """
        cancelled: Future[bool] = Future()
        self._post(lambda: cancelled.set_result(self._cancel_training()))
        return cancelled.result(timeout=_CANCEL_WITHIN_S)

    # On the loop's thread ------------------------------------------------------------------------

    def _resume(self) -> None:
        self._protect_labels()
        self._obedience.resume()
        if self._episode is not None and self._episode.open:
            log.info("carrying on with episode %d: %s", self._episode.number, self._episode.stage)
            for action in resume(self._episode, self._policy):
                self._actions.act(self._episode, action)
            self._labelled()
        if self._episode is not None:
            self._actions.explain(self._episode)
        self._watch_samples()
        self._periodic_search()
        self._periodic_report()
        self._watch_training()

    # Events --------------------------------------------------------------------------------------

    def _alarmed(self, alarm: Alarm, seq: int) -> None:
        if self._episode is not None and self._episode.open:
            return
        serving = self._agent.serving
        if serving is None:
            return
        seq = seq or max((row.seq for row in self._agent.state.journal.recent(1)), default=1)
        episode = open_episode(
            1 if self._episode is None else self._episode.number + 1,
            now=self._clock(),
            alarm_seq=seq,
            onset_seq=max(1, seq - (alarm.at - alarm.onset)),
            generation=serving.number,
            pinned=self._obedience.desired.pinned,
            policy=self._policy,
        )
        if self._save(episode, lambda: self._alarmed(alarm, seq)):
            log.warning("episode %d: suspected since sample %d", episode.number, episode.onset_seq)
            self._learner.discard()
            self._labelled()
            self._watch_samples()

    def _apply(self, number: int, event: ev.Event) -> None:
        """Give an event to the episode of that number, save it, act."""
        episode = self._episode
        if episode is None or episode.number != number or not episode.open:
            return
        after, actions = step(episode, event, now=self._clock(), policy=self._policy)
        if after != episode:
            if not self._save(after, lambda: self._apply(number, event)):
                return
            self._trainings += after.trainings - episode.trainings
            if after.stage is not episode.stage:
                level = logging.ERROR if after.stage is Stage.SENSOR_FAULT else logging.INFO
                log.log(level, "episode %d: %s (%s)", number, after.stage, after.note)
        for action in actions:
            self._actions.act(after, action)
        self._actions.explain(after)
        self._watch_samples()
        if not after.open:
            self._tidy()
        elif after.stage is Stage.CONFIRMED and after.stage is not episode.stage:
            self._labelled()

    def _save(self, episode: Episode, again: Callable[[], None]) -> bool:
        try:
            self._agent.state.episodes.save(episode.to_dict())
        except (DriftkeelError, OSError) as error:
            self._trouble(f"the episode cannot be saved: {error}")
            self._after(RETRY_S, again)
            return False
        self._problem = ""
        self._episode = episode
        self._protect_labels()
        self._report()
        return True

    def _protect_labels(self) -> None:
        """Labelled samples of an open episode stay in the journal, whatever else comes."""
        episode = self._episode
        held = episode is not None and episode.open
        since = episode.onset_seq - 1 if episode and held else None
        self._agent.recorder.protect_since_seq = since

    def _tidy(self) -> None:
        """After an episode: no jobs, and no generations and bundles beyond what is kept."""
        self._learner.discard()
        offered = [] if self._sync is None else self._sync.offered()
        try:
            self._agent.state.generations.prune(protect_blobs=offered)
        except (DriftkeelError, OSError) as error:
            self._trouble(f"old generations cannot be removed: {error}")

    def _trouble(self, problem: str) -> None:
        self._problem = problem
        log.warning("%s", problem)
        self._report()

    def _watch_samples(self) -> None:
        """While the episode waits for samples, look for new ones."""
        waits = self._episode is not None and self._episode.awaits_samples
        if waits and not self._samples_due:
            self._samples_due = True
            self._after(_POLL_SAMPLES_S, self._count_samples)

    def _count_samples(self) -> None:
        self._samples_due = False
        episode = self._episode
        if episode is None or not episode.awaits_samples:
            return
        try:
            if episode.stage is Stage.SENSOR_FAULT:
                most = self._policy.healthy_frames
                healthy = healthy_in_a_row(self._agent.state.journal, episode.onset_seq, most)
                self._apply(episode.number, ev.FramesSeen(healthy))
                return
            p_values = self._agent.state.journal.p_values(since_seq=episode.onset_seq - 1)
            later = p_values[episode.alarm_seq - episode.onset_seq + 1 :]
            foreign = sum(p_value <= _FOREIGN_P for p_value in later)
            self._apply(episode.number, ev.SamplesSeen(len(later), foreign, len(p_values)))
        finally:
            self._watch_samples()

    def _labelled(self) -> None:
        """Many labels arrive at once; count them once."""
        if not self._labels_due:
            self._labels_due = True
            self._after(_GATHER_LABELS_S, self._count_labels)

    def _count_labels(self) -> None:
        self._labels_due = False
        episode = self._episode
        if episode is not None and episode.open:
            count = self._agent.state.journal.count_labelled(since_seq=episode.onset_seq - 1)
            self._apply(episode.number, ev.LabelsAvailable(count))

    def _periodic_search(self) -> None:
        episode = self._episode
        try:
            if episode is not None and episode.open:
                self._apply(episode.number, ev.SearchDue())
        finally:
            self._after(self._config.search.repeat_s, self._periodic_search)

    def _trained(self, outcome: Outcome) -> None:
        episode = self._episode
        if episode is None or outcome.name != job_name(episode):
            return
        number, training = episode.number, episode.trainings
        if outcome.bundle is None:
            failed = ev.TrainingFailed(training, outcome.reason, outcome.unavailable)
            self._apply(number, failed)
            return
        try:
            digest = self._agent.state.blobs.put(outcome.bundle)
        except (DriftkeelError, OSError) as error:
            self._trouble(f"the trained bundle cannot be kept: {error}")
            self._after(RETRY_S, lambda: self._trained(outcome))
            return
        self._apply(number, ev.TrainingDone(training, digest))

    def _cancel_training(self) -> bool:
        episode = self._episode
        if episode is None or episode.stage is not Stage.TRAINING:
            return False
        log.info("episode %d: the operator cancels its training", episode.number)
        self._apply(episode.number, ev.TrainingCancelled(episode.trainings))
        return True

    def _watch_training(self) -> None:
        """While a training runs, tell of its progress when there is some."""
        try:
            progress = self._learner.progress()
            if progress != self._progress:
                self._progress = progress
                self._report()
        finally:
            self._after(_PROGRESS_EVERY_S, self._watch_training)

    # Telling -------------------------------------------------------------------------------------

    def _tell(self, event: ev.Event) -> None:
        if self._episode is not None:
            self._apply(self._episode.number, event)

    def _periodic_report(self) -> None:
        try:
            self._report()
        finally:
            self._after(self._report_every_s, self._periodic_report)

    def _report(self) -> None:
        if self._sync is None or not self._sync.connected:
            return
        report = build_report(
            self._agent,
            self._obedience.desired,
            self._episode,
            sequence=self._sync.next_sequence(),
            device=self._config.agent.device,
            problem=self._problem,
            training=self._learner.progress(),
        )
        if report is not None:
            self._sync.report(report)
