"""The agent: one device's running whole, and the only object the other parts talk to.

Owns the state directory, the encoder's sessions and the generation that serves. The HTTP API
calls :meth:`Agent.predict` and :meth:`Agent.feedback`; the conductor builds, tries and
activates generations through it and hears of alarms from it. It starts no thread of its own
and never trains.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.generation import Generation
from adapter_store.state import StateDir
from adapter_store.wire import new_id
from edge_agent import freed_memory, installer
from edge_agent.alignment import Alignment
from edge_agent.batching import Batcher
from edge_agent.config import Config
from edge_agent.errors import NoGenerationError
from edge_agent.metrics import Metrics
from edge_agent.recorder import Recorder
from edge_agent.refusals import Refusals
from edge_agent.runtime_settings import resolved_for
from edge_agent.serving import Answer, Serving
from edge_agent.snapshot import scale_images
from exporter.package import EncoderPackage, default_encoder_package
from exporter.sessions import EncoderSessions
from ood.alarm import Alarm

AlarmObserver = Callable[[Alarm, int], None]
FeedbackObserver = Callable[[], None]
ActivatedObserver = Callable[[int], None]

_LATENCIES_KEPT: Final = 2048

log = logging.getLogger(__name__)


class Agent:
    """Serves one generation at a time and keeps what happened.

    Thread-safe: requests that wait at the same time are answered in one batch, one batch at a
    time, and a generation is switched between two batches. Observers run on whatever thread made
    the call; they must only note what happened and return.

    Args:
        config: The whole configuration.
        state: This device's opened (locked) state directory; :meth:`close` closes it.
        package: The frozen encoder.
        clock: Seconds since the epoch.

    Attributes:
        config: The whole configuration.
        serving: What answers right now; None before the first generation. Replaced whole.
        package: The frozen encoder's package.
        sessions: Its ONNX Runtime sessions, shared by every generation that makes them alike.
        runtime: How those are made, and why so.
        state: The state directory.
        metrics: What Prometheus scrapes.
        conductor_status: Set by the conductor; what it returns is merged into :meth:`status`.
        conductor_cancel: Set by the conductor; cancels the running training and says whether
            there was one.
        refusals: The frames that were no picture.
        recorder: Watches the answered samples for a shift and journals them.
    """

    def __init__(
        self,
        config: Config,
        state: StateDir,
        package: EncoderPackage,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.state = state
        self.package = package
        current = state.generations.current()
        self.runtime = resolved_for(config.agent, current)
        self.sessions = EncoderSessions(package, settings=self.runtime.settings)
        self.metrics = Metrics()
        self.serving: Serving | None = None
        self.conductor_status: Callable[[], Mapping[str, Any]] | None = None
        self.conductor_cancel: Callable[[], bool] | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._activation = threading.Lock()
        self._counting = threading.Lock()
        self._batcher: Batcher[NDArray[np.uint8], list[Answer]] = Batcher(
            self._answered, max_batch_s=config.http.max_batch_ms / 1000.0
        )
        self._alarm_observers: list[AlarmObserver] = []
        self._feedback_observers: list[FeedbackObserver] = []
        self._activated_observers: list[ActivatedObserver] = []
        self._counters: Counter[str] = Counter()
        self._passes = 0.0
        self._latencies_ms: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._swap_ms: float | None = None
        self.refusals = Refusals(clock)
        self.recorder = Recorder(state.journal, config.buffer, self.metrics, clock=clock)
        if current is not None:
            self.serving = self._serving_of(current, self.sessions)
            self.recorder.resume(self.serving)
            self.metrics.generation.set(current.number)
        freed_memory.give_back()

    @classmethod
    def open(cls, config: Config, *, clock: Callable[[], float] = time.time) -> Agent:
        """Lock the state directory, load the encoder and the current generation.

        Raises:
            StateLockedError: Another agent uses this state directory.
            EncoderError: The encoder package is damaged or missing.
            StoreError: The state cannot be read; nothing was changed.
        """
        state_dir = Path(config.agent.state_dir)
        state = StateDir(state_dir, keep_generations=config.generations.keep)
        try:
            return cls(config, state, open_encoder(config), clock=clock)
        except BaseException:
            state.close()
            raise

    def close(self) -> None:
        """Let the request in progress finish, then release the state directory."""
        with self._activation, self._lock:
            self.state.close()

    def on_alarm(self, observer: AlarmObserver) -> None:
        """Call ``observer(alarm, seq)`` when the input has shifted.

        ``seq`` is the journal's number of the sample that raised the alarm (0 when that
        sample could not be journalled).
        """
        self._alarm_observers.append(observer)

    def on_feedback(self, observer: FeedbackObserver) -> None:
        """Call ``observer()`` after every label that was stored."""
        self._feedback_observers.append(observer)

    def on_activated(self, observer: ActivatedObserver) -> None:
        """Call ``observer(number)`` after a generation started to serve."""
        self._activated_observers.append(observer)

    def predict(self, images: NDArray[np.uint8], *, probe: bool = False) -> list[Answer]:
        """Answer a batch and remember it.

        Args:
            images: uint8 [n, h, w, 3].
            probe: Answer only: not journalled, not counted as input by the shift detector.

        Returns:
            One answer a sample, in order.

        Raises:
            NoGenerationError: Nothing is installed yet.
            PreprocessError: The images cannot be used.
        """
        started = time.perf_counter()
        images = scale_images(images, self.package.image_size)
        answers = self._batcher(images, rows=len(images), kind=probe)
        with self._counting:
            self._count(answers, (time.perf_counter() - started) * 1000.0, probe=probe)
        return answers

    def _answered(
        self, requests: Sequence[NDArray[np.uint8]], probe: Hashable
    ) -> list[list[Answer]]:
        """Answer several requests in one batch, and remember their samples in that order."""
        images = np.concatenate(requests)
        alarmed: tuple[Alarm, int] | None = None
        with self._lock:
            serving = self.serving
            if serving is None:
                raise NoGenerationError(
                    "no generation is installed; give this device labelled samples with "
                    "`driftkeel agent fit --config FILE --data FILE.npz`"
                )
            inference = serving.infer(images)
            answers = [answer.named(new_id()) for answer in inference.answers]
            if not probe:
                self.refusals.end()
                alarmed = self.recorder.record(serving, inference, answers, images)
        if alarmed is not None:
            for observer in self._alarm_observers:
                observer(*alarmed)
        rest = iter(answers)
        return [list(islice(rest, len(request))) for request in requests]

    def feedback(self, sample_id: str, label: str) -> None:
        """Store the true label of a sample answered earlier; the same label twice is fine.

        Raises:
            UnknownSampleError: The journal does not (or no longer) hold that sample.
        """
        self.state.journal.feedback(sample_id, label)
        self._counters["feedback"] += 1
        self.metrics.feedback.inc()
        for observer in self._feedback_observers:
            observer()

    def build_generation(
        self,
        bundle_digests: Sequence[str],
        calibration_features: NDArray[np.floating[Any]],
        *,
        parent: int | None,
        reason: str,
        metrics: Mapping[str, float] | None = None,
        alignment: Alignment | None = None,
    ) -> Generation:
        """Check and write a generation beside the running one; it is not activated.

        Args:
            bundle_digests: Bundles already in the blob directory, in any order.
            calibration_features: Base features [m, d] of held-out, unshifted samples.
            parent: The generation this one was made from.
            reason: Why, for the operator.
            metrics: What was measured about it.
            alignment: What it does to the features of a shifted domain; None for nothing.

        Raises:
            InstallError: The candidate does not load or gives unusable outputs.
            BundleError: A bundle is damaged or for another encoder.
        """
        running = self.state.generations.current()
        return installer.build_generation(
            self.state,
            self.sessions,
            bundle_digests,
            calibration_features,
            parent=parent,
            reason=reason,
            metrics=metrics or {},
            settings=self._settings(),
            now=self._clock(),
            alignment=alignment,
            runtime=None if running is None else running.manifest.runtime,
        )

    def load_candidate(
        self,
        bundle_digests: Sequence[str],
        calibration_features: NDArray[np.floating[Any]],
        *,
        alignment: Alignment | None = None,
    ) -> Serving:
        """A serving whole in memory only, to be tried on samples; nothing is written.

        Raises:
            BundleError: A bundle is damaged or for another encoder.
        """
        return installer.load_serving(
            self.state.blobs.get,
            self.sessions,
            bundle_digests,
            calibration_features,
            number=0,
            settings=self._settings(),
            alignment=alignment,
        )

    def activate(self, number: int) -> None:
        """Switch to a generation on disk; requests wait for the pointer only, none is lost.

        The generation is loaded and checked beside the running one first. Activating the
        running generation does nothing.

        Raises:
            GenerationError: There is no such generation, or it is damaged.
            InstallError: It does not load or gives unusable outputs; the running one stays.
        """
        with self._activation:
            if self.serving is not None and self.serving.number == number:
                return
            generation = self.state.generations.get(number)
            runtime, sessions = resolved_for(self.config.agent, generation), self.sessions
            if runtime.settings != sessions.settings:
                sessions = EncoderSessions(self.package, settings=runtime.settings)
            serving = self._serving_of(generation, sessions)
            started = time.perf_counter()
            with self._lock:
                self.state.generations.activate(number)
                others = self.sessions is not sessions
                self.serving, self.sessions, self.runtime = serving, sessions, runtime
                self.recorder.begin(serving)
            self._swap_ms = (time.perf_counter() - started) * 1000.0
            self._counters["activations"] += 1
            self.metrics.generation.set(number)
            self.metrics.swap_seconds.set(self._swap_ms / 1000.0)
            if others:
                freed_memory.give_back()
            log.info("generation %d serves (switched in %.1f ms)", number, self._swap_ms)
        for observer in self._activated_observers:
            observer(number)

    def status(self) -> dict[str, Any]:
        """What runs and how it does, as JSON-able values."""
        with self._lock:
            serving, sessions, runtime = self.serving, self.sessions, self.runtime
            latencies = np.asarray(self._latencies_ms, dtype=np.float64)
            answered = self._counters["samples"] + self._counters["probes"]
            passes = self._passes / answered if answered else None
        p50, p99 = (
            (float(v) for v in np.percentile(latencies, (50, 99)))
            if latencies.size
            else (None, None)
        )
        counters = self._counters + self.recorder.counters
        counters["refused"] = self.refusals.count
        status: dict[str, Any] = {
            "device": self.config.agent.device,
            "encoder": {"name": self.package.name, "digest": self.package.digest},
            "generation": None if serving is None else serving.describe(),
            "runtime": runtime.describe(sessions.running()),
            "generations": self.generations(),
            "counters": {
                name: counters[name]
                for name in (
                    "requests",
                    "samples",
                    "probes",
                    "refused",
                    "feedback",
                    "alarms",
                    "activations",
                    "journal_errors",
                )
            },
            "latency_ms": {"p50": p50, "p99": p99},
            "passes_per_sample": passes,
            "swap_ms": self._swap_ms,
            "last_alarm": self.recorder.last_alarm,
            "journal_problem": self.recorder.problem,
            "sensor_problem": self.refusals.problem,
        }
        if self.conductor_status is not None:
            status.update(self.conductor_status())
        return status

    def generations(self) -> list[dict[str, Any]]:
        """Every generation on disk, oldest first; ``running`` is read from what runs."""
        running = None if self.serving is None else self.serving.number
        return [
            {
                "number": generation.number,
                "digest": generation.digest,
                "running": generation.number == running,
                "parent": generation.manifest.parent,
                "reason": generation.manifest.reason,
                "aligned": generation.manifest.aligned,
                "created_at": generation.manifest.created_at,
                "bundles": list(generation.manifest.bundles),
                "metrics": dict(generation.manifest.metrics),
            }
            for generation in self.state.generations.list()
        ]

    def _settings(self) -> installer.Settings:
        return installer.Settings(
            false_alarm_every=self.config.alarm.false_alarm_every,
            max_rounds=self.config.router.max_rounds,
            block=self.config.alarm.block,
            prior_changes=self.config.alarm.prior_changes,
            adapters_in_memory=self.config.router.adapters_in_memory,
        )

    def _serving_of(self, generation: Generation, sessions: EncoderSessions) -> Serving:
        return installer.load_generation(generation, sessions, settings=self._settings())

    def _count(self, answers: Sequence[Answer], elapsed_ms: float, *, probe: bool) -> None:
        self._counters["requests"] += 1
        self._counters["probes" if probe else "samples"] += len(answers)
        self._passes += sum(answer.passes for answer in answers)
        self._latencies_ms.append(elapsed_ms)
        self.metrics.observe(answers, elapsed_ms / 1000.0)


def open_encoder(config: Config) -> EncoderPackage:
    """The encoder package the configuration names.

    Raises:
        EncoderError: It is damaged or missing.
    """
    if config.agent.encoder == "default":
        return default_encoder_package(Path(config.agent.state_dir) / "encoder")
    return EncoderPackage.load(Path(config.agent.encoder))
