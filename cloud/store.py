"""What the catalogue keeps, as both of its sides use it: devices' messages and operators' commands.

Database, bundles and signing key behind one lock, so that the two sides never write at once; the
signatures that searches look through; the audit log; and a counter of changes that waits can
watch. Decides nothing.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from adapter_store.blobs import BlobStore
from adapter_store.database import reading, transaction
from adapter_store.trust import CatalogueKey
from cloud.models import AuditRow, DeviceRow
from cloud.printable import printable
from cloud.signatures import Signatures, changed_bundles

AUDIT_KEPT: Final = 100_000
OK: Final = "ok"
REFUSED: Final = "refused"


class Store:
    """The catalogue's durable state.

    Args:
        engine: Its database.
        blobs: Where bundles are kept.
        key: Signs what devices may install.
        clock: Unix time.
    """

    def __init__(
        self,
        engine: Engine,
        blobs: BlobStore,
        key: CatalogueKey,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.blobs = blobs
        self.key = key
        self.clock = clock
        self._engine = engine
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        # It begins elsewhere at each start, so that a watcher notices a restart.
        self._revision = secrets.randbits(40)
        self._closing = False
        self.signatures = Signatures()
        self.signatures.load(self.reading())

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction that writes; whoever waits for a change looks again afterwards.

        Raises:
            StoreError: It could not be written; nothing of it is kept.
        """
        with self._lock:
            with transaction(self._engine) as session:
                changed = changed_bundles(session)
                yield session
            self.signatures.put(changed.values())
        with self._changed:
            self._revision += 1
            self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view.

        Raises:
            StoreError: The database cannot be read.
        """
        with reading(self._engine) as session:
            yield session

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    # Waiting for changes -------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Another number after every change."""
        return self._revision

    @property
    def closing(self) -> bool:
        """Whether waiting is over because the process ends."""
        return self._closing

    def wait_change(self, revision: int, timeout_s: float) -> bool:
        """Wait until something is not as it was at a revision; False when nothing changed."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing or self._revision != revision, max(0.0, timeout_s)
            )

    def release(self) -> None:
        """End all waiting, now and later: the process is about to end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # Rows ----------------------------------------------------------------------------------------

    def audit(
        self, session: Session, *, who: str, action: str, subject: str, outcome: str, detail: str
    ) -> None:
        """Add an entry to the audit log, in the same transaction as what it tells of."""
        row = AuditRow(
            at=self.clock(),
            who=printable(who)[:200],
            action=action,
            subject=printable(subject)[:200],
            outcome=outcome,
            detail=printable(detail)[:2000],
        )
        session.add(row)
        session.flush()
        session.execute(delete(AuditRow).where(AuditRow.number <= row.number - AUDIT_KEPT))

    def log(self, limit: int = 50, after: int = 0) -> list[dict[str, Any]]:
        """The newest entries of the audit log, oldest first."""
        query = (
            select(AuditRow)
            .where(AuditRow.number > after)
            .order_by(AuditRow.number.desc())
            .limit(limit)
        )
        names = ("number", "at", "who", "action", "subject", "outcome", "detail")
        with self.reading() as session:
            rows = [{n: getattr(row, n) for n in names} for row in session.scalars(query)]
        return rows[::-1]

    def device_row(self, session: Session, name: str) -> DeviceRow:
        """A device's row; a device never heard of before gets one."""
        row = session.get(DeviceRow, name)
        if row is None:
            now = self.clock()
            row = DeviceRow(
                name=name,
                encoder="",
                software="",
                online=False,
                first_seen=now,
                last_seen=now,
                desired_version=0,
                desired_pinned=False,
                report_sequence=0,
                reported_at=0.0,
            )
            session.add(row)
            self.audit(
                session, who=name, action="register", subject=name, outcome=OK, detail="first seen"
            )
        return row
