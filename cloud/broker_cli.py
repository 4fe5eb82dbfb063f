"""``driftkeel broker``: an MQTT broker on the loopback address, for trying things out."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from cloud.broker import Kind, start_broker


@click.command()
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where its configuration and log go.",
)
@click.option("--port", default=1883, show_default=True, help="0 takes a free port.")
@click.option(
    "--user",
    "users",
    multiple=True,
    required=True,
    metavar="NAME=PASSWORD",
    help="An account; `catalogue` is the catalogue's, every other one a device's. Repeatable.",
)
@click.option("--kind", type=click.Choice(["mosquitto", "embedded"]), help="Default: what is here.")
def broker(state_dir: Path, port: int, users: tuple[str, ...], kind: Kind | None) -> None:
    """Run a broker with accounts and access rules until interrupted. Not for production."""
    accounts = {}
    for user in users:
        name, equals, password = user.partition("=")
        if not (name and equals and password):
            raise click.BadParameter(f"{user!r} is not NAME=PASSWORD", param_hint="--user")
        accounts[name] = password
    running = start_broker(state_dir, accounts, port=port, kind=kind)
    signal.signal(signal.SIGTERM, lambda *_: running.stop())
    click.echo(f"{running.kind} broker on {running.host}:{running.port}; for trying only")
    click.echo(f"accounts: {', '.join(accounts)}; Ctrl-C ends it")
    try:
        running.process.wait()
    except KeyboardInterrupt:
        running.stop()
