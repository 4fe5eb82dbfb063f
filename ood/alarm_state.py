"""What the sequential alarm says and what it remembers: plain values, to and from JSON.

Made by `ood.alarm`, kept by whoever feeds it (the agent's journal). Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

from ood.errors import OodError


@dataclass(frozen=True)
class Alarm:
    """The stream has shifted.

    Attributes:
        at: the sample at which the evidence reached the budget; the first ever seen is 1.
        onset: the estimated first shifted sample, ≤ at: where the strongest bet's evidence last
            left its floor.
        evidence: the evidence reached, ≥ the budget.
    """

    at: int
    onset: int
    evidence: float


@dataclass(frozen=True)
class AlarmState:
    """All the test remembers between two samples; survives a restart through `to_dict`.

    Attributes:
        test: the fingerprint of the test it belongs to.
        seen: samples seen so far, over all alarms.
        alarms: alarms raised so far.
        evidence: one Shiryaev–Roberts statistic for each bet.
        cusum: one CUSUM statistic for each size of bet; it only serves the onset.
        since: for each of those, how many samples had been seen when it last restarted.
        above: for each group's levels in turn, the urn's count of scores at or above.
        drawn: for each group, the urn's count of all scores.
        recent: the running proportions of the classes; empty unless those are watched.
    """

    test: str
    seen: int
    alarms: int
    evidence: tuple[float, ...]
    cusum: tuple[float, ...]
    since: tuple[int, ...]
    above: tuple[int, ...]
    drawn: tuple[int, ...]
    recent: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON can carry it, without loss."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AlarmState:
        """Rebuild a state from `to_dict`.

        Raises:
            OodError: a field is missing, unknown or of the wrong type or range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise OodError(f"alarm state needs {sorted(names)}; found {sorted(map(str, values))}")
        if not isinstance(values["test"], str):
            raise OodError("alarm state: test must be a string")
        state = cls(
            test=values["test"],
            seen=_count(values["seen"], "seen"),
            alarms=_count(values["alarms"], "alarms"),
            evidence=_levels(values["evidence"], "evidence"),
            cusum=_levels(values["cusum"], "cusum"),
            since=_counts(values["since"], "since"),
            above=_counts(values["above"], "above"),
            drawn=_counts(values["drawn"], "drawn"),
            recent=_levels(values["recent"], "recent"),
        )
        if len(state.cusum) != len(state.since):
            raise OodError("alarm state: cusum and since are of different lengths")
        if state.since and max(state.since) > state.seen:
            raise OodError("alarm state: since lies after the samples seen")
        if not state.drawn or len(state.above) % len(state.drawn):
            raise OodError("alarm state: above and drawn do not go together")
        levels = len(state.above) // len(state.drawn)
        if any(
            not 0 < above <= state.drawn[place // levels] for place, above in enumerate(state.above)
        ):
            raise OodError("alarm state: above holds more than was drawn, or nothing")
        return state


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OodError(f"alarm state: {name} must be a count; found {value!r}")
    return value


def _counts(values: object, name: str) -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        raise OodError(f"alarm state: {name} must be a list")
    return tuple(_count(value, name) for value in values)


def _levels(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise OodError(f"alarm state: {name} must be a list")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OodError(f"alarm state: {name} holds {value!r}; expected numbers")
        if not isfinite(value) or value < 0:
            raise OodError(f"alarm state: {name} holds {value!r}; expected finite numbers ≥ 0")
    return tuple(float(value) for value in values)
