"""Carries out an episode's actions: searches, pulls, trials, trainings, builds, activations.

The conductor owns it and calls it on its own thread; heavy work goes to one worker thread and comes
back as a posted event. Every action may be repeated: what was done already is found and used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from adapter_store.errors import DiskFullError
from edge_agent import diagnosis
from edge_agent import episode_events as ev
from edge_agent import episode_work as work
from edge_agent.agent import Agent
from edge_agent.config import Config
from edge_agent.episode import Episode, Policy, Stage
from edge_agent.episode_steps import resume
from edge_agent.explain import explain
from edge_agent.learner import Learner
from edge_agent.sync import SyncClient
from ood.errors import DriftkeelError

RETRY_S: Final = 5.0

log = logging.getLogger(__name__)


class EpisodeActions:
    """The hands of the conductor.

    Args:
        agent: The agent.
        config: The whole configuration.
        policy: The numbers episodes go by.
        learner: Runs trainings.
        sync: The catalogue's client; None on a device without a broker.
        current: Gives the episode as it stands.
        apply: Takes in an event for the episode of that number; on the conductor's thread.
        post: Runs a function on the conductor's thread.
        after: Runs a function there some seconds later.
        trouble: Told what keeps an action from being carried out for now.
        clock: Unix time.
    """

    def __init__(
        self,
        agent: Agent,
        config: Config,
        policy: Policy,
        learner: Learner,
        sync: SyncClient | None,
        *,
        current: Callable[[], Episode | None],
        apply: Callable[[int, ev.Event], None],
        post: Callable[[Callable[[], None]], None],
        after: Callable[[float, Callable[[], None]], None],
        trouble: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._agent = agent
        self._config = config
        self._policy = policy
        self._learner = learner
        self._sync = sync
        self._current = current
        self._apply = apply
        self._post = post
        self._after = after
        self._trouble = trouble
        self._clock = clock
        self._closed = False
        self._explaining = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="conductor-work")

    def close(self) -> None:
        """Let the work in progress end; take no more."""
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def act(self, episode: Episode, action: ev.Action) -> None:
        """Begin an action; what comes of it is applied as an event, now or later."""
        number = episode.number
        match action:
            case ev.Diagnose():
                self._diagnose(episode)
            case ev.Search():
                self._search(episode)
            case ev.Pull(candidate):
                self._pull(episode, candidate)
            case ev.Try(candidate):
                self._try(episode, candidate)
            case ev.Train():
                self._train(episode)
            case ev.Validate(digest):
                self._validate(episode, digest)
            case ev.Build(digest, trained):
                self._build(episode, digest, trained=trained)
            case ev.Align():
                self._align(episode)
            case ev.Activate(generation, digest, trained):
                self._activate(number, generation, digest, trained=trained)
            case ev.Cancel():
                if self._sync is not None:
                    self._sync.cancel()
                self._learner.discard()

    def explain(self, episode: Episode) -> None:
        """Explain an episode to the catalogue, once: when its kind is known or it is over.

        It is made from the journal, so one that was missed before a restart is made after it.
        """
        sync, number, agent = self._sync, episode.number, self._agent
        if sync is None or number <= max(sync.last_explained, self._explaining):
            return
        if episode.open and not episode.kind:
            return
        self._explaining = number

        def failed(reason: str) -> None:
            log.warning("episode %d cannot be explained: %s", number, reason)
            self._noting(lambda: sync.explained(number))

        self._work(
            episode,
            lambda: explain(
                agent.state,
                number,
                parts=agent.package.manifest.feature_parts,
                alarm=self._config.alarm,
            ),
            lambda found: self._noting(lambda: sync.explain(found)),
            failed,
            wanted=lambda: True,
        )

    def _noting(self, note: Callable[[], None]) -> None:
        """Write down what became of an explanation, however long the disk is full."""
        try:
            note()
        except (DriftkeelError, OSError) as error:
            self._trouble(str(error))
            self._after(RETRY_S, lambda: self._noting(note))

    def _diagnose(self, episode: Episode) -> None:
        def failed(reason: str) -> None:
            why = (f"what kind of shift this is could not be told: {reason}",)
            self._apply(episode.number, ev.Diagnosed("unclear", 0.5, why))

        self._work(
            episode,
            lambda: diagnosis.diagnosed(self._agent, episode),
            lambda found: self._apply(episode.number, found),
            failed,
        )

    def _search(self, episode: Episode) -> None:
        number = episode.number

        def ask(found: bytes) -> None:
            sync, serving = self._sync, self._agent.serving
            if sync is None or serving is None or not sync.connected:
                self._apply(number, ev.SearchFailed("the catalogue cannot be reached"))
                return
            search = self._config.search
            exclude = sorted({*episode.refused, *serving.bundles})
            sync.search(
                found,
                exclude=exclude[:1000],
                limit=search.limit,
                timeout_s=search.timeout_s,
                done=lambda event: self._apply(number, event),
            )

        def failed(reason: str) -> None:
            self._apply(number, ev.SearchFailed(reason))

        self._work(episode, lambda: work.search_signature(self._agent, episode), ask, failed)

    def _pull(self, episode: Episode, candidate: ev.CandidateRef) -> None:
        number, digest = episode.number, candidate.digest
        if self._agent.state.blobs.has(digest):
            self._apply(number, ev.CandidatePulled(digest))
        elif self._sync is None:
            self._apply(number, ev.CandidateFailed(digest, "offline", for_good=False))
        else:
            self._sync.pull(candidate, done=lambda event: self._apply(number, event))

    def _try(self, episode: Episode, candidate: ev.CandidateRef) -> None:
        digest = candidate.digest

        def verdict(accepted: bool, reason: str) -> None:
            self._apply(episode.number, ev.TrialVerdict(digest, accepted, reason))

        self._work(
            episode,
            lambda: work.try_candidate(self._agent, self._config, episode, candidate),
            lambda result: verdict(result.accepted, result.reason),
            lambda reason: verdict(accepted=False, reason=reason),
        )

    def _train(self, episode: Episode) -> None:
        name = job_name(episode)
        now = self._clock()

        def prepare() -> None:
            work.prepare_training(
                self._agent, self._config, self._learner, episode, name=name, now=now
            )

        def begin(_: None) -> None:
            current = self._current()
            if (
                current is not None
                and current.stage is Stage.TRAINING
                and job_name(current) == name
            ):
                self._learner.start(name)
            elif current is None or current.stage is Stage.WAITING_FOR_LABELS:
                # Cancelled while the job was being written.
                self._learner.discard()

        def failed(reason: str) -> None:
            self._apply(episode.number, ev.TrainingFailed(episode.trainings, reason))

        self._learner.discard(keep=name)
        self._work(episode, prepare, begin, failed)

    def _validate(self, episode: Episode, digest: str) -> None:
        def verdict(passed: bool, reason: str) -> None:
            self._apply(episode.number, ev.ValidationVerdict(digest, passed, reason))

        self._work(
            episode,
            lambda: work.validate_trained(
                self._agent, self._learner, episode, name=job_name(episode), digest=digest
            ),
            lambda result: verdict(result.accepted, result.reason),
            lambda reason: verdict(passed=False, reason=reason),
        )

    def _build(self, episode: Episode, digest: str, *, trained: bool) -> None:
        source = "trained here" if trained else "pulled from the catalogue"
        number = episode.number
        self._work(
            episode,
            lambda: work.build(
                self._agent,
                self._learner,
                episode,
                name=job_name(episode),
                digest=digest,
                trained=trained,
                reason=f"episode {number}: bundle {digest[:12]} {source}; {episode.note}",
            ),
            lambda made: self._apply(number, ev.GenerationBuilt(digest, made.number)),
            lambda reason: self._apply(number, ev.InstallFailed(digest, reason)),
        )

    def _align(self, episode: Episode) -> None:
        def tried(number: int | None, reason: str) -> None:
            self._apply(episode.number, ev.AlignmentTried(number, reason))

        self._work(
            episode,
            lambda: work.align(self._agent, episode),
            lambda result: tried(*result),
            lambda reason: tried(None, reason),
        )

    def _activate(self, number: int, generation: int, digest: str, *, trained: bool) -> None:
        try:
            self._agent.activate(generation)
            if trained and self._sync is not None:
                self._sync.offer(digest)
        except (DiskFullError, OSError) as error:
            self._later(number, error, ev.Activate(generation, digest, trained))
        except DriftkeelError as error:
            self._apply(number, ev.InstallFailed(digest, str(error)))
        else:
            self._apply(number, ev.GenerationActivated(generation))

    def _later(self, number: int, error: Exception, action: ev.Action) -> None:
        def again() -> None:
            episode = self._current()
            if (
                episode is not None
                and episode.number == number
                and action in resume(episode, self._policy)
            ):
                self.act(episode, action)

        self._trouble(str(error))
        self._after(RETRY_S, again)

    def _work(
        self,
        episode: Episode,
        task: Callable[[], Any],
        done: Callable[[Any], None],
        failed: Callable[[str], None],
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        """Run ``task`` on the worker; its end comes back to this thread.

        A disk that is full or failing says nothing about the task: it is tried again while it is
        wanted, by default while the episode stands where it stood.
        """

        def stands() -> bool:
            current = self._current()
            return current is not None and (current.number, current.stage, current.candidate) == (
                episode.number,
                episode.stage,
                episode.candidate,
            )

        def retry() -> None:
            if (wanted or stands)():
                self._work(episode, task, done, failed, wanted)

        def failing(error: Exception) -> None:
            self._trouble(str(error))
            self._after(RETRY_S, retry)

        def run() -> None:
            try:
                result = task()
            except (DiskFullError, OSError) as error:
                self._post(partial(failing, error))
            except DriftkeelError as error:
                self._post(partial(failed, str(error)))
            except Exception as error:
                # A fault met with one candidate ends its trial, not the device.
                log.exception("work for episode %d failed", episode.number)
                self._post(partial(failed, repr(error)))
            else:
                self._post(partial(done, result))

        if not self._closed:
            self._worker.submit(run)


def job_name(episode: Episode) -> str:
    """The name of the training an episode is at."""
    return f"episode-{episode.number:06d}-{episode.trainings}"
