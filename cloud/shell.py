"""The operator shell: devices, adapters and rollbacks, interactively or one command at a time.

It speaks the catalogue's HTTP API and nothing else. `run_command` executes one line; `interact`
reads lines with completion and history.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import httpx
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from rich.console import Console
from rich.table import Table

from cloud.errors import CatalogueError

_STATUSES: Final = ("candidate", "approved", "quarantined", "retired")
_STATUS_STYLES: Final = {"approved": "green", "candidate": "yellow", "quarantined": "red"}


class RefusedError(CatalogueError):
    """The catalogue refused a command, or cannot be reached."""


class Client:
    """The catalogue's API as the shell uses it.

    Args:
        url: Where the catalogue listens.
        token: The operator token.
        operator: The name in the audit log.
    """

    def __init__(self, url: str, token: str, operator: str) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {token}", "x-operator": operator},
            timeout=75.0,
        )
        self._url = url

    def get(self, path: str, **params: Any) -> Any:
        """Ask.

        Raises:
            RefusedError: The catalogue says no, or does not answer.
        """
        return self._answer("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Act.

        Raises:
            RefusedError: The catalogue says no, or does not answer.
        """
        return self._answer("POST", path, json=body)

    def _answer(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RefusedError(
                f"the catalogue does not answer at {self._url}: {error}; is it running?"
            ) from error
        if response.is_success:
            return response.json()
        try:
            raise RefusedError(str(response.json()["error"]))
        except (ValueError, KeyError, TypeError):
            raise RefusedError(f"{self._url}{path} answered {response.status_code}") from None


@dataclass
class Session:
    """What every command needs."""

    client: Client
    console: Console
    as_json: bool

    def show(self, value: Any, render: Callable[[Any], Any]) -> None:
        """Print an answer, as JSON or for people."""
        if self.as_json:
            click.echo(json.dumps(value))
        else:
            self.console.print(render(value))


@click.group(add_help_option=False, context_settings={"help_option_names": []})
def commands() -> None:
    """Commands of the operator shell."""


@commands.command()
@click.pass_obj
def devices(session: Session) -> None:
    """List the devices: what each runs and what is wanted of it."""
    session.show(session.client.get("/v1/devices"), _devices_table)


@commands.command()
@click.argument("name")
@click.pass_obj
def device(session: Session, name: str) -> None:
    """Show one device: generations, episode, counters."""
    session.show(session.client.get(f"/v1/devices/{name}"), _device_table)


@commands.command()
@click.option("--status", type=click.Choice(_STATUSES), help="Only those of this status.")
@click.pass_obj
def adapters(session: Session, status: str | None) -> None:
    """List the adapters, newest first."""
    session.show(session.client.get("/v1/adapters", status=status), _adapters_table)


@commands.command()
@click.argument("id")
@click.pass_obj
def adapter(session: Session, id: str) -> None:  # noqa: A002 - what operators call it
    """Show one adapter, by the beginning of its digest."""
    session.show(session.client.get(f"/v1/adapters/{id}"), _fields)


def _judging(action: str, says: str) -> None:
    @commands.command(name=action, help=says)
    @click.argument("id")
    @click.option("--reason", default="", help="Kept in the audit log.")
    @click.pass_obj
    def judge(session: Session, id: str, reason: str) -> None:  # noqa: A002
        result = session.client.post(f"/v1/adapters/{id}/{action}", {"reason": reason})
        session.show(result, _judged)


_judging("approve", "Let devices pull an adapter.")
_judging("quarantine", "Keep devices from pulling an adapter; those that run it are named.")
_judging("retire", "Take an adapter out of service for good.")


@commands.command()
@click.argument("name")
@click.option("--to", type=int, help="The generation; by default the one before the running one.")
@click.option("--wait", default=10.0, show_default=True, help="Seconds to wait for the device.")
@click.pass_obj
def rollback(session: Session, name: str, to: int | None, wait: float) -> None:
    """Make a device run another generation, and stay there until `unpin`."""
    _want(session, name, "rollback", {"to": to, "wait_s": wait})


@commands.command()
@click.argument("name")
@click.option("--wait", default=10.0, show_default=True, help="Seconds to wait for the device.")
@click.pass_obj
def pin(session: Session, name: str, wait: float) -> None:
    """Keep a device at the generation it runs."""
    _want(session, name, "pin", {"wait_s": wait})


@commands.command()
@click.argument("name")
@click.option("--wait", default=10.0, show_default=True, help="Seconds to wait for the device.")
@click.pass_obj
def unpin(session: Session, name: str, wait: float) -> None:
    """Let a device choose its generation again."""
    _want(session, name, "unpin", {"wait_s": wait})


@commands.command()
@click.option("-n", "limit", default=20, show_default=True, help="How many entries.")
@click.pass_obj
def log(session: Session, limit: int) -> None:
    """Show the audit log: who did what, and what was refused."""
    session.show(session.client.get("/v1/log", limit=limit), _log_table)


@commands.command()
@click.option("--seconds", type=float, help="End after this long; by default at Ctrl-C.")
@click.pass_obj
def watch(session: Session, seconds: float | None) -> None:
    """Follow the audit log and the devices' state as they change."""
    end = None if seconds is None else time.monotonic() + seconds
    entries = session.client.get("/v1/log", limit=1)
    last = entries[-1]["number"] if entries else 0
    states: dict[str, str] = {}
    while end is None or time.monotonic() < end:
        for line in _news(session.client, states):
            click.echo(line)
        for entry in session.client.get("/v1/log", after=last, limit=100):
            last = entry["number"]
            click.echo(json.dumps(entry) if session.as_json else _log_line(entry))
        time.sleep(0.5)


def run_command(session: Session, line: str) -> int:
    """Run one command line.

    Returns:
        0 when it was done, 1 when it was refused, 2 when it is not a command.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        click.echo(f"cannot read {line!r}: {error}", err=True)
        return 2
    if not words:
        return 0
    if words[0] in ("help", "?"):
        click.echo(_help(words[1:]))
        return 0
    try:
        commands.main(words, prog_name="", standalone_mode=False, obj=session)
    except click.UsageError as error:
        click.echo(f"{error.format_message()} (see `help`)", err=True)
        return 2
    except CatalogueError as error:
        click.echo(str(error), err=True)
        return 1
    return 0


def interact(session: Session) -> None:
    """Read and run commands until `quit`, `exit` or end of input."""
    directory = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / "driftkeel"
    directory.mkdir(parents=True, exist_ok=True)
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(directory / "shell-history")),
        completer=ShellCompleter(session.client),
        complete_while_typing=False,
    )
    click.echo("Driftkeel operator shell; `help` lists the commands, Tab completes, `quit` leaves.")
    while True:
        try:
            line = prompt.prompt("driftkeel> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line.strip() in ("quit", "exit"):
            return
        try:
            run_command(session, line)
        except KeyboardInterrupt:
            click.echo()


class ShellCompleter(Completer):
    """Completes commands, device names, adapter ids and options.

    Args:
        client: Asked for the names.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def get_completions(self, document: Document, _: Any) -> Iterator[Completion]:
        """Complete the word at the cursor."""
        words = document.text_before_cursor.split(" ")
        for word in self._candidates(words[:-1], words[-1]):
            if word.startswith(words[-1]):
                yield Completion(word, start_position=-len(words[-1]))

    def _candidates(self, before: Sequence[str], word: str) -> list[str]:
        if not before or before == ["help"]:
            return [*sorted(commands.commands), "help", "quit"]
        command = commands.commands.get(before[0])
        if command is None:
            return []
        if word.startswith("-"):
            return [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        if before[-1] == "--status":
            return list(_STATUSES)
        arguments = [p.name for p in command.params if isinstance(p, click.Argument)]
        try:
            if "name" in arguments:
                return [row["name"] for row in self._client.get("/v1/devices")]
            if "id" in arguments:
                return [row["digest"][:12] for row in self._client.get("/v1/adapters")]
        except RefusedError:
            return []
        return []


def _want(session: Session, name: str, action: str, body: dict[str, Any]) -> None:
    result = session.client.post(f"/v1/devices/{name}/{action}", body)
    session.show(result, lambda r: r["message"])
    if result["problem"]:
        raise RefusedError(result["problem"])


def _help(words: list[str]) -> str:
    if words:
        command = commands.commands.get(words[0])
        if command is None:
            return f"no command {words[0]!r}"
        with click.Context(command, info_name=words[0]) as context:
            return command.get_help(context)
    width = max(map(len, commands.commands)) + 2
    rows = [
        f"  {name:<{width}}{command.get_short_help_str(70)}"
        for name, command in commands.commands.items()
    ]
    return "\n".join(["Commands (`help COMMAND` for more, `quit` to leave):", *rows])


def _devices_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("device", "state", "generation", "wanted", "episode", "last seen")
    for row in rows:
        reported = row["reported"] or {}
        episode = reported.get("episode") or {}
        table.add_row(
            row["name"],
            "[green]online[/]" if row["online"] else "[red]offline[/]",
            str(reported.get("generation", "–")),
            _wanted(row),
            episode.get("state", "–"),
            _ago(row["last_seen"]),
        )
    return table


def _device_table(row: dict[str, Any]) -> Table:
    reported = row["reported"] or {}
    table = _fields(
        {
            "device": row["name"],
            "state": "online" if row["online"] else "offline",
            "encoder": row["encoder"][:12],
            "software": row["software"],
            "last seen": _ago(row["last_seen"]),
            "wanted": _wanted(row),
            "runs": f"generation {reported.get('generation', '–')}",
            "problem": reported.get("problem", "") or "–",
        }
    )
    for generation in reported.get("generations", []):
        runs = "▸" if generation["number"] == reported["generation"] else " "
        bundles = ", ".join(digest[:12] for digest in generation["bundles"])
        table.add_row(
            f"{runs} generation {generation['number']}", f"{generation['reason']} ({bundles})"
        )
    episode = reported.get("episode")
    if episode:
        table.add_row(f"episode {episode['number']}", f"{episode['state']} {episode['detail']}")
    for name, value in sorted(reported.get("counters", {}).items()):
        table.add_row(name, f"{value:g}")
    return table


def _adapters_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("adapter", "status", "labels", "family", "kB", "from", "run by")
    for row in rows:
        style = _STATUS_STYLES.get(row["status"], "dim")
        table.add_row(
            row["digest"][:12],
            f"[{style}]{row['status']}[/]",
            _short(row["labels"]),
            row["family"],
            f"{row['size_bytes'] / 1000:.1f}",
            row["uploaded_by"],
            ", ".join(row["run_by"]) or "–",
        )
    return table


def _judged(row: dict[str, Any]) -> str:
    line = f"adapter {row['digest'][:12]} is {row['status']}"
    if row["status"] != "approved" and row["run_by"]:
        line += f"; still run by {', '.join(row['run_by'])} (see `rollback`)"
    return line


def _log_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("when (UTC)", "who", "action", "subject", "outcome", "detail")
    for row in rows:
        subject = row["subject"][:12] if len(row["subject"]) == 64 else row["subject"]
        table.add_row(
            _time(row["at"]), row["who"], row["action"], subject, row["outcome"], row["detail"]
        )
    return table


def _log_line(row: dict[str, Any]) -> str:
    return " ".join(
        [
            _time(row["at"]),
            row["who"],
            row["action"],
            row["subject"][:40],
            row["outcome"],
            row["detail"],
        ]
    )


def _news(client: Client, states: dict[str, str]) -> Iterator[str]:
    """A line for every device whose state changed since the last look."""
    for row in client.get("/v1/devices"):
        reported = row["reported"] or {}
        episode = reported.get("episode") or {}
        state = (
            f"{'online' if row['online'] else 'offline'}, "
            f"generation {reported.get('generation', '–')}, wanted: {_wanted(row)}"
        )
        if episode:
            state += (
                f", episode {episode['number']} {episode['state']} {episode['detail']}".rstrip()
            )
        if states.get(row["name"]) != state:
            states[row["name"]] = state
            yield f"{_time(row['last_seen'])} {row['name']}: {state}"


def _fields(row: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in row.items():
        table.add_row(f"[bold]{name}[/]", _text(value))
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name)
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4g}" for k, v in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(str(v)[:40] for v in value) or "–"
    return str(value)


def _wanted(row: dict[str, Any]) -> str:
    desired = row["desired"]
    if desired["generation"] is None:
        return "own choice" if not desired["pinned"] else "pinned"
    behind = (row["reported"] or {}).get("desired_version", 0) < desired["version"]
    return f"generation {desired['generation']}, pinned" + (" (not confirmed)" if behind else "")


def _short(labels: list[str]) -> str:
    text = " ".join(labels)
    return text if len(text) <= 24 else text[:23] + "…"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _ago(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
