"""Run the demo: `python -m examples.demo [--out DIR]`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from examples.demo.digits import worlds
from examples.demo.display import Display
from examples.demo.report import draw, print_table, write_report
from examples.demo.stage import DemoError, Stage
from examples.demo.story import STEPS, Story
from ood.errors import DriftkeelError


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Where the report, the plot and the logs go.",
)
@click.option("--seed", default=7, show_default=True, help="Which images go where.")
def main(out: Path, seed: int) -> None:
    """Watch two devices notice a shift, adapt, share what they learnt, and be rolled back."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    display = Display(STEPS, console)
    # Everything the processes keep is new in each run; only results and logs outlive it.
    with tempfile.TemporaryDirectory(prefix="driftkeel-demo-") as scratch:
        with display, Stage(Path(scratch)) as stage:
            story = Story(stage, display, worlds(seed))
            begun = time.monotonic()
            try:
                story.run()
                with display.step(STEPS[-1]):
                    plot = draw({w.device.name: w.track for w in story.watched}, out)
            except (DemoError, DriftkeelError) as error:
                display.say(f"the demo failed: {error}", style="bold red")
        for child in stage.children:
            (out / f"{child.name}.log").write_bytes(child.log.read_bytes())
    steps = [{"name": s.name, "ok": s.state == "ok", "seconds": s.seconds} for s in display.steps]
    report = {"steps": steps, "seconds": round(time.monotonic() - begun, 1), "seed": seed}
    path = write_report(report | story.report, out)
    if not all(step["ok"] for step in steps):
        console.print(f"not every step happened; see {path} and the logs in {out}", style="red")
        sys.exit(1)
    table = print_table(report | story.report, console, out)
    console.print(f"table   {table}\nplot    {plot}\nreport  {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
