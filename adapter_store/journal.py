"""The journal: every answered sample, the labels that came later, and the alarm's state.

Written on the hot path, one transaction a request, from any thread. It is also the device's buffer:
the newest samples keep their image and features, which is what trials and training use.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, delete, func, insert, select, update

from adapter_store.database import reading, transaction
from adapter_store.errors import UnknownSampleError
from adapter_store.labels import check_label
from adapter_store.models import EpisodeRow, SampleRow, SettingRow

_ALARM_STATE = "alarm_state"
# A row without image and features is small: keep the log this many times longer than the buffer.
_LOG_FACTOR = 50

# Built once: this is the hot path, and the ORM's unit of work would double its cost.
_LAST_SEQ = select(func.max(SampleRow.seq))
_INSERT = insert(SampleRow.__table__)  # type: ignore[arg-type]
_PUT_STATE = insert(SettingRow.__table__).prefix_with("OR REPLACE")  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """One answered sample.

    Attributes:
        id: Its name towards whoever sent it.
        at: When it was answered, seconds since the epoch.
        generation: Which generation answered.
        label: The answer.
        probability: The answer's probability.
        adapter: Digest of the bundle that decided; None for the base.
        score: OOD score.
        p_value: Conformal p-value of the score.
        features: Base features, float16 [d]; None once pruned.
        image: What training needs of the image, encoded; None once pruned or never kept.
        true_label: What it really was, when somebody said.
        labelled_at: When somebody said.
        seq: Its position in the journal, from 1; 0 before it is recorded.
        frame: Facts of its pixels, packed by `ood.frames`; None where none were noted.
    """

    id: str
    at: float
    generation: int
    label: str
    probability: float
    adapter: str | None
    score: float
    p_value: float
    features: NDArray[np.float16] | None
    image: bytes | None
    true_label: str | None = None
    labelled_at: float | None = None
    seq: int = 0
    frame: bytes | None = None


@dataclass(frozen=True)
class ScoredSample:
    """What is left of a sample when its features are gone: place, name, answer, score, p-value."""

    seq: int
    id: str
    label: str
    score: float
    p_value: float


class Journal:
    """The samples of one device.

    Args:
        engine: The device's database.
        durable: The same database, opened so that a commit survives a power cut: labels go
            through it, since somebody was told that they are kept.
        clock: Seconds since the epoch.
    """

    def __init__(
        self, engine: Engine, durable: Engine, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._durable = durable
        self._clock = clock

    def record(
        self, samples: Sequence[SampleRecord], alarm_state: dict[str, Any] | None
    ) -> list[int]:
        """Write samples and the state the alarm is in after them, all or nothing.

        Returns:
            Each sample's position in the journal.

        Raises:
            DiskFullError: Nothing was written.
        """
        rows = [
            {
                "id": s.id,
                "at": s.at,
                "generation": s.generation,
                "label": s.label,
                "probability": s.probability,
                "adapter": s.adapter,
                "score": s.score,
                "p_value": s.p_value,
                "features": None if s.features is None else s.features.astype("<f2").tobytes(),
                "image": s.image,
                "frame": s.frame,
            }
            for s in samples
        ]
        with transaction(self._engine) as session:
            connection = session.connection()
            seqs = []
            if rows:
                # Pruning never takes the newest row, so its number only grows.
                first = (connection.execute(_LAST_SEQ).scalar() or 0) + 1
                seqs = list(range(first, first + len(rows)))
                connection.execute(
                    _INSERT, [row | {"seq": seq} for row, seq in zip(rows, seqs, strict=True)]
                )
            if alarm_state is not None:
                state = {"key": _ALARM_STATE, "value": json.dumps(alarm_state)}
                connection.execute(_PUT_STATE, state)
        return seqs

    def alarm_state(self) -> dict[str, Any] | None:
        """The alarm's state after the last recorded sample."""
        with reading(self._engine) as session:
            row = session.get(SettingRow, _ALARM_STATE)
            return None if row is None else json.loads(row.value)

    def feedback(self, sample_id: str, label: str) -> None:
        """Note what a sample really was; saying it again changes nothing, otherwise the last wins.

        Raises:
            UnknownSampleError: The journal has no such sample, or no longer.
            LabelError: The label is empty, too long or not printable.
            DiskFullError: The label was not kept.
        """
        check_label(label)
        with transaction(self._durable) as session:
            row = session.scalar(select(SampleRow).where(SampleRow.id == sample_id))
            if row is None:
                raise UnknownSampleError(
                    f"no sample {sample_id[:80]!r} in the journal; use the sample_id that "
                    "/v1/predict answered, before it is pruned"
                )
            if row.true_label != label:
                row.true_label, row.labelled_at = label, self._clock()

    def get(self, sample_id: str) -> SampleRecord:
        """One sample.

        Raises:
            UnknownSampleError: The journal has no such sample.
        """
        with reading(self._engine) as session:
            row = session.scalar(select(SampleRow).where(SampleRow.id == sample_id))
            if row is None:
                raise UnknownSampleError(f"no sample {sample_id[:80]!r} in the journal")
            return _record(row)

    def recent(self, n: int, *, since_seq: int = 0) -> list[SampleRecord]:
        """The newest n samples after a position that still have features, oldest first."""
        return self._newest(n, SampleRow.seq > since_seq, SampleRow.features.is_not(None))

    def labelled(self, *, since_seq: int = 0) -> list[SampleRecord]:
        """The labelled samples after a position that still have features, oldest first."""
        return self._newest(
            None,
            SampleRow.seq > since_seq,
            SampleRow.true_label.is_not(None),
            SampleRow.features.is_not(None),
        )

    def count_labelled(self, *, since_seq: int = 0) -> int:
        """How many samples after a position have a label."""
        with reading(self._engine) as session:
            return (
                session.scalar(
                    select(func.count())
                    .select_from(SampleRow)
                    .where(SampleRow.seq > since_seq, SampleRow.true_label.is_not(None))
                )
                or 0
            )

    def p_values(self, *, since_seq: int = 0) -> list[float]:
        """The p-values of the samples after a position, oldest first."""
        with reading(self._engine) as session:
            query = select(SampleRow.p_value).where(SampleRow.seq > since_seq)
            return list(session.scalars(query.order_by(SampleRow.seq)))

    def scores(self, generation: int, *, until_seq: int, newest: int) -> list[ScoredSample]:
        """What a generation said of its samples up to a position, oldest first.

        Args:
            generation: Its number.
            until_seq: The last position.
            newest: At most so many, the newest.
        """
        query = (
            select(SampleRow.seq, SampleRow.id, SampleRow.label, SampleRow.score, SampleRow.p_value)
            .where(SampleRow.generation == generation, SampleRow.seq <= until_seq)
            .order_by(SampleRow.seq.desc())
            .limit(newest)
        )
        with reading(self._engine) as session:
            return [ScoredSample(*row) for row in session.execute(query)][::-1]

    def frames(self, *, since_seq: int = 0, newest: int | None = None) -> list[bytes]:
        """The facts of the frames after a position, oldest first; those without any left out.

        Args:
            since_seq: The position.
            newest: At most so many, the newest; all when absent.
        """
        query = select(SampleRow.frame).where(
            SampleRow.seq > since_seq, SampleRow.frame.is_not(None)
        )
        query = query.order_by(SampleRow.seq.desc())
        with reading(self._engine) as session:
            rows = session.scalars(query if newest is None else query.limit(newest))
            return [frame for frame in rows if frame is not None][::-1]

    def prune(self, max_samples: int, *, protect_since_seq: int | None = None) -> None:
        """Keep images and features of the newest samples only, and the log 50 times longer.

        Labelled samples of an open episode keep theirs in any case: it may still train on them.

        Args:
            max_samples: How many keep their image and features.
            protect_since_seq: Labelled samples from this one on keep theirs too.

        Raises:
            DiskFullError: Nothing was removed.
        """
        with transaction(self._engine) as session:
            newest = session.scalar(select(func.max(SampleRow.seq))) or 0
            onset = session.scalar(select(func.min(EpisodeRow.onset_seq)).where(EpisodeRow.open))
            starts = [seq for seq in (onset, protect_since_seq) if seq is not None]
            old = SampleRow.seq <= newest - max_samples
            if starts:
                old &= SampleRow.true_label.is_(None) | (SampleRow.seq < min(starts))
            session.execute(
                update(SampleRow)
                .where(old, SampleRow.features.is_not(None))
                .values(features=None, image=None)
                .execution_options(synchronize_session=False)
            )
            session.execute(
                delete(SampleRow)
                .where(
                    SampleRow.seq <= newest - _LOG_FACTOR * max(1, max_samples),
                    SampleRow.features.is_(None),
                )
                .execution_options(synchronize_session=False)
            )

    def _newest(self, n: int | None, *conditions: Any) -> list[SampleRecord]:
        query = select(SampleRow).where(*conditions).order_by(SampleRow.seq.desc())
        with reading(self._engine) as session:
            rows = session.scalars(query if n is None else query.limit(n))
            return [_record(row) for row in rows][::-1]


def _record(row: SampleRow) -> SampleRecord:
    return SampleRecord(
        id=row.id,
        at=row.at,
        generation=row.generation,
        label=row.label,
        probability=row.probability,
        adapter=row.adapter,
        score=row.score,
        p_value=row.p_value,
        features=None if row.features is None else np.frombuffer(row.features, dtype="<f2"),
        image=row.image,
        true_label=row.true_label,
        labelled_at=row.labelled_at,
        seq=row.seq,
        frame=row.frame,
    )
