"""Telling of what devices send and the catalogue refuses, without letting them fill the log.

Each device may cause a few entries at once and one a minute after that; what is not told is
counted and mentioned with the next entry.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from adapter_store.errors import StoreError
from cloud.store import REFUSED, Store

_BURST: Final = 10
_ONE_EVERY_S: Final = 60.0
_DEVICES: Final = 1000

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Allowance:
    """How many entries a device may still cause, as of ``at``."""

    left: float
    at: float
    untold: int = 0


class Complaints:
    """Writes refusals to the log and the audit log.

    Args:
        store: Has the audit log.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()

    def note(self, device: str, action: str, subject: str, reason: str, now: float) -> None:
        """Tell of one refusal, if this device has not caused too many.

        Args:
            device: Who sent it.
            action: What it was to be, such as ``upload``.
            subject: What it was about.
            reason: Why it was refused.
            now: A monotonic time.
        """
        allowance = self._allowances.setdefault(device, _Allowance(_BURST, now))
        self._allowances.move_to_end(device)
        while len(self._allowances) > _DEVICES:
            self._allowances.popitem(last=False)
        gained = (now - allowance.at) / _ONE_EVERY_S
        allowance.left, allowance.at = min(float(_BURST), allowance.left + gained), now
        if allowance.left < 1:
            allowance.untold += 1
            return
        allowance.left -= 1
        if allowance.untold:
            reason = f"{reason} (and {allowance.untold} more before, not listed)"
            allowance.untold = 0
        log.warning("refused from %s: %s %s: %s", device, action, subject, reason)
        try:
            with self._store.writing() as session:
                self._store.audit(
                    session,
                    who=device,
                    action=action,
                    subject=subject,
                    outcome=REFUSED,
                    detail=reason,
                )
        except StoreError as error:
            # The refusal stands all the same.
            log.warning("it could not be put into the audit log: %s", error)
