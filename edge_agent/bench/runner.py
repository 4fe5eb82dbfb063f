"""Runs strategies over streams: each run in a process of its own, several at once, resumable.

The commands plan runs with `plan` and carry them out with `execute`. A run whose result is on disk
under the same settings is not run again; one that fails is told and the others go on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from adapter_store.blobs import write_durably
from edge_agent.bench.activations import Activations
from edge_agent.bench.datasets import Column, LabelledSet
from edge_agent.bench.streams import StreamSettings, StreamTask, build
from edge_agent.bench.worker import Spec, Training, write_stream
from exporter.package import EncoderPackage

# One thread a run: two runs side by side are faster than two threads in each.
_LIBRARIES: Final = ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
_ONE_THREAD: Final = {"GOMP_SPINCOUNT": "0"} | {f"{name}_NUM_THREADS": "1" for name in _LIBRARIES}
_LAST_LINES: Final = 5


@dataclass(frozen=True, eq=False)
class Run:
    """One strategy over one stream.

    Attributes:
        suite: The stream's name.
        strategy: The strategy's name.
        seed: The run's seed.
        settings: Everything that decides the result, as JSON holds it.
        tasks: The stream.
        classes: The classes of the set.
        activations: The set's activations.
        encoder: The encoder package's directory.
        training: How to train.
    """

    suite: str
    strategy: str
    seed: int
    settings: dict[str, Any]
    tasks: tuple[StreamTask, ...]
    classes: Column
    activations: Activations
    encoder: Path
    training: Training

    @property
    def file(self) -> Path:
        """Where the result lies under the directory of results."""
        return Path(self.suite) / f"{self.strategy}-{self.seed}.json"


@dataclass(frozen=True)
class Outcome:
    """What came of a run: a result, or why there is none."""

    run: Run
    result: dict[str, Any] | None
    error: str = ""


class Watcher(Protocol):
    """Is told what happens; called from several threads."""

    def started(self, run: Run) -> None:
        """A run begins."""

    def advanced(self, run: Run, task: int, of: int, accuracy: float) -> None:
        """A run has learned and tested a task."""

    def finished(self, outcome: Outcome, *, kept: bool) -> None:
        """A run has ended; ``kept`` when its result was there already."""


def plan(
    suite: str,
    data: LabelledSet,
    settings: StreamSettings,
    *,
    domain_key: str | None,
    package: EncoderPackage,
    activations: Activations,
    training: Training,
    strategies: Sequence[str],
) -> list[Run]:
    """The runs of one stream, one a strategy.

    Raises:
        BenchmarkError: The stream cannot be made of this set.
    """
    domains = None if settings.kind == "class" else data.domain(domain_key)
    tasks = build(data.classes, data.test, domains, settings)
    told = {
        "data": {"name": data.name, "digest": data.digest},
        "encoder": {"name": package.name, "digest": package.digest},
        "stream": {**asdict(settings), "domain_order": list(settings.domain_order)},
        "domain_key": domain_key,
        "tasks": [
            {"name": task.name, "train": len(task.train), "test": len(task.test)} for task in tasks
        ],
        "classes": len(data.classes.names),
        "training": msgspec.to_builtins(training),
        "threads": 1,
        "units": {"accuracy_matrix, last, average": "%", "forgetting": "points"},
    }
    return [
        Run(
            suite,
            name,
            settings.seed,
            told,
            tasks,
            data.classes,
            activations,
            package.path,
            training,
        )
        for name in strategies
    ]


def execute(
    runs: Sequence[Run], out: Path, *, jobs: int, watcher: Watcher, fresh: bool = False
) -> list[Outcome]:
    """Carry out runs, ``jobs`` at once, writing each result to ``out``.

    Args:
        runs: What to run.
        out: The directory of results.
        jobs: Processes at once.
        watcher: Told what happens.
        fresh: Run also what is there already.
    """
    children: set[subprocess.Popen[str]] = set()
    stopping = threading.Event()

    def one(run: Run) -> Outcome:
        kept = None if fresh else _kept(run, out)
        if kept is not None:
            outcome = Outcome(run, kept)
        elif stopping.is_set():
            return Outcome(run, None, "interrupted")
        else:
            watcher.started(run)
            outcome = _carried_out(run, out, watcher, children)
        watcher.finished(outcome, kept=kept is not None)
        return outcome

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            return list(pool.map(one, runs))
        except BaseException:
            stopping.set()
            for child in list(children):
                child.terminate()
            raise


def machine() -> dict[str, Any]:
    """The machine the numbers are of."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of what computes; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for name in ("driftkeel", "numpy", "onnxruntime", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _kept(run: Run, out: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((out / run.file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("settings") == run.settings else None


def _carried_out(
    run: Run, out: Path, watcher: Watcher, children: set[subprocess.Popen[str]]
) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="driftkeel-bench-") as folder:
        stream, spec = Path(folder) / "stream.npz", Path(folder) / "spec.json"
        write_stream(stream, run.tasks, run.classes.index, run.classes.names)
        spec.write_bytes(
            msgspec.json.encode(
                Spec(
                    strategy=run.strategy,
                    seed=run.seed,
                    encoder=str(run.encoder),
                    hidden=str(run.activations.path),
                    prefix_ms=run.activations.prefix_ms,
                    stream=str(stream),
                    training=run.training,
                )
            )
        )
        measured, error = _worker(
            spec,
            children,
            lambda line: watcher.advanced(run, line["task"], line["of"], line["accuracy"]),
        )
    if measured is None:
        return Outcome(run, None, error)
    result = {
        "suite": run.suite,
        "strategy": run.strategy,
        "seed": run.seed,
        **measured,
        "settings": run.settings,
        "versions": versions(),
        "machine": machine(),
    }
    path = out / run.file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(result, indent=1).encode() + b"\n")
    return Outcome(run, result)


def _worker(
    spec: Path,
    children: set[subprocess.Popen[str]],
    progress: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Any] | None, str]:
    """Run the worker's process; its measures, or what went wrong."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "edge_agent.bench.worker", str(spec)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **_ONE_THREAD},
        ) as child,
    ):
        children.add(child)
        result: dict[str, Any] | None = None
        error = ""
        assert child.stdout is not None
        for text in child.stdout:
            try:
                line = json.loads(text)
            except ValueError:  # something a library printed
                continue
            if "result" in line:
                result = line["result"]
            elif "error" in line:
                error = line["error"]
            else:
                progress(line)
        status = child.wait()
        children.discard(child)
        if status == 0 and result is not None:
            return result, ""
        errors.seek(0)
        trace = "\n".join(deque((line.rstrip() for line in errors), maxlen=_LAST_LINES))
        return None, error or f"its process ended with status {status}\n{trace}".rstrip()
