"""What the operator wants of this device, kept where a restart finds it.

The conductor writes it before it obeys and again once it has; a device killed in between obeys at
its next start.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from adapter_store.state import StateDir

_KEY = "desired"


@dataclass(frozen=True)
class DesiredState:
    """The newest wish taken in.

    Attributes:
        version: Its version; 0 before the first.
        generation: The generation to run; None leaves the choice to the device.
        pinned: The device activates nothing by itself.
        applied: It was obeyed, or could not be and ``problem`` says why.
        problem: Why what runs is not what is wanted; empty when it is.
    """

    version: int = 0
    generation: int | None = None
    pinned: bool = False
    applied: bool = False
    problem: str = ""

    @classmethod
    def load(cls, state: StateDir) -> DesiredState:
        """The wish kept in the device's state; nothing wished for, on a new device."""
        kept = state.settings.get(_KEY)
        return cls(applied=True) if kept is None else msgspec.convert(kept, cls)

    def save(self, state: StateDir) -> None:
        """Keep it durably.

        Raises:
            DiskFullError: It could not be written.
        """
        state.settings.put(_KEY, msgspec.to_builtins(self))
