"""The ``driftkeel`` command: finds its subcommands in the installed packages and runs one.

A package offers a subcommand through the entry-point group ``driftkeel.commands``; it is imported
only when called, so ``driftkeel shell`` on an operator's laptop needs nothing of the device's.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points, version

import click

from ood.errors import DriftkeelError

_SUMMARIES = {
    "agent": "Run the on-device daemon, or prepare its first generation.",
    "bench": "Measure how strategies learn and forget.",
    "broker": "Run an MQTT broker for trying things out.",
    "catalogue": "Run the cloud catalogue of adapters.",
    "encoder": "Build and inspect encoder packages.",
    "export": "Write one adapter, or a whole generation, as an ONNX file.",
    "families": "Compare adapter families on a labelled set.",
    "merge": "Merge several adapters into one.",
    "ood": "Say why a shift alarm fired.",
    "shell": "Operate the fleet: approve adapters, roll devices back.",
    "tune": "Find how this machine runs the encoder fastest, and keep it.",
}

# The optional packages, and the extra that brings each.
_EXTRAS = {
    "httpx": "cloud",
    "matplotlib": "demo",
    "onnx": "train",
    "onnxscript": "train",
    "prompt_toolkit": "cloud",
    "torch": "train",
}


class _Commands(click.Group):
    """A group whose commands are entry points, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(_installed())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        entry = _installed().get(cmd_name)
        if entry is None:
            return None
        command: click.Command = entry.load()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        rows = [(name, _SUMMARIES.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="driftkeel.commands")}


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("driftkeel"), prog_name="driftkeel")
def driftkeel() -> None:
    """Keep frozen models useful on devices whose world drifts."""


def main() -> None:
    """Run the command line; a DriftkeelError becomes one line on stderr and exit status 1."""
    # NumPy reads it when it is imported. What is multiplied here is small: further threads of its
    # library would take memory, and time from the encoder.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        driftkeel.main(prog_name="driftkeel")
    except DriftkeelError as error:
        click.echo(f"driftkeel: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        click.echo(
            f"driftkeel: this needs the package {error.name!r}, which is not installed; "
            f"pip install 'driftkeel[{extra}]'",
            err=True,
        )
        sys.exit(1)
