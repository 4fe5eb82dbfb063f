"""What is a merged adapter worth, next to the adapters it was made of?

Two tasks of ten classes from CIFAR-100, ViT-Tiny at 96 px, adapters in the last 4 of 12 blocks. For
each task an adapter is trained on 60 images a class, from a seed of its own, as two devices would;
`driftkeel merge`'s own function merges both bundles by every method with its default settings, none
of them tuned here, and measures them on 40 held-out images a class that neither adapter has seen.

    python -m benchmarks.merging --data DIR [--encoder DIR] [--out FILE]

One pair of tasks and one seed: differences of a point are chance (800 samples).
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from adapter_store.bundle import Bundle, Manifest, pack
from benchmarks.command import arguments, parsed, write
from benchmarks.tasks import Samples, SplitTask, build_package, circumstances, load_tasks
from edge_agent.fit import Labelled
from edge_agent.merge_cli import METHODS, way
from edge_agent.merged import merge_bundles
from edge_agent.objectives import CosineHead
from edge_agent.strategies.engine import Engine
from edge_agent.trainer_loop import Recipe
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from ood.calibration import score_quantiles
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics

RANKS: Final = {"bottleneck": 16, "lora": 8}
TRAINED_PER_CLASS: Final = 60
EPOCHS: Final = 15
HOLDOUT: Final = 0.5
_BATCH: Final = 32
# What the command takes where nothing is said.
DEFAULTS: Final = {"scale": None, "keep": 0.2, "drop": 0.5, "seed": 0, "rank": None, "weight": ()}


def divided(task: SplitTask) -> tuple[Samples, Labelled]:
    """What an adapter is trained on, and what is left for merging and measuring."""
    labels = np.array(task.train.labels)
    trained = np.zeros(len(labels), dtype=np.bool_)
    for name in np.unique(labels):
        trained[np.flatnonzero(labels == name)[:TRAINED_PER_CLASS]] = True
    rest = Labelled(
        np.concatenate([task.train.images[~trained], task.test.images]),
        (*labels[~trained], *task.test.labels),
    )
    return Samples(task.train.images[trained], tuple(labels[trained])), rest


def trained_bundle(engine: Engine, samples: Samples, seed: int) -> bytes:
    """An adapter trained on a task, as a bundle."""
    package = engine.package
    hidden = np.concatenate(
        [
            engine.sessions.prefix(prepare(samples.images[at : at + _BATCH], package))
            for at in range(0, len(samples.images), _BATCH)
        ]
    )
    base = engine.features(hidden)
    names, targets = np.unique(np.array(samples.labels), return_inverse=True)
    network = engine.network(hidden)
    head = np.stack([network[targets == k].mean(axis=0) for k in range(len(names))])
    tensors = engine.train(
        hidden, targets.astype(np.int64), engine.fresh(seed), CosineHead(head.astype(np.float32))
    )
    statistics = ClassStatistics.fit(base, samples.labels)
    own = engine.network(hidden, tensors)
    manifest = Manifest(
        encoder=package.digest,
        family=engine.family,
        rank=engine.rank,
        sites=package.sites,
        labels=statistics.labels,
        task=f"task {seed}",
        created_at=0.0,
        created_by="benchmark",
        samples=statistics.samples,
        score_quantiles=tuple(
            score_quantiles(MahalanobisScore.from_statistics([statistics]).score(base))
        ),
        codec="int8",
    )
    described = signature(base, seed=package.digest)
    own_statistics = ClassStatistics.fit(own, samples.labels)
    return pack(Bundle(manifest, tensors, statistics, own_statistics, described))


def measured(package: EncoderPackage, family: str, tasks: list[SplitTask]) -> dict[str, Any]:
    """Every method on one family: mean accuracy over both tasks' held-out samples."""
    recipe = Recipe(epochs=EPOCHS, batch_size=32, learning_rate=1e-3, seed=0)
    engine = Engine(package, recipe=recipe, family=family, rank=RANKS[family], threads=1)
    parts = [divided(task) for task in tasks]
    bundles = [trained_bundle(engine, part, seed) for seed, (part, _) in enumerate(parts)]
    rest = [samples for _, samples in parts]
    found: dict[str, Any] = {}
    for method in METHODS:
        if method == "weighted":  # by weights that somebody has to name
            continue
        made = merge_bundles(
            engine.sessions,
            bundles,
            rest,
            partial(way, {**DEFAULTS, "method": method}),
            created_at=0.0,
            created_by="benchmark",
            holdout=HOLDOUT,
        )
        found["no adapter"] = _mean([task.base for task in made.tasks])
        found["all installed"] = _mean([task.apart for task in made.tasks])
        found["no adapter, the merge's statistics"] = _mean(
            [task.statistics for task in made.tasks]
        )
        found[method] = _mean([task.merged for task in made.tasks])
        found[f"{method}, kept"] = round(made.kept, 4)
        print(family, method, found[method], found["no adapter"], found["all installed"])
    return found


def measure(package: EncoderPackage, data: Path) -> dict[str, Any]:
    """The whole report."""
    tasks = load_tasks(data, package, 2)
    return {
        "benchmark": "merging",
        **circumstances(package),
        "settings": {
            "epochs": EPOCHS,
            "ranks": RANKS,
            "trained_per_class": TRAINED_PER_CLASS,
            "holdout": HOLDOUT,
        },
        "families": {family: measured(package, family, tasks) for family in RANKS},
        "seed": [0, 1],
    }


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = arguments("The worth of merged adapters.", "merging", encoder="ViT-Tiny at 96 px")
    options = parsed(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        path = options.encoder or build_package(
            options.data, Path(folder) / "encoder", tuple(RANKS)
        )
        report = measure(EncoderPackage.load(path), options.data)
    write(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
