"""``driftkeel tune``: measure how this machine runs the encoder fastest, and keep it.

Thin: opens the device as `agent fit` does, calls `edge_agent.tune_device`, prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_agent.agent import Agent
from edge_agent.config import load_agent_config
from edge_agent.tune_device import TOGETHER, Tuning, described, keep
from edge_agent.tune_device import tune as measured_by
from edge_agent.tuning import ALONE, Measured


@click.command()
@click.option(
    "--config",
    "config_path",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The agent's TOML file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--seconds",
    type=click.FloatRange(1.0, 3600.0),
    default=20.0,
    show_default=True,
    help="About how long to measure.",
)
@click.option("--dry-run", is_flag=True, help="Measure and say what is fastest; change nothing.")
def tune(config_path: Path, as_json: bool, seconds: float, dry_run: bool) -> None:
    """Find how this machine runs the encoder fastest, and keep it with the generation.

    Measures what of ONNX Runtime is installed with one thread and more, at each graph optimisation,
    in turns. What answers other than the defaults is refused. The fastest becomes a generation of
    the same bundles, so that rolling back brings the earlier settings back. The agent must not run
    meanwhile.
    """
    device = Agent.open(load_agent_config(config_path))
    try:
        with _progress() as (say, tell):
            tuning = measured_by(
                device, seconds=seconds, clock=time.perf_counter, say=say, tell=tell
            )
        number = None
        if tuning.changes and not dry_run:
            number = keep(device, tuning, now=time.time()).number
    finally:
        device.close()
    if as_json:
        click.echo(json.dumps(report(tuning, number), indent=2))
        return
    table = Table(caption=_caption(tuning))
    table.add_column("provider")
    table.add_column("threads", justify="right")
    table.add_column("optimisation")
    for heading in ("ms", "fastest", f"ms of {TOGETHER}", "fastest"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for each in tuning.measured:
        table.add_row(*row(each, tuning))
    Console().print(table)
    click.echo(told(tuning, number, dry_run=dry_run))


def told(tuning: Tuning, number: int | None, *, dry_run: bool) -> str:
    """What tuning came to, in a sentence.

    Args:
        tuning: What was found.
        number: The generation that keeps it; None where none was made.
        dry_run: Whether none was to be made.
    """
    best = described(tuning.chosen.settings)
    if not tuning.changes:
        return f"{best}: that is what runs now; nothing was changed"
    gain = ""
    if tuning.default is not None and tuning.default is not tuning.chosen:
        share = tuning.default.median_ms() / tuning.chosen.median_ms()
        gain = f", {share:.2f} times as fast as the defaults"
    if number is None:
        why = "nothing was changed (--dry-run)" if dry_run else "nothing was changed"
        return f"{best}{gain}; {why}"
    return f"generation {number}: {best}{gain}"


def report(tuning: Tuning, number: int | None) -> dict[str, Any]:
    """Everything as JSON-able values."""
    return {
        "generation": number,
        "chosen": msgspec.to_builtins(tuning.chosen.settings),
        "running": msgspec.to_builtins(tuning.running),
        "changes": tuning.changes,
        "machine": msgspec.to_builtins(tuning.machine),
        "samples": tuning.samples,
        "own_samples": tuning.own_samples,
        "measured": [
            {
                **msgspec.to_builtins(each.settings),
                "refused": each.refused,
                "batches": {
                    str(batch): {
                        "median_ms": each.median_ms(batch),
                        "fastest_ms": each.fastest_ms(batch),
                        "runs": len(runs),
                    }
                    for batch, runs in each.runs_ms.items()
                },
            }
            for each in tuning.measured
        ],
    }


def row(each: Measured, tuning: Tuning) -> tuple[str, ...]:
    """A candidate's line of the table."""
    settings = each.settings
    what = (settings.providers[0], str(settings.threads), settings.graph_optimisation)
    if each.refused:
        return (*what, "", "", "", "", f"refused: {each.refused}")
    times = [
        f"{ms:.2f}"
        for batch in (ALONE, TOGETHER)
        for ms in (each.median_ms(batch), each.fastest_ms(batch))
    ]
    marks = [
        word
        for word, applies in (
            ("chosen", each is tuning.chosen),
            ("runs now", settings == tuning.running),
        )
        if applies
    ]
    return (*what, *times, ", ".join(marks))


def _caption(tuning: Tuning) -> str:
    samples = "of its own samples" if tuning.own_samples else "images of noise"
    machine = tuning.machine
    where = f"{machine.cpu}, {machine.cores} cores, ONNX Runtime {machine.onnxruntime}"
    return (
        f"medians of 1 and {TOGETHER} samples; {where}; decisions on {tuning.samples} {samples} "
        "as with the defaults"
    )


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Words and a bar on standard error; words alone where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield (lambda words: click.echo(words, err=True)), (lambda _, __: None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("opening", total=None)
        yield (
            lambda words: bars.update(task, description=words),
            lambda done, of: bars.update(task, completed=done, total=of),
        )
