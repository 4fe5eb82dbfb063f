"""How much of `driftkeel` is its head, and how much the features of several depths it works on?

Every head that trains no adapter learns every stream of the published suite, once on the network's
own output, as the published methods do, and once on features of all depths. With them goes a
stream that no setting was ever chosen on: MNIST in five tasks of two digits.

    python -m benchmarks.statistics_heads --data DIR [--encoder DIR] [--out FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import arguments, parsed, write
from benchmarks.tasks import circumstances
from edge_agent.bench import activations, datasets, suite
from edge_agent.bench.streams import StreamSettings, StreamTask, build
from edge_agent.strategies import Strategy, Task, strategy
from edge_agent.strategies.engine import Engine
from exporter.package import EncoderPackage

Floats = NDArray[np.float32]
UNSEEN: Final = suite.Suite(
    "mnist",
    "MNIST, 5 tasks of 2 digits",
    "mnist-small.npz",
    StreamSettings(kind="class", init=2, increment=2),
)
_BATCH: Final = 256


class KnownFeatures(Engine):
    """An engine that looks features up: what it is given as activations are samples' numbers.

    Args:
        package: The encoder.
        table: The features of all samples of a set, float32 [n, d], whichever heads shall see.
    """

    def __init__(self, package: EncoderPackage, table: Floats) -> None:
        super().__init__(package)
        self._table = table

    def features(self, hidden: NDArray[np.floating[Any]]) -> Floats:
        """The features of samples [n, 1]."""
        found: Floats = self._table[hidden[:, 0].astype(np.int64)]
        return found

    def network(
        self,
        hidden: NDArray[np.floating[Any]],
        tensors: Mapping[str, Floats] | None = None,
        family: str | None = None,
    ) -> Floats:
        """The same: which features they are was decided in the beginning."""
        assert tensors is None, "only for strategies that train nothing"
        assert family is None, "only for strategies that train nothing"
        return self.features(hidden)


def accuracy(
    learner: Strategy[Any], engine: Engine, tasks: tuple[StreamTask, ...], classes: datasets.Column
) -> float:
    """Percent right of all tests, after the last task."""
    memory: Any = None
    names = np.array(classes.names, dtype=object)
    for number, task in enumerate(tasks):
        hidden = task.train[:, None].astype(np.float64)
        memory = learner.learn(engine, memory, Task(number, hidden, tuple(names[task.labels]), 0))
    predictor = learner.predictor(engine, memory)
    labels = np.array(predictor.labels, dtype=object)
    rows = np.concatenate([task.test for task in tasks])
    found = [
        labels[predictor.predict(part[:, None].astype(np.float64)).probabilities.argmax(axis=1)]
        for part in np.array_split(rows, max(1, len(rows) // _BATCH))
    ]
    return float(100 * np.mean(np.concatenate(found) == names[classes.index[rows]]))


def measure(data: Path, cache: Path, package: EncoderPackage) -> dict[str, dict[str, float]]:
    """Accuracy after the last task, by stream and head."""
    results: dict[str, dict[str, float]] = {}
    tables: dict[str, dict[str, Floats]] = {}
    for stream in (*suite.SUITES.values(), UNSEEN):
        loaded = datasets.load(suite.set_file(stream, data))
        if loaded.name not in tables:
            stored = activations.cached(loaded, package, cache)
            engine, everything = Engine(package), np.arange(len(loaded))
            batches = [
                stored.rows(everything[at : at + _BATCH]) for at in range(0, len(loaded), _BATCH)
            ]
            tables[loaded.name] = {
                "own output": np.concatenate([engine.network(batch) for batch in batches]),
                "several depths": np.concatenate([engine.features(batch) for batch in batches]),
            }
        settings = stream.settings(0)
        domains = None if settings.kind == "class" else loaded.domain(stream.domain_key)
        tasks = build(loaded.classes, loaded.test, domains, settings)
        found: dict[str, float] = {}
        for features, table in tables[loaded.name].items():
            engine = KnownFeatures(package, table)
            for name in ("frozen", "ridge", "driftkeel"):
                percent = accuracy(strategy(name), engine, tasks, loaded.classes)
                found[f"{name}, {features}"] = round(percent, 2)
        results[stream.name] = found
        print(f"{stream.title}: {found}", flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = arguments(
        "What heads without adapters reach.", "statistics_heads", encoder="ViT-Tiny at 96 px"
    )
    parser.add_argument("--cache", type=Path, help="where activations are kept; nowhere if absent")
    options = parsed(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        package = (
            EncoderPackage.load(options.encoder)
            if options.encoder
            else suite.suite_encoder(options.data, cache, progress=print)
        )
        report = {
            "benchmark": "statistics_heads",
            **circumstances(package),
            "accuracy": measure(options.data, cache, package),
        }
    write(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
