"""Episodes and small settings on disk: each episode as the JSON of its newest state."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Engine, select

from adapter_store.database import transaction
from adapter_store.models import EpisodeRow, SettingRow


class EpisodeStore:
    """The episodes of one device.

    Args:
        engine: The device's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def save(self, episode: dict[str, Any]) -> None:
        """Write an episode's newest state; its ``number`` tells which.

        Raises:
            DiskFullError: The state before is what is kept.
        """
        with transaction(self._engine) as session:
            session.merge(EpisodeRow(number=int(episode["number"]), body=json.dumps(episode)))

    def list(self) -> list[dict[str, Any]]:
        """Every episode, oldest first."""
        with transaction(self._engine) as session:
            rows = session.scalars(select(EpisodeRow).order_by(EpisodeRow.number))
            return [json.loads(row.body) for row in rows]


class Settings:
    """Small values that must survive.

    Args:
        engine: The device's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, key: str) -> Any:
        """A value, or None."""
        with transaction(self._engine) as session:
            row = session.get(SettingRow, key)
            return None if row is None else json.loads(row.value)

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON-able value."""
        with transaction(self._engine) as session:
            session.merge(SettingRow(key=key, value=json.dumps(value)))
