"""One run: one strategy learns one stream in this process, and what it did is measured.

The runner starts it, `python -m edge_agent.bench.worker SPEC`; the process is the run's own so that
its peak memory is. It prints a line of JSON after every task, and the result at the end.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.bench import metrics
from edge_agent.bench.activations import Activations
from edge_agent.bench.streams import StreamTask
from edge_agent.strategies import strategy
from edge_agent.strategies.base import Predictor, Task
from edge_agent.strategies.engine import Engine
from exporter.package import EncoderPackage
from ood.errors import DriftkeelError

if TYPE_CHECKING:
    from edge_agent.trainer_loop import Recipe

EXIT_REFUSED: Final = 2
_BATCH: Final = 128


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """How strategies train adapters unless they say otherwise.

    Attributes:
        family: The adapter family.
        rank: The adapters' rank.
        epochs: Passes over a task's samples.
        batch_size: Samples in a step.
        learning_rate: Peak learning rate.
        precision: Of the encoder's pass.
    """

    family: str = "bottleneck"
    rank: int = 16
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.003
    precision: Literal["float32", "bfloat16"] = "bfloat16"


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is to do.

    Attributes:
        strategy: Its name.
        seed: Seed of everything random in training.
        encoder: The encoder package's directory.
        hidden: The .npy file of the set's activations.
        prefix_ms: Milliseconds of the prefix a sample.
        stream: The .npz file `write_stream` wrote.
        training: How to train.
    """

    strategy: str
    seed: int
    encoder: str
    hidden: str
    prefix_ms: float
    stream: str
    training: Training


def write_stream(
    path: Path, tasks: tuple[StreamTask, ...], truth: NDArray[np.int64], names: tuple[str, ...]
) -> None:
    """Write what a worker needs to know of a stream.

    Args:
        path: The .npz file.
        tasks: The stream.
        truth: The class of each sample of the set, int64 [n].
        names: The classes' names.
    """
    arrays: dict[str, NDArray[Any]] = {"truth": truth, "names": np.array(names)}
    for number, task in enumerate(tasks):
        arrays |= {
            f"train{number}": task.train,
            f"labels{number}": task.labels,
            f"test{number}": task.test,
        }
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def measure(spec: Spec, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Learn every task, test after each, and return the measures.

    ``train_s`` counts from a task's activations to being ready to answer; ``eval_ms_per_sample``
    and ``passes_per_sample`` are of the tests after the last task, prefix included.
    """
    with np.load(spec.stream, allow_pickle=False) as stream:
        arrays = dict(stream)
    names, truth = arrays["names"].astype(object), arrays["truth"]
    count = sum(key.startswith("train") for key in arrays)
    tests = [arrays[f"test{t}"] for t in range(count)]
    sizes = [len(rows) for rows in tests]
    activations = Activations(Path(spec.hidden), spec.prefix_ms)
    learner = strategy(spec.strategy)
    engine = _engine(spec, trains=getattr(learner, "trains", True))
    final_only = bool(getattr(learner, "final_only", False))
    memory: Any = None
    train_s, eval_s, passes = 0.0, 0.0, 0.0
    correct: list[list[int] | None] = []
    for t in range(count):
        task = Task(
            number=t,
            hidden=activations.rows(arrays[f"train{t}"]),
            labels=tuple(names[arrays[f"labels{t}"]]),
            seed=1000 * spec.seed + t,
        )
        begun = time.perf_counter()
        memory = learner.learn(engine, memory, task)
        del task
        if final_only and t + 1 < count:
            train_s += time.perf_counter() - begun
            correct.append(None)
            continue
        predictor = learner.predictor(engine, memory)
        train_s += time.perf_counter() - begun
        eval_s, passes, right = 0.0, 0.0, []
        for rows in tests[: t + 1]:
            hits, seconds, cost = _tested(predictor, activations, rows, names[truth[rows]])
            right.append(hits)
            eval_s += seconds
            passes += cost
        correct.append(right)
        progress({"task": t + 1, "of": count, "accuracy": 100 * sum(right) / sum(sizes[: t + 1])})
    matrix = metrics.accuracy_matrix(correct, sizes)
    return {
        "accuracy_matrix": [[_rounded(value) for value in row] for row in matrix],
        "last": _rounded(metrics.last(matrix, sizes)),
        "average": _rounded(metrics.average(matrix, sizes)),
        "forgetting": _rounded(metrics.forgetting(matrix)),
        "train_s": _rounded(train_s),
        "eval_ms_per_sample": _rounded(spec.prefix_ms + 1000 * eval_s / sum(sizes)),
        "passes_per_sample": _rounded(passes / sum(sizes)),
        "bytes_per_task": round(learner.stored_bytes(memory) / count),
        "peak_memory_mb": _rounded(_peak_memory_mb()),
        "task_spread": _rounded(metrics.task_spread(matrix)),
        "seen": [_rounded(value) for value in metrics.seen_accuracies(matrix, sizes)],
    }


def _engine(spec: Spec, *, trains: bool) -> Engine:
    package = EncoderPackage.load(Path(spec.encoder))
    training = spec.training
    recipe: Recipe | None = None
    if trains:
        # Only here: a strategy that trains nothing runs, and is measured, without torch.
        from edge_agent.trainer_loop import Recipe  # noqa: PLC0415

        recipe = Recipe(
            epochs=training.epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            seed=spec.seed,
            precision=training.precision,
        )
    return Engine(package, recipe=recipe, family=training.family, rank=training.rank, threads=1)


def _tested(
    predictor: Predictor,
    activations: Activations,
    rows: NDArray[np.int64],
    truth: NDArray[Any],
) -> tuple[int, float, float]:
    """Right answers, seconds and passes of one task's tests."""
    labels = np.array(predictor.labels, dtype=object)
    hits, seconds, passes = 0, 0.0, 0.0
    for at in range(0, len(rows), _BATCH):
        hidden = activations.rows(rows[at : at + _BATCH]).astype(np.float32)
        begun = time.perf_counter()
        told = predictor.predict(hidden)
        seconds += time.perf_counter() - begun
        guessed = labels[told.probabilities.argmax(axis=1)]
        hits += int(np.count_nonzero(guessed == truth[at : at + _BATCH]))
        passes += float(told.passes.sum())
    return hits, seconds, passes


def _peak_memory_mb() -> float:
    # Linux keeps a parent's peak in ru_maxrss over fork and exec; VmHWM is of this program alone.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(path: str) -> int:
    """Run a spec; progress, then ``result`` or ``error``, as lines of JSON on stdout."""
    spec = msgspec.json.decode(Path(path).read_bytes(), type=Spec)
    try:
        _tell({"result": measure(spec, _tell)})
    except DriftkeelError as error:
        _tell({"error": str(error)})
        return EXIT_REFUSED
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "onnx", "onnxscript"}:
            raise
        _tell({"error": f"needs {error.name}, which is missing; pip install 'driftkeel[train]'"})
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
