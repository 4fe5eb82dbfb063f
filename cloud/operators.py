"""What operators can ask of the catalogue; everything they try is in the audit log.

Called by `cloud.api`, on any thread. A change of what is wanted of a device is durable before the
device hears of it, and whether it was obeyed is read from the device's own report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from adapter_store import wire
from adapter_store.errors import StoreError
from adapter_store.trust import Statement
from cloud.errors import ConflictError, NotFoundError
from cloud.explanations import find
from cloud.models import BundleRow, DeviceRow
from cloud.store import OK, REFUSED, Store
from cloud.views import (
    APPROVED,
    QUARANTINED,
    RETIRED,
    STATUSES,
    adapter_view,
    desired_of,
    device_view,
    report_of,
    running_bundles,
)

LONGEST_WAIT_S: Final = 60.0
_STATUS_OF: Final = {"approve": APPROVED, "quarantine": QUARANTINED, "retire": RETIRED}
_MAX_VERSION: Final = 2**53 - 1

Push = Callable[[str, wire.Desired], bool]


class Operators:
    """The operators' side of the catalogue.

    Args:
        store: The catalogue's state.
        push: Tells a device at once what is wanted of it; False when it cannot be told now.
    """

    def __init__(self, store: Store, push: Push) -> None:
        self._store = store
        self._push = push

    # Looking -------------------------------------------------------------------------------------

    def devices(self) -> list[dict[str, Any]]:
        """Every device, by name."""
        with self._store.reading() as session:
            return [device_view(r) for r in session.scalars(select(DeviceRow).order_by("name"))]

    def device(self, name: str) -> dict[str, Any]:
        """One device.

        Raises:
            NotFoundError: No such device ever came.
        """
        with self._store.reading() as session:
            return device_view(_known(session, name))

    def explanation(self, name: str, episode: int) -> dict[str, Any]:
        """Why an episode of a device began.

        Raises:
            NotFoundError: No such device ever came, or it did not explain that episode.
        """
        with self._store.reading() as session:
            return find(session, _known(session, name).name, episode)

    def adapters(self, status: str | None = None) -> list[dict[str, Any]]:
        """The bundles, newest first.

        Raises:
            ConflictError: There is no such status.
        """
        if status is not None and status not in STATUSES:
            raise ConflictError(f"no status {status!r}; use one of {', '.join(STATUSES)}")
        query = select(BundleRow).order_by(BundleRow.uploaded_at.desc(), BundleRow.digest)
        if status is not None:
            query = query.where(BundleRow.status == status)
        with self._store.reading() as session:
            run_by = running_bundles(session.scalars(select(DeviceRow)))
            return [adapter_view(row, run_by) for row in session.scalars(query)]

    def adapter(self, prefix: str) -> dict[str, Any]:
        """One bundle, by the beginning of its digest.

        Raises:
            NotFoundError: None begins so, or several do.
        """
        with self._store.reading() as session:
            run_by = running_bundles(session.scalars(select(DeviceRow)))
            return adapter_view(_bundle(session, prefix), run_by)

    def log(self, limit: int = 50, after: int = 0) -> list[dict[str, Any]]:
        """The newest entries of the audit log, oldest first."""
        return self._store.log(limit, after)

    def counts(self) -> dict[str, int]:
        """How many devices, devices online, and adapters of each status there are."""
        by_status = select(BundleRow.status, func.count()).group_by(BundleRow.status)
        online = select(func.count()).select_from(DeviceRow).where(DeviceRow.online)
        with self._store.reading() as session:
            adapters = dict(iter(session.execute(by_status)))
            return {
                "devices": session.scalar(select(func.count()).select_from(DeviceRow)) or 0,
                "devices_online": session.scalar(online) or 0,
                **{f"adapters_{status}": adapters.get(status, 0) for status in STATUSES},
            }

    # Judging adapters ----------------------------------------------------------------------------

    def judge(self, who: str, action: str, prefix: str, reason: str = "") -> dict[str, Any]:
        """Approve, quarantine or retire a bundle.

        Args:
            who: The operator.
            action: ``approve``, ``quarantine`` or ``retire``.
            prefix: The beginning of the bundle's digest.
            reason: Kept in the audit log.

        Raises:
            NotFoundError: No such bundle, or several.
            ConflictError: It is retired, or damaged on the disk.
        """
        status = _STATUS_OF[action]
        with self._audited(who, action, prefix), self._store.writing() as session:
            row = _bundle(session, prefix)
            if row.status == RETIRED and status != RETIRED:
                raise ConflictError(f"adapter {row.digest[:12]} is retired and stays so")
            if status == APPROVED:
                self._check_blob(row.digest)
                row.statement, row.statement_signature = self._store.key.sign(
                    self._statement(row, status)
                )
            else:
                row.statement = row.statement_signature = None
            row.status = status
            run_by = running_bundles(session.scalars(select(DeviceRow)))
            self._done(session, who, action, row.digest, reason)
            return adapter_view(row, run_by)

    def _check_blob(self, digest: str) -> None:
        try:
            self._store.blobs.get(digest)
        except StoreError as error:
            raise ConflictError(f"adapter {digest[:12]} cannot be approved: {error}") from error

    def _statement(self, row: BundleRow, status: str) -> Statement:
        return Statement(
            digest=row.digest,
            size_bytes=row.size_bytes,
            encoder=row.encoder,
            family=row.family,
            labels=tuple(json.loads(row.manifest)["labels"]),
            status=status,
            issued_at=self._store.clock(),
        )

    # Steering devices ----------------------------------------------------------------------------

    def steer(
        self, who: str, action: str, name: str, *, to: int | None = None, wait_s: float = 0.0
    ) -> dict[str, Any]:
        """Change what is wanted of a device, tell it, and wait for what it reports.

        Args:
            who: The operator.
            action: ``rollback`` (to another generation, and stay there), ``pin`` (stay at the
                one that runs) or ``unpin`` (the device chooses again).
            name: The device.
            to: For ``rollback``, the generation; by default the one before the one that runs.
            wait_s: How long to wait for the device's report, 60 s at most.

        Returns:
            What is wanted, whether and when the device confirmed it, and a sentence about it.

        Raises:
            NotFoundError: No such device.
            ConflictError: The device does not report such a generation, or reported nothing yet.
        """
        begun = time.monotonic()
        with self._audited(who, action, name), self._store.writing() as session:
            row = _known(session, name)
            before = report_of(row)
            if action == "unpin":
                generation = None
            elif before is None:
                raise ConflictError(f"device {name} has not reported yet what it runs")
            else:
                generation = before.generation if action == "pin" else _target(before, to)
            # Above all that was reported: a database restored from a backup must not repeat itself.
            applied = 0 if before is None else before.desired_version
            row.desired_version = min(_MAX_VERSION, max(row.desired_version, applied) + 1)
            row.desired_generation, row.desired_pinned = generation, action != "unpin"
            detail = "" if generation is None else f"generation {generation}"
            self._done(session, who, action, name, detail)
            desired = desired_of(row)
        self._push(name, desired)
        after = self._wait(name, desired, begun + min(max(0.0, wait_s), LONGEST_WAIT_S))
        seconds = time.monotonic() - begun
        online = self.device(name)["online"]
        refusal = "" if after is None or _obeyed(after, desired) else after.problem
        return {
            "device": name,
            "action": action,
            "was": None if before is None else before.generation,
            "desired": {
                "version": desired.version,
                "generation": desired.generation,
                "pinned": desired.pinned,
            },
            "confirmed": after is not None,
            "confirmed_s": None if after is None else round(seconds, 4),
            "generation": None if after is None else after.generation,
            "online": online,
            "problem": refusal,
            "message": _outcome(
                name, before, after, seconds=seconds, online=online, refusal=refusal
            ),
        }

    def _wait(self, name: str, desired: wire.Desired, deadline: float) -> wire.Report | None:
        """The report that says what became of a wish; None when it did not come in time."""
        while True:
            revision = self._store.revision
            with self._store.reading() as session:
                report = report_of(_known(session, name))
            if report is not None and _answers(report, desired):
                return report
            left = deadline - time.monotonic()
            if left <= 0 or self._store.closing or not self._store.wait_change(revision, left):
                return None

    # The audit log -------------------------------------------------------------------------------

    @contextmanager
    def _audited(self, who: str, action: str, subject: str) -> Iterator[None]:
        """Put an action that is refused into the audit log, too."""
        try:
            yield
        except (NotFoundError, ConflictError) as error:
            with self._store.writing() as session:
                self._store.audit(
                    session,
                    who=who,
                    action=action,
                    subject=subject,
                    outcome=REFUSED,
                    detail=str(error),
                )
            raise

    def _done(self, session: Session, who: str, action: str, subject: str, detail: str) -> None:
        self._store.audit(
            session, who=who, action=action, subject=subject, outcome=OK, detail=detail
        )


def _known(session: Session, name: str) -> DeviceRow:
    row = session.get(DeviceRow, name)
    if row is None:
        query = select(DeviceRow.name).order_by(DeviceRow.name).limit(20)
        known = ", ".join(session.scalars(query)) or "none yet"
        raise NotFoundError(f"no device {name!r}; known devices: {known}")
    return row


def _bundle(session: Session, prefix: str) -> BundleRow:
    rows = list(
        session.scalars(
            select(BundleRow)
            .where(BundleRow.digest.startswith(prefix.lower(), autoescape=True))
            .order_by(BundleRow.digest)
            .limit(5)
        )
    )
    if not rows or not prefix:
        raise NotFoundError(f"no adapter's id begins with {prefix!r}; `adapters` lists them")
    if len(rows) > 1:
        begin = ", ".join(row.digest[: max(12, len(prefix) + 4)] for row in rows)
        raise NotFoundError(f"several adapters begin with {prefix!r}: {begin}; give more of the id")
    return rows[0]


def _target(report: wire.Report, to: int | None) -> int:
    """The generation to roll back to."""
    numbers = sorted(generation.number for generation in report.generations)
    if to is None:
        older = [number for number in numbers if number < report.generation]
        if not older:
            raise ConflictError(
                f"device {report.device} runs generation {report.generation} and keeps no older one"
            )
        return max(older)
    if to not in numbers:
        have = ", ".join(map(str, numbers)) or "none"
        raise ConflictError(f"device {report.device} has no generation {to}; it reports {have}")
    return to


def _answers(report: wire.Report, desired: wire.Desired) -> bool:
    """Whether a report says what became of a wish."""
    taken_in = report.desired_version >= desired.version
    return taken_in and (bool(report.problem) or _obeyed(report, desired))


def _obeyed(report: wire.Report, desired: wire.Desired) -> bool:
    """Whether a device does what it was told, or a newer wish replaced this one."""
    if report.desired_version != desired.version:
        return report.desired_version > desired.version
    right = desired.generation is None or report.generation == desired.generation
    return right and report.pinned == desired.pinned


def _outcome(
    name: str,
    before: wire.Report | None,
    after: wire.Report | None,
    *,
    seconds: float,
    online: bool,
    refusal: str,
) -> str:
    if after is None:
        state = "online but has not answered" if online else "offline"
        return f"{name} is {state}: not confirmed yet; it is told again when it next reports"
    if refusal:
        return f"{name} cannot: {refusal}; it runs generation {after.generation}"
    was = "" if before is None else f" (was {before.generation})"
    held = ", pinned" if after.pinned else ""
    return f"{name} runs generation {after.generation}{was}{held}, confirmed in {seconds:.2f} s"
