"""What keeps the training process within ``learner.max_memory``.

The trainer asks here how many samples it may run at once and where activations are kept. Memory is
measured (the process's resident set), not limited by the kernel: torch reserves far more address
space than it uses, and a failed allocation inside it says nothing a person can act on.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.blobs import write_durably
from edge_agent.errors import TrainingMemoryError

_MB: Final = 2**20
_PLAN: Final = "plan.json"
_SPILLED: Final = "activations.f16"
# Activations in memory take at most this part of what is free; the rest is for training steps.
_CACHE_SHARE: Final = 0.25
# The gradients of what a pass keeps are as large again, and the allocator keeps some slack.
_STEP_FACTOR: Final = 3.0
# Set aside for what comes after training: features, statistics, the packed bundle.
_AFTERWARDS: Final = 64 * _MB


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory the training process may take.

    Attributes:
        limit: Bytes.
    """

    limit: int

    @classmethod
    def of_megabytes(cls, megabytes: int) -> MemoryBudget:
        """A budget as the configuration states it."""
        return cls(megabytes * _MB)

    def check(self) -> None:
        """Refuse to go on when the process has taken more than it may.

        Raises:
            TrainingMemoryError: It has; the message names the setting.
        """
        peak = peak_bytes()
        if peak > self.limit:
            raise TrainingMemoryError(
                f"training took {peak // _MB} MB and learner.max_memory is {self.limit // _MB}; "
                f"set it to {_round_up(peak)} or more"
            )

    def free(self) -> int:
        """Bytes that may still be taken; negative when there are none."""
        return self.limit - _resident_bytes() - _AFTERWARDS

    def samples_at_once(self, bytes_a_sample: int, *, batch: int) -> int:
        """How many samples a training step may run at once.

        Args:
            bytes_a_sample: What one sample's pass keeps for its gradient.
            batch: Samples of a whole step; more are of no use.

        Raises:
            TrainingMemoryError: Not even one; the message names the setting.
        """
        needed = int(_STEP_FACTOR * bytes_a_sample)
        count = self.free() // max(needed, 1)
        if count < 1:
            least = _resident_bytes() + _AFTERWARDS + needed
            raise TrainingMemoryError(
                f"training takes {least // _MB} MB at least and learner.max_memory is "
                f"{self.limit // _MB}; set it to {_round_up(least)} or more"
            )
        return min(batch, count)

    def activations(self, directory: Path, count: int, shape: tuple[int, ...]) -> Activations:
        """A place for the activations of so many samples: memory where they fit, else a file.

        Args:
            directory: The job's directory, for the file.
            count: Samples.
            shape: Of one sample's activations.
        """
        if count * int(np.prod(shape)) * 2 <= _CACHE_SHARE * max(self.free(), 0):
            return np.empty((count, *shape), np.float16)
        return SpilledRows(directory / _SPILLED, count, shape)


class SpilledRows:
    """Activations in a file, float16; read as rows are asked for.

    Read and not mapped: a mapped file's pages count as the process's memory.

    Args:
        path: The file; what it held is lost.
        count: Rows.
        shape: Of one row.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._row_bytes = int(np.prod(shape)) * 2
        self._count = count
        self._file = path.open("w+b")
        self._file.truncate(count * self._row_bytes)

    def __len__(self) -> int:
        return self._count

    def __setitem__(self, rows: slice, values: NDArray[np.floating[Any]]) -> None:
        self._file.seek(rows.start * self._row_bytes)
        self._file.write(np.ascontiguousarray(values, dtype=np.float16).tobytes())

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        found = np.empty((len(rows), *self._shape), np.float16)
        for index, row in enumerate(rows):
            self._file.seek(int(row) * self._row_bytes)
            data = self._file.read(self._row_bytes)
            found[index] = np.frombuffer(data, np.float16).reshape(self._shape)
        return found


Activations = NDArray[np.float16] | SpilledRows


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some of the activations, numbered from 0; nothing is copied before it is asked for.

    Attributes:
        of: All activations.
        which: The chosen rows, int64 [n].
    """

    of: Activations
    which: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        return self.of[self.which[rows]]


def planned_micro_batch(directory: Path, choose: Callable[[], int]) -> int:
    """The number of samples run at once, chosen at a job's first start and kept for the others.

    Another number would round differently, and a resumed training must give the same weights.

    Args:
        directory: The job's directory.
        choose: Gives the number when none was kept yet.
    """
    path = directory / _PLAN
    if path.exists():
        return int(msgspec.json.decode(path.read_bytes(), type=dict[str, int])["micro_batch"])
    chosen = choose()
    write_durably(path, msgspec.json.encode({"micro_batch": chosen}))
    return chosen


def peak_bytes() -> int:
    """The most memory this process has had resident since it began."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    return pages * resource.getpagesize()


def _round_up(size: int) -> int:
    return -(-size // (64 * _MB)) * 64
