"""Waiting in the end-to-end tests: ask until a deadline, never sleep and hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from examples.demo.stage import Child

T = TypeVar("T")

# Long enough for a machine that runs other things, too: nothing waits for it when all is well.
WAIT_S: Final = 90.0


def until(probe: Callable[[], T | None], what: str, *alive: Child, every_s: float = 0.05) -> T:
    """Ask until there is an answer that counts, while the processes it needs live."""
    deadline = time.monotonic() + WAIT_S
    while True:
        value = probe()
        if value:
            return value
        for child in alive:
            child.check()
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for {what}"
        time.sleep(every_s)
