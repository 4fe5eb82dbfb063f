"""How a benchmark tells its progress: a live display on a terminal, lines anywhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from edge_agent.bench.runner import Outcome, Run


class Display:
    """Told by the runner what happens; use within `shown`."""

    def __init__(self, total: int, bars: Progress | None) -> None:
        self._total = total
        self._bars = bars
        self._ended = 0
        self._tasks: dict[tuple[str, str, int], tuple[TaskID | None, float]] = {}
        self._lock = threading.Lock()

    def started(self, run: Run) -> None:
        """Open the run's bar."""
        with self._lock:
            bar = self._bars.add_task(_name(run), total=len(run.tasks)) if self._bars else None
            self._tasks[_key(run)] = bar, time.monotonic()

    def advanced(self, run: Run, task: int, of: int, accuracy: float) -> None:
        """Move the run's bar, or print a line."""
        bar, _ = self._tasks[_key(run)]
        if self._bars is not None and bar is not None:
            self._bars.update(bar, completed=task, told=f"{accuracy:.1f} %")
        else:
            self._say(f"{_name(run)}: task {task}/{of}, {accuracy:.1f} % of all so far")

    def finished(self, outcome: Outcome, *, kept: bool) -> None:
        """Close the run's bar and say how it went."""
        with self._lock:
            self._ended += 1
            bar, begun = self._tasks.pop(_key(outcome.run), (None, time.monotonic()))
            if self._bars is not None and bar is not None:
                self._bars.remove_task(bar)
        head = f"[{self._ended}/{self._total}] {_name(outcome.run)}: "
        if outcome.result is None:
            self._say(f"{head}failed: {outcome.error}")
        elif kept:
            self._say(f"{head}{outcome.result['last']:.1f} %, measured before")
        else:
            self._say(f"{head}{outcome.result['last']:.1f} % in {time.monotonic() - begun:.0f} s")

    def _say(self, line: str) -> None:
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, err=True)


def _key(run: Run) -> tuple[str, str, int]:
    return run.suite, run.strategy, run.seed


def _name(run: Run) -> str:
    return f"{run.suite} {run.strategy} (seed {run.seed})"


@contextmanager
def shown(total: int) -> Iterator[Display]:
    """A display for ``total`` runs, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Display(total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[told]}"),
        TimeElapsedColumn(),
    )
    with _Bars(*columns, console=console, transient=True) as bars:
        yield Display(total, bars)


class _Bars(Progress):
    """Bars whose last field starts empty."""

    def add_task(self, *args: object, **fields: object) -> TaskID:
        fields.setdefault("told", "")
        return super().add_task(*args, **fields)  # type: ignore[arg-type]


@contextmanager
def counted(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for the samples of a set, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"encoding {name}: {total} samples", err=True)
        yield lambda _: None
        return
    with Progress(console=console, transient=True) as bars:
        task = bars.add_task(f"encoding {name}", total=total)
        yield lambda n: bars.advance(task, n)
