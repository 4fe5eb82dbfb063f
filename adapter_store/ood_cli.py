"""``driftkeel ood``: why a shift alarm fired, told on the device and to the operator alike.

A thin shell: prints or draws an `Explanation`. Where one comes from is known to the packages above:
they offer a function through the entry-point group ``driftkeel.explain``, ``device`` reads a state
directory and ``operator`` asks the catalogue, so that neither package imports the other.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from adapter_store.explanation import Explanation
from adapter_store.plot import FORMATS, draw

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_SOURCES: Final = "driftkeel.explain"


@click.group()
def ood() -> None:
    """Say why a shift alarm fired."""


@ood.command("explain")
@click.argument("device", nargs=-1, metavar="[DEVICE]")
@click.argument("episode", type=click.IntRange(min=1))
@click.option(
    "--config",
    "config_path",
    type=_FILE,
    help="With DEVICE the catalogue's TOML file, for its address and token; without DEVICE the "
    "agent's.",
)
@click.option("--url", envvar="DRIFTKEEL_URL", help="The catalogue, where there is no --config.")
@click.option(
    "--token-file",
    type=_FILE,
    envvar="DRIFTKEEL_TOKEN_FILE",
    help="A file with the operator token, where there is no --config.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plot", type=_FILE, help="Draw it into a .png or .svg file; needs matplotlib.")
def explain_command(  # noqa: PLR0917 - click passes them by name
    device: tuple[str, ...],
    episode: int,
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Say in words, and one picture, why EPISODE's alarm fired.

    An operator names the DEVICE and asks the catalogue, with the options of `driftkeel shell`:
    `driftkeel ood explain press-7 3 --config catalogue.toml`.

    On the device itself its state is read, also while the agent runs:
    `driftkeel ood explain 3 --config agent.toml`.
    """
    if len(device) > 1:
        raise click.UsageError("give DEVICE and EPISODE, or EPISODE alone on the device itself")
    if plot is not None and plot.suffix.lower() not in FORMATS:
        raise click.UsageError(f"--plot writes .png or .svg; found {plot.name!r}")
    if device:
        found = _asked("operator", device[0], episode, config_path, url, token_file)
    elif config_path is None:
        raise click.UsageError("give the agent's --config FILE, or DEVICE to ask the catalogue")
    else:
        found = _asked("device", config_path, episode)
    shown = msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else found.text()
    click.echo(shown)
    if plot is not None:
        _draw(found, plot)
        click.echo(f"drawn to {plot}", err=True)


def _asked(source: str, *arguments: Any) -> Explanation:
    (entry,) = entry_points(group=_SOURCES, name=source)
    found: Explanation = entry.load()(*arguments)
    return found


def _draw(found: Explanation, path: Path) -> None:
    try:
        draw(found, path)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            "--plot needs matplotlib, which is not installed: pip install 'driftkeel[demo]'; "
            "without --plot the histogram is printed as text"
        ) from error
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error
