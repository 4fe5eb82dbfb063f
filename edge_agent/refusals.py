"""Frames that were no picture: one is the sender's mistake, many in a row are the sensor's fault.

The HTTP API notes every frame it refuses, the agent every one it answers; status, report and
diagnosis read what that comes to. Several threads call it at once: a count may then miss one frame.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

# So many frames in a row that are no picture, and the operator hears of it.
_IN_A_ROW: Final = 16
_KEPT: Final = 2048

log = logging.getLogger(__name__)


class Refusals:
    """What was refused lately.

    Args:
        clock: Seconds since the epoch.

    Attributes:
        count: How many frames were refused since the start.
        problem: Why the last frames, many in a row, could not be used; empty when they can.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.count = 0
        self.problem = ""
        self._clock = clock
        self._at: deque[float] = deque(maxlen=_KEPT)
        self._in_a_row = 0

    def note(self, reason: str) -> None:
        """Note a frame that was no picture: NaN, out of range, damaged."""
        self.count += 1
        self._at.append(self._clock())
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            if not self.problem:
                log.error("sensor fault: %d frames in a row refused", self._in_a_row)
            self.problem = (
                f"sensor fault: {self._in_a_row} frames in a row were no picture; the last: "
                f"{reason}"
            )

    def end(self) -> None:
        """Note a frame that was one: what was wrong is over."""
        self._in_a_row, self.problem = 0, ""

    def since(self, at: float) -> int:
        """How many frames were refused since a moment, in seconds since the epoch."""
        return sum(moment >= at for moment in list(self._at))
