"""Episodes and small settings on disk: each as the JSON of its newest state.

The conductor saves an episode before it acts on it, so every step survives a restart.
"""

from __future__ import annotations

import builtins
import json
from typing import Any, Final

from sqlalchemy import Engine, select

from adapter_store.database import reading, transaction
from adapter_store.models import EpisodeRow, SettingRow

CLOSED: Final = "closed"


class EpisodeStore:
    """The episodes of one device.

    Args:
        engine: The device's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def save(self, episode: dict[str, Any]) -> None:
        """Write an episode's newest state.

        Args:
            episode: JSON-able; ``number`` tells which episode, ``stage`` is ``closed`` at its end,
                and until then samples from ``onset_seq`` on keep their image once labelled.

        Raises:
            DiskFullError: The state before is what is kept.
        """
        row = EpisodeRow(
            number=int(episode["number"]),
            open=episode.get("stage") != CLOSED,
            onset_seq=episode.get("onset_seq"),
            body=json.dumps(episode),
        )
        with transaction(self._engine) as session:
            session.merge(row)

    def list(self) -> builtins.list[dict[str, Any]]:
        """Every episode, oldest first."""
        return self._load()

    def open(self) -> builtins.list[dict[str, Any]]:
        """The episodes that are not closed, oldest first."""
        return self._load(EpisodeRow.open)

    def _load(self, *conditions: Any) -> builtins.list[dict[str, Any]]:
        query = select(EpisodeRow).where(*conditions).order_by(EpisodeRow.number)
        with reading(self._engine) as session:
            return [json.loads(row.body) for row in session.scalars(query)]


class Settings:
    """Small values that must survive.

    Args:
        engine: The device's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, key: str) -> Any:
        """A value, or None."""
        with reading(self._engine) as session:
            row = session.get(SettingRow, key)
            return None if row is None else json.loads(row.value)

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON-able value.

        Raises:
            DiskFullError: The value before is what is kept.
        """
        with transaction(self._engine) as session:
            session.merge(SettingRow(key=key, value=json.dumps(value)))
