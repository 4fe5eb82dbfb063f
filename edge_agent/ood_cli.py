"""``driftkeel ood``: what a device knows of its own alarms.

A thin shell: reads the state directory that the configuration names, also while the agent runs on
it, and prints or draws what `edge_agent.explain` says.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapter_store.state import StateReader
from edge_agent.agent import open_encoder
from edge_agent.config import load_agent_config
from edge_agent.explain import Explanation, explain


@click.group()
def ood() -> None:
    """Say why a shift alarm fired."""


@ood.command("explain")
@click.argument("episode", type=click.IntRange(min=1))
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The agent's TOML file; its state directory is only read.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw it into a .png or .svg file; needs matplotlib.",
)
def explain_command(episode: int, config_path: Path, as_json: bool, plot: Path | None) -> None:
    """Say in words, and one picture, why EPISODE's alarm fired."""
    if plot is not None and plot.suffix.lower() not in {".png", ".svg"}:
        raise click.UsageError(f"--plot writes .png or .svg; found {plot.name!r}")
    config = load_agent_config(config_path)
    state = StateReader(Path(config.agent.state_dir))
    try:
        parts = open_encoder(config).manifest.feature_parts
        found = explain(state, episode, parts=parts, alarm=config.alarm)
    finally:
        state.close()
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())
    if plot is not None:
        draw(found, plot)
        click.echo(f"drawn to {plot}", err=True)


def draw(found: Explanation, path: Path) -> None:
    """Draw the histogram and the evidence over time.

    Raises:
        click.ClickException: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - a device need not have it
    except ModuleNotFoundError as error:
        raise click.ClickException(
            "--plot needs matplotlib, which is not installed: pip install 'driftkeel[demo]'; "
            "without --plot the histogram is printed as text"
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    scores, time = figure.subplots(1, 2)
    scores.stairs(found.known, found.bins, label="known (calibration)", fill=True, alpha=0.4)
    scores.stairs(found.shifted, found.bins, label="since the onset", linewidth=2)
    scores.set(xlabel="score", ylabel="share of samples", title=f"episode {found.episode}")
    scores.legend()
    time.semilogy(found.seqs, [max(level, 1e-3) for level in found.evidence])
    time.axhline(found.alarm_at, color="black", linestyle="--", label="alarm")
    time.axvline(found.onset_seq, color="gray", linestyle=":", label="onset")
    time.set(xlabel="sample", ylabel="evidence", title="evidence over time")
    time.legend()
    figure.savefig(path)
