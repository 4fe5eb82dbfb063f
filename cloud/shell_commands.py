"""The commands of the operator shell: each asks the catalogue one thing and shows the answer.

A command that is refused raises `RefusedError`; `cloud.shell` turns that into words and an exit
status.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import click
import msgspec
from rich.console import Console

from cloud import shell_tables as tables
from cloud.errors import RefusedError
from cloud.printable import printable
from cloud.shell_client import Client

STATUSES: Final = ("candidate", "approved", "quarantined", "retired")
_POLL_S: Final = 25.0
_WAIT: Final = click.option(
    "--wait",
    type=click.FloatRange(0, 60),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the device to confirm.",
)


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
            return
        shown = render(value)
        if isinstance(shown, str):
            # Not through the console, which would take brackets for markup and fold the line.
            click.echo(printable(shown))
        else:
            self.console.print(shown)


@click.group(add_help_option=False, no_args_is_help=False)
def commands() -> None:
    """Commands of the operator shell."""


@commands.command()
@click.pass_obj
def devices(session: Session) -> None:
    """List the devices: what each runs and what is wanted of it."""
    session.show(session.client.get("devices"), tables.devices_table)


@commands.command()
@click.argument("name")
@click.pass_obj
def device(session: Session, name: str) -> None:
    """Show one device: generations, episode, counters."""
    session.show(session.client.get("devices", name), tables.device_table)


@commands.command()
@click.argument("name")
@click.argument("episode", type=click.IntRange(min=1))
@click.pass_obj
def explain(session: Session, name: str, episode: int) -> None:
    """Say why the alarm of a device's episode fired."""
    found = session.client.explanation(name, episode)
    click.echo(msgspec.json.encode(found).decode() if session.as_json else found.text())


@commands.command()
@click.option("--status", type=click.Choice(STATUSES), help="Only those of this status.")
@click.pass_obj
def adapters(session: Session, status: str | None) -> None:
    """List the adapters, newest first."""
    session.show(session.client.get("adapters", status=status), tables.adapters_table)


@commands.command()
@click.argument("id")
@click.pass_obj
def adapter(session: Session, id: str) -> None:  # noqa: A002 - what operators call it
    """Show one adapter, by the beginning of its id."""
    session.show(session.client.get("adapters", id), tables.adapter_table)


def _judging(action: str, says: str) -> None:
    @commands.command(name=action, help=says)
    @click.argument("id")
    @click.option("--reason", default="", help="Kept in the audit log.")
    @click.pass_obj
    def judge(session: Session, id: str, reason: str) -> None:  # noqa: A002
        answer = session.client.post("adapters", id, action, body={"reason": reason})
        session.show(answer, tables.judged)


_judging("approve", "Let devices pull an adapter.")
_judging("quarantine", "Keep devices from pulling an adapter; names those that run it.")
_judging("retire", "Take an adapter out of service for good.")


@commands.command()
@click.argument("name")
@click.option(
    "--to",
    type=click.IntRange(min=0),
    metavar="N",
    help="The generation; by default the one before the one that runs.",
)
@_WAIT
@click.pass_obj
def rollback(session: Session, name: str, to: int | None, wait: float) -> None:
    """Make a device run another generation, and stay there until `unpin`."""
    _steer(session, name, "rollback", {"to": to, "wait_s": wait})


@commands.command()
@click.argument("name")
@_WAIT
@click.pass_obj
def pin(session: Session, name: str, wait: float) -> None:
    """Keep a device at the generation it runs."""
    _steer(session, name, "pin", {"wait_s": wait})


@commands.command()
@click.argument("name")
@_WAIT
@click.pass_obj
def unpin(session: Session, name: str, wait: float) -> None:
    """Let a device choose its generation again."""
    _steer(session, name, "unpin", {"wait_s": wait})


@commands.command()
@click.option(
    "-n", "limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many."
)
@click.pass_obj
def log(session: Session, limit: int) -> None:
    """Show the audit log: who did what, and what was refused."""
    session.show(session.client.get("log", limit=limit), tables.log_table)


@commands.command()
@click.option(
    "--seconds", type=click.FloatRange(min=0), help="End after so long; by default at Ctrl-C."
)
@click.pass_obj
def watch(session: Session, seconds: float | None) -> None:
    """Follow devices and audit log: prints what is, then what changes."""
    end = None if seconds is None else time.monotonic() + seconds
    entries = session.client.get("log", limit=1)
    last = entries[-1]["number"] if entries else 0
    revision, states = 0, dict[str, str]()
    while True:
        left = _POLL_S if end is None else min(_POLL_S, max(0.0, end - time.monotonic()))
        answer = session.client.get("events", revision=revision, after=last, wait_s=round(left, 3))
        revision = answer["revision"]
        for row in answer["devices"]:
            line = tables.device_line(row)
            if states.get(row["name"]) != line:
                states[row["name"]] = line
                click.echo(json.dumps({"device": row}) if session.as_json else line)
        for entry in answer["log"]:
            last = entry["number"]
            click.echo(json.dumps({"log": entry}) if session.as_json else tables.log_line(entry))
        if end is not None and time.monotonic() >= end:
            return


def _steer(session: Session, name: str, action: str, body: dict[str, Any]) -> None:
    answer = session.client.post("devices", name, action, body=body)
    if answer["problem"]:
        if session.as_json:
            click.echo(json.dumps(answer))
        raise RefusedError(answer["message"])
    session.show(answer, lambda a: a["message"])
