"""What the demo shows while it runs: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_MARKS = {"waiting": "·", "running": "▸", "ok": "✓", "failed": "✗"}
_STYLES = {"waiting": "dim", "running": "bold cyan", "ok": "green", "failed": "bold red"}
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Step:
    """One step of the story: whether it happened, and how long it took."""

    name: str
    state: str = "waiting"
    seconds: float = 0.0
    note: str = ""


@dataclass
class DeviceLine:
    """The newest that is known of one device."""

    generation: int = 0
    samples: int = 0
    note: str = ""
    accuracy: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class Display:
    """Shows steps, devices and shell commands; use as a context manager.

    Args:
        steps: The steps' names in their order.
        console: Where to write; the standard output by default.
    """

    def __init__(self, steps: list[str], console: Console | None = None) -> None:
        self.console = console or Console()
        self.steps = [Step(name) for name in steps]
        self.devices: dict[str, DeviceLine] = {}
        self._said: list[Text] = []
        self._started = time.monotonic()
        self._live = (
            Live(console=self.console, get_renderable=self._render, refresh_per_second=6)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Mark one step as running, then as done or failed."""
        step = next(s for s in self.steps if s.name == name)
        step.state, begun = "running", time.monotonic()
        self.say(f"── {name}", style="bold")
        try:
            yield step
            step.state = "ok"
        except BaseException as error:
            step.state = "failed"
            step.note = str(error) or type(error).__name__
            raise
        finally:
            step.seconds = round(time.monotonic() - begun, 3)
            self.say(
                f"   {_MARKS[step.state]} {name}: {step.seconds:.1f} s  {step.note}".rstrip(),
                style=_STYLES[step.state],
            )

    def say(self, line: str, *, style: str = "") -> None:
        """One line of the story; kept on a terminal, printed elsewhere."""
        text = Text(line, style=style)
        self._said.append(text)
        if self._live is None:
            self.console.print(
                f"{time.monotonic() - self._started:6.1f}s {line}", markup=False, soft_wrap=True
            )

    def command(self, command: str, output: str) -> None:
        """An operator's command and what it answered."""
        self.say(f"   operator> {command}", style="bold yellow")
        for line in output.rstrip().splitlines():
            self.say(f"     {line}")

    def _render(self) -> RenderableType:
        steps = Table.grid(padding=(0, 1))
        for step in self.steps:
            seconds = f"{step.seconds:.1f} s" if step.state in ("ok", "failed") else ""
            steps.add_row(
                Text(_MARKS[step.state], _STYLES[step.state]),
                Text(step.name, _STYLES[step.state]),
                Text(seconds, "dim"),
                Text(step.note, "dim"),
            )
        devices = Table.grid(padding=(0, 2))
        for name, line in self.devices.items():
            devices.add_row(
                Text(name, "bold"),
                f"generation {line.generation}",
                f"{line.samples} samples",
                Text(f"accuracy {_spark(line.accuracy, 0.0, 1.0)}", "green"),
                Text(f"OOD score {_spark(line.scores, *_range(line.scores))}", "magenta"),
                line.note,
            )
        elapsed = f"{time.monotonic() - self._started:.0f} s"
        said = Text("\n").join(self._said[-14:])
        return Panel(
            Group(steps, Text(), devices, Text(), said),
            title="Driftkeel",
            subtitle=elapsed,
            border_style="blue",
        )


def _range(values: list[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 1.0)


def _spark(values: list[float], low: float, high: float, width: int = 24) -> str:
    span = (high - low) or 1.0
    return "".join(
        _BARS[round(min(1.0, max(0.0, (v - low) / span)) * (len(_BARS) - 1))]
        for v in values[-width:]
    )
