"""Is an adapter that is trained on a quantised encoder worth as much as one on the original?

    python -m benchmarks.quantised_adapters --data DIR [--encoder DIR] [--tasks N] [--out FILE]

A bottleneck adapter is trained for each of the first tasks of ten classes of the CIFAR-100 subset,
twice by the same recipe: on the encoder, and on its int8 copy, whose prefix gives the activations
and whose graphs give every feature that is judged, while gradients come from the original's suffix.
Reported is the accuracy of the Gaussian head in the network's own output, without and with it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.command import arguments, parsed, write
from benchmarks.quantised_page import ADAPTERS, write_adapters
from benchmarks.tasks import SplitTask, circumstances, load_tasks, shared_covariance_accuracy
from edge_agent.objectives import CosineHead
from edge_agent.strategies.engine import Engine
from edge_agent.trainer_loop import Recipe
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from exporter.quantise import quantise

RANK: Final = 16
RECIPE: Final = Recipe(epochs=10, batch_size=32, learning_rate=0.003, seed=0, precision="bfloat16")


def accuracies(engine: Engine, task: SplitTask) -> dict[str, float]:
    """Percent right on a task's test samples, without an adapter and with a trained one."""
    hidden, test = (
        engine.sessions.prefix(prepare(part.images, engine.package))
        for part in (task.train, task.test)
    )
    base = engine.network(hidden)
    targets = task.train.targets
    means = np.stack([base[targets == k].mean(axis=0) for k in range(len(task.train.names))])
    tensors = engine.train(
        hidden, targets, engine.fresh(RECIPE.seed), CosineHead(means.astype(np.float32))
    )
    found = {}
    for name, given in (("without", None), ("with", tensors)):
        features = [engine.network(rows, given) for rows in (hidden, test)]
        found[name] = 100 * shared_covariance_accuracy(features[0], task, features[1])
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report and the page's section."""
    parser = arguments("Adapters on a quantised encoder.", ADAPTERS, encoder="the default one")
    parser.add_argument("--tasks", type=int, default=3, help="the first so many")
    options = parsed(parser, argv)
    package = EncoderPackage.load(options.encoder) if options.encoder else default_encoder_package()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        made = quantise(package, Path(folder) / "int8")
        for number, task in enumerate(load_tasks(options.data, package, options.tasks)):
            row: dict[str, Any] = {"task": number, "test_samples": len(task.test.labels)}
            for name, encoder in (("float32", package), ("int8", made)):
                row[name] = accuracies(Engine(encoder, recipe=RECIPE, rank=RANK), task)
            print(row, flush=True)
            rows.append(row)
    report = {
        "benchmark": ADAPTERS,
        **circumstances(package),
        "recipe": RECIPE,
        "rank": RANK,
        "tasks": rows,
    }
    write(report, options.out)
    write_adapters(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
