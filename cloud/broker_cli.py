"""``driftkeel broker``: an MQTT broker on the loopback address, for trying things out."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click

from cloud.broker import Choice, start_broker


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
@click.option(
    "--kind",
    type=click.Choice(["auto", "mosquitto", "embedded"]),
    default="auto",
    show_default=True,
    help="auto: mosquitto where it is installed.",
)
def broker(state_dir: Path, port: int, users: tuple[str, ...], kind: Choice) -> None:
    """Run a broker with accounts and access rules until interrupted. Not for production."""
    accounts = {}
    for user in users:
        name, equals, password = user.partition("=")
        if not (name and equals and password):
            raise click.BadParameter(f"{user!r} is not NAME=PASSWORD", param_hint="--user")
        accounts[name] = password
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    with start_broker(state_dir, accounts, port=port, kind=kind) as running:
        click.echo(f"{running.kind} broker on {running.host}:{running.port}, for trying only")
        click.echo(f"accounts: {', '.join(accounts)}; Ctrl-C ends it")
        while not interrupted.wait(0.5):
            if running.process.poll() is not None:
                raise click.ClickException(
                    f"the broker ended by itself; see {state_dir / 'broker.log'}"
                )
