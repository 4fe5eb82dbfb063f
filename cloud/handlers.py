"""What devices say, and what the catalogue answers; no socket, no thread.

A device is who its topic says it is, whatever the message claims; the broker's access rules keep
it to its own topic. Every handler may see a message twice: registering, reporting and searching
again change nothing, and an offer is known by its digest. Acknowledgements leave after the commit.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any, Final

import msgspec
from sqlalchemy import select

from adapter_store import wire
from adapter_store.errors import StoreError, WireError
from adapter_store.transfer import Sender
from cloud.complaints import Complaints
from cloud.explanations import keep
from cloud.models import BundleRow
from cloud.printable import printable
from cloud.store import OK, Store
from cloud.uploads import Replies, Uploads, made_for
from cloud.views import APPROVED, desired_of
from ood.errors import OodError
from ood.signature import Signature

# A report with a lower number than the newest is late if the newest came this recently; otherwise
# the device has lost its state and counts from the beginning again.
_LATE_S: Final = 60.0
_ONLINE: Final = b"online"
_OFFLINE: Final = (b"offline", b"")

log = logging.getLogger(__name__)


class Handlers:
    """Acts on messages from devices.

    Args:
        store: The catalogue's state.
        uploads: Receives bundles.
        complaints: Told what is refused.
        min_similarity: Candidates less similar than this are not offered.
    """

    def __init__(
        self, store: Store, uploads: Uploads, complaints: Complaints, *, min_similarity: float
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._complaints = complaints
        self._min_similarity = min_similarity
        self._sender = Sender(store.blobs.get)
        self.counters: Counter[str] = Counter()

    def received(self, topic: str, payload: bytes, now: float) -> Replies:
        """Act on one message; whatever it is, it ends here.

        Args:
            topic: Where it came from.
            payload: Its bytes.
            now: A monotonic time.

        Returns:
            What to send, and to whom. Nothing, when the database or the disk fails: the device
            repeats what it gets no answer to.
        """
        try:
            device = wire.device_of(topic)
        except WireError as error:
            self._refuse(topic, topic, error, now)
            return []
        message: wire.UpMessage | None = None
        try:
            if topic == wire.presence_topic(device):
                return self._presence(device, payload, now)
            message = wire.decode_up(payload)
            self.counters[f"messages_{type(message).__name__.lower()}"] += 1
            return self._dispatch(device, message, now)
        except WireError as error:
            self._refuse(device, topic, error, now)
            if message is None:
                return []
            return [(device, wire.Ack(of=message.id, ok=False, reason=str(error)[:2000]))]
        except StoreError as error:
            self.counters["messages_failed"] += 1
            log.warning("a message of %s has to come again: %s", device, error)
            return []

    def _dispatch(self, device: str, message: wire.UpMessage, now: float) -> Replies:
        match message:
            case wire.Register():
                return self._register(device, message, now)
            case wire.Report():
                return self._report(device, message, now)
            case wire.Search():
                return [(device, self._search(message))]
            case wire.Offer():
                return self._uploads.offered(device, message, now)
            case wire.Explained():
                return self._explained(device, message)
            case wire.Get():
                return [(device, self._get(message))]
            case wire.Chunk():
                return self._uploads.chunk(device, message, now)
            case wire.Missing():
                return self._uploads.missing(device, message, now)
            case wire.Ack():
                # Nothing is owed to a device that its next report does not settle.
                return []

    def _presence(self, device: str, payload: bytes, now: float) -> Replies:
        if payload != _ONLINE and payload not in _OFFLINE:
            raise WireError(f"presence is {payload[:40]!r}, neither online nor offline")
        self.counters["messages_presence"] += 1
        with self._store.writing() as session:
            row = self._store.device_row(session, device)
            row.online = payload == _ONLINE
            if row.online:
                row.last_seen = self._store.clock()
        return self._uploads.device_is_back(device, now) if payload == _ONLINE else []

    def _register(self, device: str, message: wire.Register, now: float) -> Replies:
        _check_speaker(device, message.device)
        with self._store.writing() as session:
            row = self._store.device_row(session, device)
            if row.encoder not in ("", message.encoder):
                self._store.audit(
                    session,
                    who=device,
                    action="register",
                    subject=device,
                    outcome=OK,
                    detail=f"encoder {row.encoder[:12]} became {message.encoder[:12]}",
                )
            row.encoder, row.software = message.encoder, printable(message.software)
            row.online, row.last_seen = True, self._store.clock()
            # No report of an earlier connection can follow this; the device may begin anew.
            row.report_sequence = 0
            desired = desired_of(row)
        return [
            (device, desired),
            (device, wire.Ack(of=message.id)),
            *self._uploads.device_is_back(device, now),
        ]

    def _report(self, device: str, message: wire.Report, now: float) -> Replies:
        _check_speaker(device, message.device)
        numbers = [*message.counters.values(), *(g.created_at for g in message.generations)]
        if not all(map(math.isfinite, numbers)):
            raise WireError("the report holds a number that is NaN or infinite")
        with self._store.writing() as session:
            row = self._store.device_row(session, device)
            at = self._store.clock()
            row.online, row.last_seen = True, at
            late = message.sequence < row.report_sequence and abs(at - row.reported_at) < _LATE_S
            if late:
                self.counters["reports_late"] += 1
            else:
                row.report_sequence, row.reported_at = message.sequence, at
                row.report = msgspec.json.encode(message).decode()
            behind = message.desired_version < row.desired_version
            desired = desired_of(row)
        return [
            *([(device, desired)] if behind else []),
            (device, wire.Ack(of=message.id)),
            *self._uploads.device_is_back(device, now),
        ]

    def _explained(self, device: str, message: wire.Explained) -> Replies:
        with self._store.writing() as session:
            self._store.device_row(session, device)
            keep(session, device, message.explanation, self._store.clock())
        return [(device, wire.Ack(of=message.id))]

    def _search(self, message: wire.Search) -> wire.SearchResult:
        try:
            wanted = Signature.from_bytes(message.signature)
        except OodError as error:
            raise WireError(f"the search's signature cannot be used: {error}") from error
        if not made_for(wanted, message.encoder):
            raise WireError("the search's signature was made for another encoder")
        hits = self._store.signatures.search(
            wanted,
            limit=message.limit,
            min_similarity=self._min_similarity,
            statuses=(APPROVED,),
            exclude=message.exclude,
        )
        query = select(BundleRow.digest, BundleRow.statement, BundleRow.statement_signature).where(
            BundleRow.digest.in_([hit.key for hit in hits]),
            BundleRow.status == APPROVED,
            BundleRow.encoder == message.encoder,
        )
        with self._store.reading() as session:
            signed = {digest: pair for digest, *pair in session.execute(query)}
        candidates = []
        for hit in hits:
            # One that was retired a moment ago has no statement any more.
            statement, by = signed.get(hit.key, (None, None))
            if statement is not None and by is not None:
                candidates.append(
                    wire.Candidate(statement=statement, signature=by, similarity=hit.similarity)
                )
        return wire.SearchResult(of=message.id, candidates=candidates)

    def _get(self, wanted: wire.Get) -> wire.Chunk | wire.Missing:
        with self._store.reading() as session:
            status = session.scalar(
                select(BundleRow.status).where(BundleRow.digest == wanted.digest)
            )
        if status != APPROVED:
            reason = f"it is {status}" if status else "there is no such bundle"
            return wire.Missing(digest=wanted.digest, reason=reason)
        answer = self._sender.answer(wanted)
        if isinstance(answer, wire.Missing):
            self.counters["bundles_unreadable"] += 1
            log.error("bundle %s cannot be served: %s", wanted.digest[:12], answer.reason)
        return answer

    def _refuse(self, device: str, topic: str, error: Exception, now: float) -> None:
        self.counters["messages_refused"] += 1
        self._complaints.note(device, "message", topic, str(error), now)

    def statistics(self) -> dict[str, Any]:
        """What was counted since the start, by kind."""
        return dict(self.counters + self._uploads.counters)


def _check_speaker(device: str, claimed: str) -> None:
    if claimed != device:
        raise WireError(f"device {device} speaks in the name of {claimed!r}")
