"""What a device owes and what it has already acted on; both survive everything but the disk.

A message stays in the outbox until the other side acknowledges it by id. MQTT clients do not keep
their queues over a restart; this does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine, delete, func, select, update

from adapter_store.database import reading, transaction
from adapter_store.models import InboxRow, OutboxRow

_FIRST_RETRY_S = 2.0
_LAST_RETRY_S = 300.0
_INBOX_KEPT = 10_000


@dataclass(frozen=True)
class Owed:
    """One message in the outbox."""

    id: str
    kind: str
    message: bytes
    attempts: int


@dataclass(frozen=True)
class Counts:
    """How much is owed.

    Attributes:
        owed: Messages not acknowledged.
        unsent: Those among them that never went out.
        most_attempts: How often the most stubborn one went out.
    """

    owed: int
    unsent: int
    most_attempts: int


class Outbox:
    """Messages that must arrive.

    Args:
        engine: The device's database.
        jitter: Gives a number in [0, 1) that spreads retries.
    """

    def __init__(self, engine: Engine, *, jitter: Callable[[], float]) -> None:
        self._engine = engine
        self._jitter = jitter

    def put(self, message_id: str, message: bytes, kind: str, *, key: str | None = None) -> None:
        """Keep a message until it is acknowledged.

        Args:
            message_id: Its id on the wire; putting the same id again changes nothing.
            message: The encoded message.
            kind: What it is, for people.
            key: Messages with one key replace each other: only the newest is owed.

        Raises:
            DiskFullError: It was not kept.
        """
        with transaction(self._engine) as session:
            if session.scalar(select(OutboxRow.id).where(OutboxRow.id == message_id)):
                return
            if key is not None:
                session.execute(delete(OutboxRow).where(OutboxRow.key == key))
            session.add(
                OutboxRow(
                    id=message_id, kind=kind, key=key, message=message, attempts=0, next_at=0.0
                )
            )

    def due(self, now: float, limit: int = 16) -> list[Owed]:
        """The messages to send now, in the order they were put.

        Args:
            now: Unix time; a clock that was set back does not hold a message longer than one wait.
            limit: At most so many.
        """
        query = (
            select(OutboxRow)
            .where((OutboxRow.next_at <= now) | (OutboxRow.next_at > now + _LAST_RETRY_S))
            .order_by(OutboxRow.position)
            .limit(limit)
        )
        with reading(self._engine) as session:
            return [
                Owed(row.id, row.kind, row.message, row.attempts) for row in session.scalars(query)
            ]

    def sent(self, message_id: str, now: float) -> None:
        """Note that a message went out; it is due again later, each time after a longer while."""
        with transaction(self._engine) as session:
            row = session.scalar(select(OutboxRow).where(OutboxRow.id == message_id))
            if row is not None:
                wait = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(row.attempts, 30))
                row.attempts += 1
                row.next_at = now + wait * (0.5 + 0.5 * self._jitter())

    def retry_all(self) -> None:
        """Make everything due at once, as after a reconnection."""
        with transaction(self._engine) as session:
            session.execute(update(OutboxRow).values(next_at=0.0))

    def acknowledged(self, message_id: str) -> bool:
        """Forget a message that arrived; False when it was not owed (any more)."""
        with transaction(self._engine) as session:
            row = session.scalar(select(OutboxRow).where(OutboxRow.id == message_id))
            if row is None:
                return False
            session.delete(row)
            return True

    def counts(self) -> Counts:
        """What is owed now."""
        sent, attempts = OutboxRow.attempts > 0, OutboxRow.attempts
        query = select(func.count(), func.count().filter(sent), func.max(attempts))
        with reading(self._engine) as session:
            owed, tried, most = session.execute(query.select_from(OutboxRow)).one()
        return Counts(owed=owed, unsent=owed - tried, most_attempts=most or 0)

    def messages(self) -> list[Owed]:
        """Everything owed, due or not, in the order it was put."""
        with reading(self._engine) as session:
            rows = session.scalars(select(OutboxRow).order_by(OutboxRow.position))
            return [Owed(row.id, row.kind, row.message, row.attempts) for row in rows]

    def __len__(self) -> int:
        with reading(self._engine) as session:
            return session.scalar(select(func.count()).select_from(OutboxRow)) or 0


class Inbox:
    """The ids of the newest messages that were acted on.

    Args:
        engine: The device's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def seen(self, message_id: str) -> bool:
        """Whether an id was noted before."""
        with reading(self._engine) as session:
            return bool(session.scalar(select(InboxRow.id).where(InboxRow.id == message_id)))

    def first_time(self, message_id: str) -> bool:
        """Note an id, after its message was acted on; False when it was noted before."""
        with transaction(self._engine) as session:
            if session.scalar(select(InboxRow.id).where(InboxRow.id == message_id)):
                return False
            row = InboxRow(id=message_id)
            session.add(row)
            session.flush()
            session.execute(delete(InboxRow).where(InboxRow.position <= row.position - _INBOX_KEPT))
            return True
