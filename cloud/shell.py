"""The operator shell: reads command lines and runs them, one at a time or interactively.

`run_command` executes one line; `interact` reads lines with completion and history. What the
commands do is in `cloud.shell_commands`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from cloud.errors import CatalogueError, RefusedError
from cloud.printable import printable
from cloud.shell_client import Client
from cloud.shell_commands import STATUSES, Session, commands

DONE: Final = 0
REFUSED: Final = 1
MISUSED: Final = 2


def run_command(session: Session, line: str) -> int:
    """Run one command line.

    Returns:
        0 when it was done, 1 when it was refused or failed, 2 when it is not a command.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        return _complain(f"cannot read {line!r}: {error}", MISUSED)
    if not words:
        return DONE
    if words[0] in ("help", "?"):
        return _help(words[1:])
    try:
        commands.main(words, prog_name="", standalone_mode=False, obj=session)
    except click.UsageError as error:
        hint = f"help {words[0]}" if words[0] in commands.commands else "help"
        return _complain(f"{error.format_message()} (see `{hint}`)", MISUSED)
    except CatalogueError as error:
        return _complain(str(error), REFUSED)
    return DONE


def interact(session: Session) -> None:
    """Read and run commands until `quit`, `exit` or the end of input."""
    prompt: PromptSession[str] = PromptSession(
        history=_history(), completer=ShellCompleter(session.client), complete_while_typing=False
    )
    click.echo("Driftkeel operator shell; `help` lists the commands, Tab completes, `quit` leaves.")
    while True:
        try:
            line = prompt.prompt("driftkeel> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line in ("quit", "exit"):
            return
        try:
            run_command(session, line)
        except (KeyboardInterrupt, click.Abort):
            click.echo()


class ShellCompleter(Completer):
    """Completes commands, device names, adapter ids, options and their values.

    Args:
        client: Asked for the names.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        """Complete the word at the cursor."""
        del complete_event
        *before, word = document.text_before_cursor.lstrip().split(" ")
        for candidate in self._candidates([w for w in before if w], word):
            if candidate.startswith(word):
                yield Completion(candidate, start_position=-len(word))

    def _candidates(self, before: Sequence[str], word: str) -> list[str]:
        if not before or before == ["help"]:
            return sorted([*commands.commands, *(() if before else ("help", "quit"))])
        command = commands.commands.get(before[0])
        if command is None:
            return []
        if before[-1] == "--status":
            return list(STATUSES)
        if word.startswith("-"):
            return [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        arguments = [p.name for p in command.params if isinstance(p, click.Argument)]
        if len(before) > 1:
            return []
        try:
            if "name" in arguments:
                return [row["name"] for row in self._client.get("devices")]
            if "id" in arguments:
                return [row["digest"][:12] for row in self._client.get("adapters")]
        except RefusedError:
            pass
        return []


def _help(words: Sequence[str]) -> int:
    if words:
        command = commands.commands.get(words[0])
        if command is None:
            return _complain(f"no command {words[0]!r} (see `help`)", MISUSED)
        with click.Context(command, info_name=words[0]) as context:
            click.echo(command.get_help(context))
        return DONE
    width = max(map(len, commands.commands)) + 2
    click.echo("Commands (`help COMMAND` for more, `quit` to leave):")
    for name, command in commands.commands.items():
        click.echo(f"  {name:<{width}}{command.get_short_help_str(76)}")
    return DONE


def _history() -> History:
    """Kept in a file where that is possible."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    directory = Path(base) / "driftkeel"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "shell-history"
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _complain(what: str, status: int) -> int:
    click.echo(printable(what), err=True)
    return status
