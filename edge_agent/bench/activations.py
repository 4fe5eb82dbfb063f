"""Prefix activations of a labelled set on disk: computed once per encoder, read row by row.

The runner fills the cache, workers read it. Rows are read with plain file reads, not by mapping
the file, so that a worker's peak memory is what its strategy needs and not what others left in
the page cache.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.blobs import write_durably
from edge_agent.bench.datasets import LabelledSet
from edge_agent.errors import BenchmarkError
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions

_CHUNK: Final = 256
_TIMED: Final = 64
_HALF_MAX: Final = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Activations:
    """A set's activations on disk, float16 [n, *shape].

    Attributes:
        path: The .npy file.
        prefix_ms: Milliseconds the prefix takes a sample on one thread.
    """

    path: Path
    prefix_ms: float

    def rows(self, wanted: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read rows, in the order asked for: float16 [len(wanted), *shape]."""
        with self.path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            assert version == (1, 0), version
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start, descriptor = file.tell(), file.fileno()
            found = np.empty((len(wanted), *shape[1:]), dtype)
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for place, row in enumerate(wanted):
                part = os.pread(descriptor, size, start + int(row) * size)
                found[place] = np.frombuffer(part, dtype).reshape(shape[1:])
        return found


def cached(
    data: LabelledSet,
    package: EncoderPackage,
    cache: Path,
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Activations:
    """The set's activations, computed where they are not on disk yet; carries on where it was cut.

    Args:
        data: The set.
        package: The encoder.
        cache: The directory of all caches.
        threads: Threads to compute with.
        progress: Told how many more samples are done.
    """
    folder = cache / "activations" / f"{package.digest[:16]}-{data.digest[:16]}"
    path, about = folder / "hidden.npy", folder / "about.json"
    with _locked(folder):
        state = _state(about)
        shape = (len(data), *package.hidden_shape)
        done = int(state.get("done", 0)) if path.exists() else 0
        if done == len(data):
            return Activations(path, float(state["prefix_ms"]))
        values: np.memmap[Any, Any] = np.lib.format.open_memmap(
            path, "r+" if done else "w+", None if done else np.float16, None if done else shape
        )
        sessions = EncoderSessions(package, threads=threads)
        progress(done)
        for start in range(done, len(data), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(data)))
            hidden = sessions.prefix(prepare(data.read(rows, package.image_size), package))
            values[rows] = np.clip(hidden, -_HALF_MAX, _HALF_MAX)
            values.flush()
            _note(about, {"done": int(rows[-1]) + 1})
            progress(len(rows))
        prefix_ms = _time_prefix(data, package)
        _note(about, {"done": len(data), "prefix_ms": prefix_ms, "set": data.name})
    return Activations(path, prefix_ms)


def _time_prefix(data: LabelledSet, package: EncoderPackage) -> float:
    sessions = EncoderSessions(package, threads=1)
    images = prepare(data.read(np.arange(min(_TIMED, len(data))), package.image_size), package)
    sessions.prefix(images[:1])
    begun = time.perf_counter()
    sessions.prefix(images)
    return 1000 * (time.perf_counter() - begun) / len(images)


def _state(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _note(path: Path, state: dict[str, Any]) -> None:
    write_durably(path, json.dumps(state).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder, so that two benchmarks at once compute a set one time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise BenchmarkError(
            f"cannot use {folder}: {error.strerror}; give another directory with --cache"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
