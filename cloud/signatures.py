"""The signatures of all bundles, in memory beside the database, so that searches read no table.

Filled from the database at the start; the store tells of every bundle that it commits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.orm import Session

from cloud.models import BundleRow
from ood.errors import OodError
from ood.nearest import Hit, Nearest
from ood.signature import Signature

_BATCH = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Described:
    """What a search needs of a bundle."""

    digest: str
    family: str
    status: str
    signature: bytes


class Signatures:
    """What searches look through; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nearest: Nearest[str] = Nearest()

    def load(self, reading: AbstractContextManager[Session]) -> None:
        """Take all bundles from the database.

        Raises:
            StoreError: The database cannot be read.
        """
        query = select(
            BundleRow.digest, BundleRow.family, BundleRow.status, BundleRow.signature
        ).execution_options(yield_per=_BATCH)
        with reading as session:
            for row in session.execute(query):
                self.put([Described(*row)])

    def put(self, bundles: Iterable[Described]) -> None:
        """Add bundles, or change what is known of them."""
        for bundle in bundles:
            try:
                read = Signature.from_bytes(bundle.signature)
            except OodError as error:
                # It must not spoil the search for the others.
                log.warning("bundle %s will not be found: %s", bundle.digest[:12], error)
                continue
            with self._lock:
                self._nearest.put(bundle.digest, read, family=bundle.family, status=bundle.status)

    def search(self, wanted: Signature, **options: Any) -> list[Hit[str]]:
        """Find the most similar bundles; for the options see `Nearest.search`."""
        with self._lock:
            return self._nearest.search(wanted, **options)


def changed_bundles(session: Session) -> dict[str, Described]:
    """What a session adds or changes, by digest; it fills as the session writes."""
    found: dict[str, Described] = {}

    def flushed(writing: Session, _context: object) -> None:
        for row in (*writing.new, *writing.dirty):
            if isinstance(row, BundleRow):
                found[row.digest] = Described(row.digest, row.family, row.status, row.signature)

    event.listen(session, "after_flush", flushed)
    return found
