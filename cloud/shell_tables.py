"""How the shell shows things to people.

Most of what it shows was written by devices, so nothing of it is taken for markup, and what a
terminal would act on is shown as an escape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.table import Table
from rich.text import Text

from adapter_store.wire import TrainingProgress
from cloud.printable import printable

_STATUS_STYLES: Final = {"approved": "green", "candidate": "yellow", "quarantined": "red"}
_NOTHING: Final = "–"
Rows = list[dict[str, Any]]


def devices_table(rows: Rows) -> Table:
    """All devices."""
    table = _table("device", "state", "generation", "wanted", "episode", "kind", "last seen")
    for row in rows:
        reported = row["reported"] or {}
        episode = reported.get("episode") or {}
        _add(
            table,
            row["name"],
            _state(row),
            reported.get("generation", _NOTHING),
            wanted(row),
            episode.get("state", _NOTHING),
            episode.get("kind") or _NOTHING,
            _ago(row["last_seen"]),
        )
    return table


def device_table(row: dict[str, Any]) -> Table:
    """One device, with its generations and counters."""
    reported = row["reported"] or {}
    table = _pairs()
    _pair(table, "device", row["name"])
    _pair(table, "state", _state(row))
    _pair(table, "encoder", row["encoder"][:12] or _NOTHING)
    _pair(table, "software", row["software"] or _NOTHING)
    _pair(table, "last seen", _ago(row["last_seen"]))
    _pair(table, "wanted", wanted(row))
    _pair(table, "runs", f"generation {reported.get('generation', _NOTHING)}")
    _pair(table, "problem", reported.get("problem") or _NOTHING)
    for generation in reported.get("generations", []):
        runs = "▸" if generation["number"] == reported["generation"] else " "
        bundles = ", ".join(digest[:12] for digest in generation["bundles"])
        _pair(
            table,
            f"{runs} generation {generation['number']}",
            f"{generation['reason']} ({bundles})",
        )
    episode = reported.get("episode")
    if episode:
        detail = f"{episode['state']} {episode.get('detail', '')}"
        _pair(table, f"episode {episode['number']}", detail)
        _pair(table, "kind of shift", episode.get("kind") or "not known yet")
    if reported.get("training"):
        _pair(table, "training", training(reported["training"]))
    for name, value in sorted(reported.get("counters", {}).items()):
        _pair(table, name, f"{value:.10g}")
    return table


def adapters_table(rows: Rows) -> Table:
    """All adapters."""
    table = _table("adapter", "status", "labels", "family", "kB", "from", "run by")
    for row in rows:
        _add(
            table,
            row["digest"][:12],
            _status(row["status"]),
            _short(" ".join(row["labels"])),
            row["family"],
            f"{row['size_bytes'] / 1000:.1f}",
            row["uploaded_by"],
            ", ".join(row["run_by"]) or _NOTHING,
        )
    return table


def adapter_table(row: dict[str, Any]) -> Table:
    """One adapter."""
    table = _pairs()
    for name, value in row.items():
        shown: str | Text = _shown(value)
        if name == "status":
            shown = _status(row["status"])
        elif name == "uploaded_at":
            shown = f"{_time(row['uploaded_at'])} UTC"
        _pair(table, name.replace("_", " "), shown)
    return table


def judged(row: dict[str, Any]) -> str:
    """What came of approve, quarantine and retire."""
    line = f"adapter {row['digest'][:12]} is {row['status']}"
    if row["status"] != "approved" and row["run_by"]:
        line += f"; warning: still run by {', '.join(row['run_by'])} (see `rollback`)"
    return line


def log_table(rows: Rows) -> Table:
    """The audit log."""
    table = _table("when (UTC)", "who", "action", "subject", "outcome", "detail")
    for row in rows:
        outcome = Text(row["outcome"], style="red" if row["outcome"] == "refused" else "")
        _add(
            table,
            _time(row["at"]),
            row["who"],
            row["action"],
            _subject(row),
            outcome,
            row["detail"],
        )
    return table


def log_line(row: dict[str, Any]) -> str:
    """One entry of the audit log on one line."""
    parts = (_time(row["at"]), row["who"], row["action"], _subject(row), row["outcome"])
    return printable(" ".join([*parts, row["detail"]]).rstrip())


def device_line(row: dict[str, Any]) -> str:
    """A device's state on one line, without the time."""
    reported = row["reported"] or {}
    line = (
        f"{row['name']}: {'online' if row['online'] else 'offline'}, "
        f"generation {reported.get('generation', _NOTHING)}, wanted: {wanted(row)}"
    )
    episode = reported.get("episode")
    if episode:
        line += f", episode {episode['number']} {episode['state']} {episode.get('detail', '')}"
    if reported.get("training"):
        line += f", training {training(reported['training'])}"
    if reported.get("problem"):
        line += f", problem: {reported['problem']}"
    return printable(line.rstrip())


def training(progress: Mapping[str, Any]) -> str:
    """How far a device's training is, with a bar."""
    return str(msgspec.convert(progress, TrainingProgress))


def wanted(row: Mapping[str, Any]) -> str:
    """What the operator wants of a device, in words."""
    desired = row["desired"]
    if desired["generation"] is None:
        words = "pinned" if desired["pinned"] else "own choice"
    else:
        words = f"generation {desired['generation']}, pinned"
    behind = (row["reported"] or {}).get("desired_version", 0) < desired["version"]
    return words + (" (not confirmed)" if behind else "")


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _pairs() -> Table:
    return Table(show_header=False, box=None, pad_edge=False)


def _pair(table: Table, name: str, value: object) -> None:
    table.add_row(Text(printable(name), style="bold"), _cell(value))


def _add(table: Table, *values: object) -> None:
    table.add_row(*map(_cell, values))


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text(printable(str(value)))


def _state(row: Mapping[str, Any]) -> Text:
    return Text("online", style="green") if row["online"] else Text("offline", style="red")


def _status(status: str) -> Text:
    return Text(status, style=_STATUS_STYLES.get(status, "dim"))


def _shown(value: object) -> str:
    match value:
        case dict():
            return ", ".join(f"{k} {v:.4g}" for k, v in value.items()) or _NOTHING
        case list():
            return ", ".join(str(v)[:40] for v in value) or _NOTHING
        case _:
            return str(value)


def _subject(row: Mapping[str, Any]) -> str:
    subject: str = row["subject"]
    return subject[:12] if len(subject) == 64 else subject


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _ago(at: float, clock: Callable[[], float] = time.time) -> str:
    seconds = max(0.0, clock() - at)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
