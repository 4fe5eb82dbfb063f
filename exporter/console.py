"""What the exporter's commands share: progress on standard error, and naming a missing extra."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


def progress() -> Callable[[str], None]:
    """A line printer that says how long it has been since it was made."""
    start = time.monotonic()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - start:5.1f} s] {line}", err=True)

    return say


@contextmanager
def training_extra() -> Iterator[None]:
    """Turns a missing package into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"this needs the package {error.name!r}, which is not installed; "
            "install driftkeel[train]"
        ) from error
