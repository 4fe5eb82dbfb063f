"""What is kept of an answered sample: the shift detector sees it, the journal holds it.

The agent calls it for every batch, under its own lock. A journal that cannot be written is counted
and told of, and never stops an answer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from adapter_store.errors import StoreError
from adapter_store.journal import Journal, SampleRecord
from edge_agent.config import BufferSection
from edge_agent.metrics import Metrics
from edge_agent.serving import Answer, Inference, Serving
from edge_agent.snapshot import pack_snapshots
from ood.alarm import Alarm, AlarmState
from ood.errors import OodError
from ood.frames import frame_facts

_PRUNE_EVERY: Final = 256

log = logging.getLogger(__name__)


class Recorder:
    """Watches the answered samples for a shift and journals them.

    Args:
        journal: Holds them.
        buffer: How much is kept.
        metrics: What Prometheus scrapes.
        clock: Seconds since the epoch.

    Attributes:
        counters: ``alarms`` and ``journal_errors`` so far.
        last_alarm: When and where the newest alarm was, as JSON-able values; None before one.
        problem: Why the newest samples are not journalled; empty when they are.
        protect_since_seq: Set by the conductor; labelled samples after this position of the
            journal keep their images, however old.
    """

    def __init__(
        self,
        journal: Journal,
        buffer: BufferSection,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.last_alarm: dict[str, Any] | None = None
        self.problem = ""
        self.protect_since_seq: int | None = None
        self._journal = journal
        self._buffer = buffer
        self._metrics = metrics
        self._clock = clock
        self._since_prune = 0
        self._alarm_state: AlarmState | None = None

    def begin(self, serving: Serving) -> None:
        """Watch for a shift anew: another generation serves."""
        self._alarm_state = serving.detector.initial_state()

    def resume(self, serving: Serving) -> None:
        """Watch on from where the journal was left, if the same generation served then."""
        self.begin(serving)
        kept = self._journal.alarm_state() or {}
        if kept.get("generation") == serving.number:
            try:
                self._alarm_state = serving.detector.restore(kept["detector"])
            except (OodError, KeyError):
                log.warning("the journalled alarm state is unusable; detection starts anew")

    def record(
        self,
        serving: Serving,
        inference: Inference,
        answers: Sequence[Answer],
        images: NDArray[np.uint8],
    ) -> tuple[Alarm, int] | None:
        """Feed the shift detector and write the journal; a full disk never stops an answer.

        Args:
            serving: What answered.
            inference: What it computed.
            answers: What it answered, by sample.
            images: uint8 [n, s, s, 3], scaled to the encoder's input.

        Returns:
            An alarm, unless an episode is open already, and the journal's number of the sample
            that raised it (0 when that sample could not be journalled).
        """
        before = self._alarm_state or serving.detector.initial_state()
        after, alarm = serving.detector.update(before, inference.scores, inference.nearest)
        self._alarm_state = after
        seqs: Sequence[int] = ()
        try:
            seqs = self._journal.record(
                self._records(inference, answers, images),
                {"generation": serving.number, "detector": after.to_dict()},
            )
            self.problem = ""
            self._since_prune += len(seqs)
            if self._since_prune >= _PRUNE_EVERY:
                self._since_prune = 0
                self._journal.prune(
                    self._buffer.max_samples, protect_since_seq=self.protect_since_seq
                )
        except (StoreError, OSError, SQLAlchemyError) as error:
            self.counters["journal_errors"] += 1
            self._metrics.journal_errors.inc()
            if not self.problem:
                log.warning("samples are answered but not journalled: %s", error)
            self.problem = str(error)
        # While an episode is open the stream goes on alarming: that is the same shift.
        if alarm is None or self.protect_since_seq is not None:
            return None
        seq = seqs[alarm.at - before.seen - 1] if seqs else 0
        self.counters["alarms"] += 1
        self._metrics.alarms.inc()
        self.last_alarm = {"at": self._clock(), "generation": serving.number, "seq": seq}
        log.warning("the input has shifted (generation %d, sample %d)", serving.number, seq)
        return alarm, seq

    def _records(
        self, inference: Inference, answers: Sequence[Answer], images: NDArray[np.uint8]
    ) -> list[SampleRecord]:
        keeps = self._buffer.keep_images
        snapshots = pack_snapshots(images) if keeps else [None] * len(answers)
        now = self._clock()
        return [
            SampleRecord(
                id=answer.sample_id,
                at=now,
                generation=answer.generation,
                label=answer.label,
                probability=answer.probability,
                adapter=answer.adapter,
                score=answer.ood_score,
                p_value=answer.p_value,
                features=features.astype(np.float16),
                image=snapshot,
                frame=facts.to_bytes(),
            )
            for answer, features, snapshot, facts in zip(
                answers, inference.features, snapshots, frame_facts(images), strict=True
            )
        ]
