"""Starts the training process, keeps it going, and says how it ended.

The conductor calls it. It imports no torch: training is another process (:mod:`edge_agent.trainer`)
on a job directory, so a training that is killed, or a daemon that is, costs at most one epoch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.training_job import (
    EXIT_DONE,
    EXIT_REFUSED,
    EXIT_UNAVAILABLE,
    FAILURE,
    RESULT,
    read_progress,
)

_STARTS: Final = 5
_TAIL_BYTES: Final = 2000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        name: The job.
        bundle: The packed bundle; None when there is none.
        reason: Why there is none.
        unavailable: This device cannot train at all.
    """

    name: str
    bundle: bytes | None
    reason: str = ""
    unavailable: bool = False


class Learner:
    """Runs one training at a time.

    Args:
        directory: Holds one directory a job.
        on_end: Called once a training with how it ended, on a thread of the learner's; not called
            for a training that was cancelled or stopped.
        threads: Threads the training may use.
        max_seconds: Budget the trainer keeps to by itself; it is killed when it does not.
        command: The trainer's command line before the job's directory and the daemon's pid.
    """

    def __init__(
        self,
        directory: Path,
        on_end: Callable[[Outcome], None],
        *,
        threads: int = 1,
        max_seconds: float = 600.0,
        command: Sequence[str] = (sys.executable, "-m", "edge_agent.trainer"),
    ) -> None:
        self.directory = directory
        self._on_end = on_end
        self._threads = threads
        self._kill_after_s = 2.0 * max_seconds + 300.0
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._run: _Run | None = None

    def job_directory(self, name: str) -> Path:
        """Where the job of that name is, or is to be written."""
        return self.directory / name

    def start(self, name: str) -> None:
        """Train the job of that name (carry on with it); nothing happens when it already runs."""
        with self._lock:
            if self._run is not None:
                if self._run.name == name and self._run.thread.is_alive():
                    return
                self._run.stop()
            self._run = _Run(name, threading.Event())
            self._run.thread = threading.Thread(
                target=self._watch, args=(self._run,), name=f"learner-{name}", daemon=True
            )
            self._run.thread.start()

    def stop(self) -> None:
        """Kill the trainer, if any; the job stays and can be carried on with."""
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            run.stop()
            run.thread.join()

    def discard(self, *, keep: str = "") -> None:
        """Stop, and remove every job but ``keep``'s."""
        with self._lock:
            running = self._run.name if self._run is not None else ""
        if running and running != keep:
            self.stop()
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if path.name != keep:
                    shutil.rmtree(path, ignore_errors=True)

    def progress(self) -> dict[str, Any]:
        """The running training's newest progress; empty when none runs."""
        run = self._run
        if run is None or not run.thread.is_alive():
            return {}
        return {"job": run.name, **read_progress(self.job_directory(run.name))}

    def _watch(self, run: _Run) -> None:
        directory = self.job_directory(run.name)
        reason = ""
        for start in range(1, _STARTS + 1):
            if run.stopping.is_set():
                return
            try:
                status = self._run_once(run, directory)
            except OSError as error:
                reason = f"the trainer cannot be started: {error}"
                status = None
            if run.stopping.is_set():
                return
            if status in (EXIT_DONE, EXIT_REFUSED, EXIT_UNAVAILABLE):
                outcome = _outcome(run.name, directory, status)
                if outcome is not None:
                    self._on_end(outcome)
                    return
            if status is not None:
                reason = f"the trainer ended with status {status}: {_tail(directory)}"
            log.warning("training %s, start %d of %d: %s", run.name, start, _STARTS, reason)
            if run.stopping.wait(min(0.2 * 4 ** (start - 1), 10.0)):
                return
        self._on_end(Outcome(run.name, None, reason))

    def _run_once(self, run: _Run, directory: Path) -> int:
        threads = str(self._threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "GOMP_SPINCOUNT": "0",
        }
        with (directory / "trainer.log").open("ab") as output:
            # Started on the thread that waits: the kernel ties the trainer's life to this thread.
            process = subprocess.Popen(
                [*self._command, str(directory), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
            if not run.adopt(process):
                return process.wait()
            try:
                return process.wait(timeout=self._kill_after_s)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()


class _Run:
    """One training under way: its process, and the wish to stop it."""

    def __init__(self, name: str, stopping: threading.Event) -> None:
        self.name = name
        self.stopping = stopping
        self.thread = threading.Thread()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def adopt(self, process: subprocess.Popen[bytes]) -> bool:
        """Remember the process; False (and it is killed) when stopping was asked for already."""
        with self._lock:
            self._process = process
            if self.stopping.is_set():
                process.kill()
                return False
            return True

    def stop(self) -> None:
        with self._lock:
            self.stopping.set()
            if self._process is not None and self._process.poll() is None:
                self._process.kill()


def _outcome(name: str, directory: Path, status: int) -> Outcome | None:
    """What the directory says; None when it does not say what the status promised."""
    if status == EXIT_DONE:
        with contextlib.suppress(OSError):
            return Outcome(name, (directory / RESULT).read_bytes())
        return None
    try:
        said = msgspec.json.decode((directory / FAILURE).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return None
    return Outcome(
        name, None, said.get("reason", "no reason given"), unavailable=status == EXIT_UNAVAILABLE
    )


def _tail(directory: Path) -> str:
    try:
        text = (directory / "trainer.log").read_bytes()[-_TAIL_BYTES:]
    except OSError:
        return ""
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
