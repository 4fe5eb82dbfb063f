"""Bundles on their way from devices to the catalogue: who may send, what has come, what is kept.

An offer is written down and worked off: a few devices at a time, one bundle of each, in the order
they came. What arrived survives a restart, and a device that falls silent gives up its turn until
it is heard of again. Answers are returned, not sent; all calls come from one thread.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from adapter_store import wire
from adapter_store.bundle import Bundle, unpack
from adapter_store.errors import (
    BundleError,
    CorruptBundleError,
    StoreError,
    TransferError,
    WrongEncoderError,
)
from adapter_store.partial import Download, sweep
from cloud.complaints import Complaints
from cloud.models import BundleRow, DeviceRow, UploadRow
from cloud.store import OK, Store
from cloud.views import CANDIDATE
from ood.signature import Signature

Replies = list[tuple[str, wire.DownMessage]]

_PER_DEVICE: Final = 32
_ALTOGETHER: Final = 1000
_SILENCE_S: Final = 30.0
_TRY_AGAIN_S: Final = 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Upload:
    """One offered bundle; it has a ``download`` while it is its turn."""

    device: str
    digest: str
    size_bytes: int
    download: Download | None = None
    heard_at: float = 0.0
    # Its device fell silent: it waits until the device is heard of again.
    waits_for_device: bool = False
    not_before: float = 0.0
    # Other devices that offered the same bundle meanwhile: they hear of it when it is stored.
    others: set[str] = field(default_factory=set)


class Uploads:
    """Receives what devices offer.

    Args:
        store: Where whole bundles go.
        incoming: The directory of partial ones.
        complaints: Told what is refused.
        max_bundle_bytes: Larger offers are refused.
        max_concurrent: Bundles on their way at once; the others wait.
    """

    def __init__(
        self,
        store: Store,
        incoming: Path,
        complaints: Complaints,
        *,
        max_bundle_bytes: int,
        max_concurrent: int,
    ) -> None:
        self._store = store
        self._incoming = incoming
        self._complaints = complaints
        self._max_bundle_bytes = max_bundle_bytes
        self._max_concurrent = max_concurrent
        self._rng = random.Random()
        self.counters: Counter[str] = Counter()
        with store.reading() as session:
            self._all = {
                row.digest: _Upload(row.device, row.digest, row.size_bytes)
                for row in session.scalars(select(UploadRow).order_by(UploadRow.offered_at))
            }
        sweep(incoming, keep=self._all.keys())

    def progress(self) -> list[dict[str, object]]:
        """Every upload that is not whole yet."""
        return [
            {
                "digest": upload.digest,
                "device": upload.device,
                "size_bytes": upload.size_bytes,
                "received_bytes": upload.download.received_bytes if upload.download else 0,
            }
            for upload in self._all.values()
        ]

    def offered(self, device: str, offer: wire.Offer, now: float) -> Replies:
        """A device has a bundle. It repeats the offer until it gets an `OfferResult`."""
        with self._store.reading() as session:
            if session.get(BundleRow, offer.digest) is not None:
                return [(device, wire.OfferResult(digest=offer.digest, stored=True))]
        if not 1 <= offer.size_bytes <= self._max_bundle_bytes:
            reason = (
                f"a bundle of {offer.size_bytes} bytes; 1 to {self._max_bundle_bytes} are accepted"
            )
            return self._refused(device, offer.digest, reason, now)
        upload = self._all.get(offer.digest)
        if upload is not None and upload.device != device:
            if upload.download is not None:
                if len(upload.others) < _PER_DEVICE:
                    upload.others.add(device)
                return []  # It comes from elsewhere already.
            self._drop(upload)
        elif upload is not None and upload.size_bytes != offer.size_bytes:
            self._drop(upload)
        if offer.digest not in self._all:
            owed = sum(other.device == device for other in self._all.values())
            if owed >= _PER_DEVICE or len(self._all) >= _ALTOGETHER:
                self.counters["offers_put_off"] += 1
                return []
            self._accept(device, offer)
        self._heard_of(device)
        return self._take_turns(now)

    def chunk(self, device: str, chunk: wire.Chunk, now: float) -> Replies:
        """A part of a bundle came.

        Raises:
            DiskFullError: It could not be kept; it will be asked for again.
        """
        upload = self._all.get(chunk.digest)
        if upload is None or upload.device != device or upload.download is None:
            self.counters["chunks_unasked"] += 1
            return []
        if upload.download.accept(chunk, now):
            upload.heard_at = now
        return self._advance(upload, now) + self._take_turns(now)

    def missing(self, device: str, message: wire.Missing, now: float) -> Replies:
        """The device does not have the bundle (any more)."""
        upload = self._all.get(message.digest)
        if upload is None or upload.device != device:
            return []
        reason = f"the device took its offer back: {message.reason}"
        return self._end(upload, reason, now) + self._take_turns(now)

    def device_is_back(self, device: str, now: float) -> Replies:
        """A device was heard of: what it owes may go on."""
        return self._take_turns(now) if self._heard_of(device) else []

    def reconnected(self, now: float) -> Replies:
        """The broker is back; whatever was on its way is lost."""
        for upload in self._all.values():
            if upload.download is not None:
                upload.download.reconnected()
                upload.heard_at = now
        return self.tick(now)

    def tick(self, now: float) -> Replies:
        """Ask again for what did not come; to be called about twice a second."""
        replies: Replies = []
        for upload in [u for u in self._all.values() if u.download is not None]:
            replies += self._advance(upload, now)
        return replies + self._take_turns(now)

    # Parts ---------------------------------------------------------------------------------------

    def _accept(self, device: str, offer: wire.Offer) -> None:
        with self._store.writing() as session:
            session.add(
                UploadRow(
                    digest=offer.digest,
                    device=device,
                    size_bytes=offer.size_bytes,
                    offered_at=self._store.clock(),
                )
            )
        self._all[offer.digest] = _Upload(device, offer.digest, offer.size_bytes)

    def _heard_of(self, device: str) -> bool:
        waiting = [u for u in self._all.values() if u.device == device and u.waits_for_device]
        for upload in waiting:
            upload.waits_for_device = False
        return bool(waiting)

    def _take_turns(self, now: float) -> Replies:
        """Begin with the next offers, as far as there is room."""
        replies: Replies = []
        busy = {u.device for u in self._all.values() if u.download is not None}
        for upload in list(self._all.values()):
            if len(busy) >= self._max_concurrent:
                break
            if upload.device in busy or upload.waits_for_device or now < upload.not_before:
                continue
            try:
                upload.download = Download(
                    self._incoming, upload.digest, upload.size_bytes, rng=self._rng
                )
            except TransferError as error:
                replies += self._end(upload, str(error), now)
                continue
            except StoreError as error:
                self._later(upload, str(error), now)
                continue
            upload.heard_at = now
            busy.add(upload.device)
            replies += self._advance(upload, now)
        return replies

    def _advance(self, upload: _Upload, now: float) -> Replies:
        download = upload.download
        if download is None:
            return []
        if download.complete:
            return self._finish(upload, download, now)
        if download.failed or now - upload.heard_at > _SILENCE_S:
            # Others have their turn now. What came is kept.
            upload.download, upload.waits_for_device = None, True
            self._all[upload.digest] = self._all.pop(upload.digest)
            return []
        return [(upload.device, get) for get in download.requests(now)]

    def _finish(self, upload: _Upload, download: Download, now: float) -> Replies:
        try:
            data = download.finish()
            bundle = self._checked(upload, data)
            self._store.blobs.put(data)
            self._keep(upload, data, bundle)
        except (BundleError, TransferError) as error:
            return self._end(upload, str(error), now)
        except StoreError as error:
            self._later(upload, str(error), now)
            return []
        download.discard()
        del self._all[upload.digest]
        self.counters["uploads_stored"] += 1
        log.info("stored %s, uploaded by %s", upload.digest[:12], upload.device)
        return [
            (device, wire.OfferResult(digest=upload.digest, stored=True))
            for device in (upload.device, *sorted(upload.others))
        ]

    def _checked(self, upload: _Upload, data: bytes) -> Bundle:
        """Read a bundle that came from outside.

        Raises:
            BundleError: It is not usable, or for an encoder that no device here runs.
        """
        try:
            bundle = unpack(data)
        except BundleError:
            raise
        except Exception as error:
            log.exception("bundle %s of %s", upload.digest[:12], upload.device)
            raise CorruptBundleError(f"bundle cannot be read: {type(error).__name__}") from error
        encoder = bundle.manifest.encoder
        if not made_for(bundle.signature, encoder):
            raise CorruptBundleError("bundle's signature was made for another encoder")
        with self._store.reading() as session:
            rows = session.execute(select(DeviceRow.name, DeviceRow.encoder))
            known = dict(iter(rows))
        # An empty one means that the device came before this database: it cannot be said.
        if known.get(upload.device) and encoder not in known.values():
            raise WrongEncoderError(
                f"bundle is for encoder {encoder[:12]}, which no device here runs; "
                f"{upload.device} runs {known[upload.device][:12]}"
            )
        return bundle

    def _keep(self, upload: _Upload, data: bytes, bundle: Bundle) -> None:
        manifest = bundle.manifest
        with self._store.writing() as session:
            if session.get(BundleRow, upload.digest) is None:
                session.add(
                    BundleRow(
                        digest=upload.digest,
                        size_bytes=len(data),
                        encoder=manifest.encoder,
                        family=manifest.family,
                        status=CANDIDATE,
                        uploaded_by=upload.device,
                        uploaded_at=self._store.clock(),
                        manifest=msgspec.json.encode(manifest).decode(),
                        signature=bundle.signature.to_bytes(),
                    )
                )
                self._store.audit(
                    session,
                    who=upload.device,
                    action="upload",
                    subject=upload.digest,
                    outcome=OK,
                    detail=f"{len(data)} bytes, {manifest.task}",
                )
            _forget(session, upload.digest)

    def _later(self, upload: _Upload, problem: str, now: float) -> None:
        """Something here is wrong, such as a full disk; the upload stays and is tried again."""
        log.warning("upload of %s waits: %s", upload.digest[:12], problem)
        self.counters["uploads_put_off"] += 1
        upload.download, upload.not_before = None, now + _TRY_AGAIN_S

    def _end(self, upload: _Upload, reason: str, now: float) -> Replies:
        self._drop(upload)
        return self._refused(upload.device, upload.digest, reason, now)

    def _drop(self, upload: _Upload) -> None:
        """Forget an upload and what came of it."""
        with self._store.writing() as session:
            _forget(session, upload.digest)
        if upload.download is not None:
            upload.download.discard()
        del self._all[upload.digest]
        sweep(self._incoming, keep=self._all.keys())

    def _refused(self, device: str, digest: str, reason: str, now: float) -> Replies:
        self.counters["uploads_refused"] += 1
        self._complaints.note(device, "upload", digest, reason, now)
        return [(device, wire.OfferResult(digest=digest, stored=False, reason=reason[:2000]))]


def made_for(signature: Signature, encoder: str) -> bool:
    """Whether a signature is of features of an encoder; others do not compare."""
    return signature.seed_digest == hashlib.sha256(encoder.encode()).digest()[:16]


def _forget(session: Session, digest: str) -> None:
    session.execute(delete(UploadRow).where(UploadRow.digest == digest))
