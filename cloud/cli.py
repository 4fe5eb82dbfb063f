"""``driftkeel catalogue`` and ``driftkeel shell``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Final

import click

from cloud.config import DEFAULT_URL, Config

_FILE: Final = click.Path(dir_okay=False, path_type=Path)


@click.group(invoke_without_command=True)
@click.option("--config", "config_path", type=_FILE, help="The catalogue's TOML file.")
@click.pass_context
def catalogue(context: click.Context, config_path: Path | None) -> None:
    """Run the cloud catalogue of adapters."""
    if context.invoked_subcommand is not None:
        context.obj = config_path
        return
    from cloud.service import run  # noqa: PLC0415 - `--help` must not wait for it

    config = _load(config_path)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Alembic tells of every start at this level.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    run(config, announce=_announce)


@catalogue.command("public-key")
@click.option("--config", "config_path", type=_FILE, help="The catalogue's TOML file.")
@click.pass_obj
def public_key(outer: Path | None, config_path: Path | None) -> None:
    """Print the key that devices are configured with; it is made if there is none yet."""
    from cloud.service import open_key  # noqa: PLC0415 - see above

    click.echo(open_key(_load(config_path or outer)).public_key)


@click.command()
@click.option("--config", "config_path", type=_FILE, help="Take address and token from this file.")
@click.option("--url", envvar="DRIFTKEEL_URL", help=f"The catalogue.  [default: {DEFAULT_URL}]")
@click.option(
    "--token-file",
    type=_FILE,
    envvar="DRIFTKEEL_TOKEN_FILE",
    help="A file with the operator token: STATE_DIR/operator.token on the catalogue's machine.",
)
@click.option("--operator", help="Your name in the audit log.  [default: your login]")
@click.option("-c", "lines", multiple=True, metavar="COMMAND", help="Run this and end. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one document a line.")
def shell(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    operator: str | None,
    lines: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    """Operate the fleet: approve adapters, roll devices back.

    Without -c it is interactive, or reads commands from a pipe. The exit status is 0 when all was
    done, 1 when something was refused or failed (nothing after it is run), 2 when it is no command.
    """
    from rich.console import Console  # noqa: PLC0415 - `--help` must not wait for it

    from cloud.access import open_client  # noqa: PLC0415
    from cloud.shell import interact, run_command  # noqa: PLC0415
    from cloud.shell_commands import Session  # noqa: PLC0415

    client = open_client(config_path, url, token_file, operator=operator)
    session = Session(client, Console(highlight=False), as_json=as_json)
    if not lines and sys.stdin.isatty():
        interact(session)
        return
    for line in lines or sys.stdin:
        if line.strip() in ("quit", "exit"):
            return
        status = run_command(session, line)
        if status:
            sys.exit(status)


def _load(path: Path | None) -> Config:
    if path is None:
        raise click.UsageError("--config FILE is missing")
    return Config.load(path)


def _announce(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()
