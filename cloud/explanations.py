"""Why devices' alarms fired, as the devices explained it: kept, bounded, and found again.

What a device wrote is made printable before it is kept, and only the newest of each device stay.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from adapter_store.explanation import MAX_SENTENCE, Explanation
from adapter_store.labels import MAX_LABEL
from cloud.errors import NotFoundError
from cloud.models import ExplanationRow
from cloud.printable import printable

KEPT: Final = 32
_KIND: Final = 64


def keep(session: Session, device: str, explanation: Explanation, at: float) -> None:
    """Keep a device's explanation of an episode; a newer one of the same episode replaces it.

    The newest `KEPT` of a device stay, as they arrived: a device that lost its state counts its
    episodes from 1 again.
    """
    body = msgspec.json.encode(_readable(explanation)).decode()
    session.merge(
        ExplanationRow(device=device, episode=explanation.episode, received_at=at, body=body)
    )
    session.flush()
    of_device = select(ExplanationRow.episode).where(ExplanationRow.device == device)
    newest = (ExplanationRow.received_at.desc(), ExplanationRow.episode.desc())
    old = list(session.scalars(of_device.order_by(*newest).offset(KEPT)))
    session.execute(
        delete(ExplanationRow).where(
            ExplanationRow.device == device, ExplanationRow.episode.in_(old)
        )
    )


def find(session: Session, device: str, episode: int) -> dict[str, Any]:
    """A device's explanation of an episode, as JSON-able values.

    Raises:
        NotFoundError: The device sent none.
    """
    row = session.get(ExplanationRow, (device, episode))
    if row is None:
        query = select(ExplanationRow.episode).where(ExplanationRow.device == device)
        have = ", ".join(map(str, session.scalars(query.order_by("episode")))) or "none"
        raise NotFoundError(
            f"no explanation of episode {episode} of {device}; there are: {have}. A device sends "
            "one when it knows the kind of shift, or the episode is over"
        )
    found: dict[str, Any] = msgspec.json.decode(row.body)
    return found


def _readable(explanation: Explanation) -> Explanation:
    """The same with nothing in it that a terminal or a log would act on."""

    def shown(text: str, limit: int = MAX_LABEL) -> str:
        return printable(text)[:limit]

    return msgspec.structs.replace(
        explanation,
        kind=shown(explanation.kind, _KIND),
        words=tuple(shown(sentence, MAX_SENTENCE) for sentence in explanation.words),
        nearest=tuple((shown(label), share) for label, share in explanation.nearest),
        groups=tuple(
            msgspec.structs.replace(group, nearest=shown(group.nearest))
            for group in explanation.groups
        ),
    )
