"""The catalogue's core: what it knows and decides; no socket, no thread, no clock of its own.

`cloud.service` hands it what devices say and sends what it answers; `cloud.api` hands it what
operators want. A device is who its topic says it is, whatever the message claims.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import Engine, delete, func, select
from sqlalchemy.orm import Session

from adapter_store import wire
from adapter_store.blobs import BlobStore
from adapter_store.bundle import Bundle, unpack
from adapter_store.database import transaction
from adapter_store.errors import BundleError, StoreError
from adapter_store.trust import CatalogueKey, Statement
from cloud.errors import ConflictError, NotFoundError
from cloud.models import AuditRow, BundleRow, DeviceRow, UploadRow
from ood.errors import OodError
from ood.signature import Signature, similarity

CANDIDATE: Final = "candidate"
APPROVED: Final = "approved"
QUARANTINED: Final = "quarantined"
RETIRED: Final = "retired"
STATUSES: Final = (CANDIDATE, APPROVED, QUARANTINED, RETIRED)
_AUDIT_KEPT: Final = 100_000


class Catalogue:
    """Devices, bundles and the audit log.

    Args:
        engine: The catalogue's database.
        blobs: Where bundles are kept.
        key: Signs what devices may install.
        min_similarity: Candidates less similar than this are not offered.
        max_bundle_bytes: Larger uploads are refused.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        engine: Engine,
        blobs: BlobStore,
        key: CatalogueKey,
        *,
        min_similarity: float,
        max_bundle_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._key = key
        self._min_similarity = min_similarity
        self._max_bundle_bytes = max_bundle_bytes
        self._clock = clock
        # One writer at a time: operators and devices change the same rows.
        self._lock = threading.RLock()

    # What devices say ----------------------------------------------------------------------------

    def register(self, device: str, message: wire.Register) -> wire.Desired:
        """Note who came, and tell it what the operator wants."""
        with self._transaction() as session:
            row = self._device_row(session, device)
            row.encoder, row.software = message.encoder, message.software
            row.online, row.last_seen = True, self._clock()
            return _desired(row)

    def presence(self, device: str, *, online: bool) -> None:
        """Note that a device came or went."""
        with self._transaction() as session:
            row = self._device_row(session, device)
            row.online, row.last_seen = online, self._clock()

    def report(self, device: str, message: wire.Report) -> wire.Desired | None:
        """Keep the reported state; answers with the desired one when the device is behind it.

        A late report changes nothing. A device whose state was wiped counts its reports from the
        beginning again; it is recognised by an applied version of zero.
        """
        with self._transaction() as session:
            row = self._device_row(session, device)
            row.online, row.last_seen = True, self._clock()
            late = message.sequence < row.report_sequence and message.desired_version != 0
            if not late:
                row.report_sequence = message.sequence
                row.report = msgspec.json.encode(message).decode()
            behind = message.desired_version < row.desired_version
            return _desired(row) if behind and not late else None

    def search(self, device: str, message: wire.Search) -> wire.SearchResult:
        """The approved bundles nearest to a signature, for the device's encoder.

        Raises:
            StoreError: The signature is not one.
        """
        del device
        try:
            wanted = Signature.from_bytes(message.signature)
        except OodError as error:
            raise StoreError(f"the search's signature is unusable: {error}") from error
        with self._transaction() as session:
            rows = session.scalars(
                select(BundleRow).where(
                    BundleRow.status == APPROVED,
                    BundleRow.encoder == message.encoder,
                    BundleRow.digest.not_in(message.exclude),
                )
            )
            hits = []
            for row in rows:
                near = similarity(wanted, Signature.from_bytes(row.signature))
                if near >= self._min_similarity and row.statement and row.statement_signature:
                    hits.append((near, row.digest, row.statement, row.statement_signature))
        hits.sort(key=lambda hit: (-hit[0], hit[1]))
        return wire.SearchResult(
            of=message.id,
            candidates=[
                wire.Candidate(statement=blob, signature=signed, similarity=min(1.0, near))
                for near, _, blob, signed in hits[: message.limit]
            ],
        )

    def offered(self, device: str, message: wire.Offer) -> wire.OfferResult | None:
        """Decide about an offer: None means that the bundle shall be pulled."""
        with self._transaction() as session:
            self._device_row(session, device).last_seen = self._clock()
            if session.get(BundleRow, message.digest) is not None:
                return wire.OfferResult(digest=message.digest, stored=True)
            if message.size_bytes > self._max_bundle_bytes or message.size_bytes < 1:
                reason = f"{message.size_bytes} bytes are over {self._max_bundle_bytes}"
                self._audit(session, device, "upload", message.digest, "refused", reason)
                return wire.OfferResult(digest=message.digest, stored=False, reason=reason)
            session.merge(
                UploadRow(digest=message.digest, device=device, size_bytes=message.size_bytes)
            )
            return None

    def uploads(self) -> list[tuple[str, str, int]]:
        """Digest, device and size of every upload under way."""
        with self._transaction() as session:
            return [(r.digest, r.device, r.size_bytes) for r in session.scalars(select(UploadRow))]

    def uploaded(self, device: str, digest: str, data: bytes) -> wire.OfferResult:
        """Check a bundle that arrived whole, and keep it as a candidate."""
        try:
            bundle = unpack(data)
            self._blobs.put(data)
        except BundleError as error:
            return self.upload_refused(device, digest, str(error))
        with self._transaction() as session:
            if session.get(BundleRow, digest) is None:
                session.add(self._bundle_row(device, digest, data, bundle))
                detail = f"{len(data)} bytes, {bundle.manifest.task}"
                self._audit(session, device, "upload", digest, "ok", detail)
            session.execute(delete(UploadRow).where(UploadRow.digest == digest))
        return wire.OfferResult(digest=digest, stored=True)

    def upload_refused(self, device: str, digest: str, reason: str) -> wire.OfferResult:
        """End an upload for good."""
        with self._transaction() as session:
            session.execute(delete(UploadRow).where(UploadRow.digest == digest))
            self._audit(session, device, "upload", digest, "refused", reason)
        return wire.OfferResult(digest=digest, stored=False, reason=reason[:2000])

    def may_have(self, digest: str) -> bool:
        """Whether devices may have a bundle."""
        with self._transaction() as session:
            row = session.get(BundleRow, digest)
            return row is not None and row.status == APPROVED

    def read(self, digest: str) -> bytes:
        """The bytes of a bundle.

        Raises:
            StoreError: It is not here, or damaged.
        """
        return self._blobs.get(digest)

    def suspicious(self, device: str, what: str) -> None:
        """Put a message that was refused into the audit log."""
        with self._transaction() as session:
            self._audit(session, device, "message", device, "refused", what)

    # What operators want -------------------------------------------------------------------------

    def devices(self) -> list[dict[str, Any]]:
        """Every device, by name."""
        with self._transaction() as session:
            rows = session.scalars(select(DeviceRow).order_by(DeviceRow.name))
            return [_device(row) for row in rows]

    def device(self, name: str) -> dict[str, Any]:
        """One device.

        Raises:
            NotFoundError: No such device ever came.
        """
        with self._transaction() as session:
            return _device(self._known(session, name))

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
        with self._transaction() as session:
            return [self._adapter(session, row) for row in session.scalars(query)]

    def adapter(self, prefix: str) -> dict[str, Any]:
        """One bundle, by the beginning of its digest.

        Raises:
            NotFoundError: None begins so, or several do.
        """
        with self._transaction() as session:
            return self._adapter(session, self._bundle(session, prefix))

    def set_status(self, who: str, prefix: str, status: str, reason: str = "") -> dict[str, Any]:
        """Approve, quarantine or retire a bundle.

        Raises:
            NotFoundError: No such bundle.
            ConflictError: It may not go from its status to that one.
        """
        action = {APPROVED: "approve", QUARANTINED: "quarantine", RETIRED: "retire"}[status]
        with self._audited(who, action, prefix), self._transaction() as session:
            row = self._bundle(session, prefix)
            if row.status == RETIRED and status != RETIRED:
                raise ConflictError(f"adapter {row.digest[:12]} is retired and stays so")
            row.status = status
            if status == APPROVED:
                row.statement, row.statement_signature = self._key.sign(self._statement(row))
            else:
                row.statement = row.statement_signature = None
            self._audit(session, who, action, row.digest, "ok", reason)
            return self._adapter(session, row)

    def roll_back(self, who: str, name: str, to: int | None) -> tuple[dict[str, Any], wire.Desired]:
        """Want a device to run an earlier (or any other) generation, and to stay there.

        Raises:
            NotFoundError: No such device.
            ConflictError: The device does not report such a generation.
        """
        with self._audited(who, "rollback", name), self._transaction() as session:
            row = self._known(session, name)
            report = _report(row)
            if report is None:
                raise ConflictError(f"device {name} has not reported yet what it runs")
            numbers = [g.number for g in report.generations]
            if to is None:
                older = [number for number in numbers if number < report.generation]
                if not older:
                    raise ConflictError(
                        f"device {name} runs generation {report.generation} and has no older one"
                    )
                to = max(older)
            if to not in numbers:
                have = ", ".join(map(str, numbers)) or "none"
                raise ConflictError(f"device {name} has no generation {to}; it reports {have}")
            return self._want(session, who, "rollback", row, generation=to, pinned=True)

    def pin(self, who: str, name: str) -> tuple[dict[str, Any], wire.Desired]:
        """Want a device to stay with the generation it runs.

        Raises:
            NotFoundError: No such device.
            ConflictError: The device has not reported what it runs.
        """
        with self._audited(who, "pin", name), self._transaction() as session:
            row = self._known(session, name)
            report = _report(row)
            if report is None:
                raise ConflictError(f"device {name} has not reported yet what it runs")
            running = report.generation
            return self._want(session, who, "pin", row, generation=running, pinned=True)

    def unpin(self, who: str, name: str) -> tuple[dict[str, Any], wire.Desired]:
        """Let a device choose its generation again.

        Raises:
            NotFoundError: No such device.
        """
        with self._audited(who, "unpin", name), self._transaction() as session:
            row = self._known(session, name)
            return self._want(session, who, "unpin", row, generation=None, pinned=False)

    def log(self, limit: int = 50, after: int = 0) -> list[dict[str, Any]]:
        """The newest entries of the audit log, oldest first."""
        query = (
            select(AuditRow)
            .where(AuditRow.number > after)
            .order_by(AuditRow.number.desc())
            .limit(limit)
        )
        with self._transaction() as session:
            rows = list(session.scalars(query))
        names = ("number", "at", "who", "action", "subject", "outcome", "detail")
        return [{name: getattr(row, name) for name in names} for row in reversed(rows)]

    # Parts ---------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with self._lock, transaction(self._engine) as session:
            yield session

    @contextmanager
    def _audited(self, who: str, action: str, subject: str) -> Iterator[None]:
        """Put an operator's action that is refused into the audit log, too."""
        try:
            yield
        except (NotFoundError, ConflictError) as error:
            with self._transaction() as session:
                self._audit(session, who, action, subject, "refused", str(error))
            raise

    def _audit(  # noqa: PLR0917 - the columns of the log, in their order
        self, session: Session, who: str, action: str, subject: str, outcome: str, detail: str = ""
    ) -> None:
        row = AuditRow(
            at=self._clock(),
            who=who[:200],
            action=action,
            subject=subject[:200],
            outcome=outcome,
            detail=detail[:2000],
        )
        session.add(row)
        session.flush()
        session.execute(delete(AuditRow).where(AuditRow.number <= row.number - _AUDIT_KEPT))

    def _device_row(self, session: Session, name: str) -> DeviceRow:
        row = session.get(DeviceRow, name)
        if row is None:
            now = self._clock()
            row = DeviceRow(
                name=name, encoder="", software="", online=False, first_seen=now, last_seen=now,
                desired_version=0, desired_pinned=False, report_sequence=0,
            )  # fmt: skip
            session.add(row)
            self._audit(session, name, "register", name, "ok", "first seen")
        return row

    def _known(self, session: Session, name: str) -> DeviceRow:
        row = session.get(DeviceRow, name)
        if row is None:
            known = ", ".join(session.scalars(select(DeviceRow.name).limit(20))) or "none yet"
            raise NotFoundError(f"no device {name!r}; known devices: {known}")
        return row

    def _bundle(self, session: Session, prefix: str) -> BundleRow:
        rows = list(
            session.scalars(
                select(BundleRow)
                .where(BundleRow.digest.startswith(prefix.lower(), autoescape=True))
                .limit(2)
            )
        )
        if not rows or not prefix:
            raise NotFoundError(f"no adapter begins with {prefix!r}; see `adapters`")
        if len(rows) > 1:
            raise NotFoundError(f"several adapters begin with {prefix!r}; give more characters")
        return rows[0]

    def _bundle_row(self, device: str, digest: str, data: bytes, bundle: Bundle) -> BundleRow:
        return BundleRow(
            digest=digest,
            size_bytes=len(data),
            encoder=bundle.manifest.encoder,
            family=bundle.manifest.family,
            status=CANDIDATE,
            uploaded_by=device,
            uploaded_at=self._clock(),
            manifest=msgspec.json.encode(bundle.manifest).decode(),
            signature=bundle.signature.to_bytes(),
        )

    def _statement(self, row: BundleRow) -> Statement:
        return Statement(
            digest=row.digest,
            size_bytes=row.size_bytes,
            encoder=row.encoder,
            family=row.family,
            labels=tuple(json.loads(row.manifest)["labels"]),
            status=row.status,
            issued_at=self._clock(),
        )

    def _want(
        self,
        session: Session,
        who: str,
        action: str,
        row: DeviceRow,
        *,
        generation: int | None,
        pinned: bool,
    ) -> tuple[dict[str, Any], wire.Desired]:
        # Above all that was reported: a database restored from a backup must not repeat itself.
        report = _report(row)
        applied = 0 if report is None else report.desired_version
        row.desired_version = max(row.desired_version, applied) + 1
        row.desired_generation, row.desired_pinned = generation, pinned
        detail = "" if generation is None else f"generation {generation}"
        self._audit(session, who, action, row.name, "ok", detail)
        return _device(row), _desired(row)

    def _adapter(self, session: Session, row: BundleRow) -> dict[str, Any]:
        manifest = json.loads(row.manifest)
        reports = (_report(d) for d in session.scalars(select(DeviceRow)))
        return {
            "digest": row.digest,
            "status": row.status,
            "size_bytes": row.size_bytes,
            "encoder": row.encoder,
            "family": row.family,
            "rank": manifest["rank"],
            "labels": manifest["labels"],
            "task": manifest["task"],
            "samples": manifest["samples"],
            "metrics": manifest.get("metrics", {}),
            "parents": manifest.get("parents", []),
            "uploaded_by": row.uploaded_by,
            "uploaded_at": row.uploaded_at,
            "run_by": sorted(r.device for r in reports if r and row.digest in _running_bundles(r)),
        }

    def counts(self) -> dict[str, int]:
        """How many devices, devices online, and bundles there are, for the metrics."""
        with self._transaction() as session:
            online = select(func.count()).select_from(DeviceRow).where(DeviceRow.online)
            return {
                "devices": session.scalar(select(func.count()).select_from(DeviceRow)) or 0,
                "devices_online": session.scalar(online) or 0,
                "adapters": session.scalar(select(func.count()).select_from(BundleRow)) or 0,
            }


def open_blobs(state_dir: Path) -> BlobStore:
    """The catalogue's bundles."""
    return BlobStore(state_dir / "blobs")


def _desired(row: DeviceRow) -> wire.Desired:
    return wire.Desired(
        version=row.desired_version, generation=row.desired_generation, pinned=row.desired_pinned
    )


def _report(row: DeviceRow) -> wire.Report | None:
    return None if row.report is None else msgspec.json.decode(row.report, type=wire.Report)


def _running_bundles(report: wire.Report) -> Sequence[str]:
    return next((g.bundles for g in report.generations if g.number == report.generation), [])


def _device(row: DeviceRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "online": row.online,
        "encoder": row.encoder,
        "software": row.software,
        "first_seen": row.first_seen,
        "last_seen": row.last_seen,
        "desired": {
            "version": row.desired_version,
            "generation": row.desired_generation,
            "pinned": row.desired_pinned,
        },
        "reported": None if row.report is None else json.loads(row.report),
    }
