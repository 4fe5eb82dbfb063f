"""Do the training-free proxies order adapters as training them does?

Candidates over families, sites and ranks are scored on one minibatch and then trained, on the first
20 classes of the CIFAR-100 subset in a fixed order; reported is Spearman's rank correlation
between scores and the accuracy of a Gaussian head in each trained adapter's space.

    python -m benchmarks.zero_shot --data DIR [--encoder DIR] [--out FILE]
"""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import SET, arguments, parsed, write
from edge_agent.objectives import CosineHead
from edge_agent.search.candidates import (
    Budget,
    Candidate,
    family_sites,
    first_tensors,
)
from edge_agent.search.proxies import Minibatch
from edge_agent.search.ranking import Ranked, rank_candidates, spearman
from edge_agent.strategies.ear import AtSites
from edge_agent.strategies.engine import Engine
from edge_agent.trainer_loop import Recipe
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from ood.statistics import ClassStatistics, GaussianHead

BATCH = 64
CLASSES = 20
RANKS = (2, 8, 32)
SEED = 0
RECIPE = Recipe(
    epochs=5, batch_size=48, learning_rate=5e-3, seed=SEED, max_seconds=3600, precision="bfloat16"
)


def candidates(package: EncoderPackage) -> list[Candidate]:
    """Every family at all sites, either half and the last site, at three ranks where it has one."""
    found = []
    for family in package.families:
        every = family_sites(package, family)
        half = len(every) // 2
        shapes = package.family(family).tensors.values()
        ranks = RANKS if any("rank" in shape for shape in shapes) else RANKS[:1]
        places = dict.fromkeys((every, every[:half], every[half:], every[-1:]))
        found += [Candidate(family, sites, rank) for sites in places if sites for rank in ranks]
    return found


def activations(engine: Engine, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Prefix activations of uint8 images [n, h, w, 3]."""
    parts = [
        engine.sessions.prefix(prepare(images[at : at + BATCH], engine.package))
        for at in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts).astype(np.float16)


class Data:
    """The first classes of the subset in the benchmark's order, as activations and names."""

    def __init__(self, engine: Engine, path: Path) -> None:
        order = np.random.RandomState(1993).permutation(100)[:CLASSES]
        with np.load(path) as file:
            parts = {
                part: (file[f"x_{part}"], file[f"y_{part}"].astype(np.int64))
                for part in ("train", "test")
            }
        chosen = {}
        for part, (images, classes) in parts.items():
            rows = np.flatnonzero(np.isin(classes, order))
            chosen[part] = activations(engine, images[rows]), classes[rows]
        self.train, self.test = chosen["train"][0], chosen["test"][0]
        names, self.targets = np.unique(chosen["train"][1], return_inverse=True)
        self.truth = np.searchsorted(names, chosen["test"][1])


def trained_accuracy(engine: Engine, data: Data, candidate: Candidate) -> float:
    """Train a candidate and fit a Gaussian head in its space; the accuracy on the test part."""
    base = engine.network(data.train)
    rows = np.stack([base[data.targets == k].mean(axis=0) for k in range(CLASSES)])
    initial = first_tensors(engine.package, candidate, SEED)
    objective = AtSites(CosineHead(rows.astype(np.float32)), initial, candidate)
    tensors = engine.train(data.train, data.targets.astype(np.int64), initial, objective)
    train, test = (engine.network(hidden, tensors) for hidden in (data.train, data.test))
    statistics = ClassStatistics.fit(train, [f"{k:02d}" for k in data.targets])
    head = GaussianHead.from_statistics([statistics])
    found = head.label_probabilities(head.log_likelihoods(test)).argmax(axis=1)
    return float((found == data.truth).mean())


def measure(package: EncoderPackage, path: Path) -> dict[str, Any]:
    """Score, train, correlate."""
    engines = {
        name: Engine(package, recipe=RECIPE, family=name, threads=1) for name in package.families
    }
    any_engine = next(iter(engines.values()))
    data = Data(any_engine, path)
    base = any_engine.network(data.train)
    rows = np.random.default_rng(SEED).permutation(len(data.targets))[:BATCH]
    batch = Minibatch(
        data.train[rows].astype(np.float32),
        data.targets[rows].astype(np.int64),
        np.stack([base[data.targets == k].mean(axis=0) for k in range(CLASSES)]).astype(np.float32),
    )
    begun = time.perf_counter()
    ranked = rank_candidates(
        package,
        lambda name: engines[name].program,
        batch,
        candidates(package),
        budget=Budget(max_parameters=10**9),
        seed=SEED,
        chosen=("activations", "gradient", "spectral"),
    )
    search_s = time.perf_counter() - begun
    begun = time.perf_counter()
    accuracies = []
    for item in ranked:
        accuracies.append(trained_accuracy(engines[item.candidate.family], data, item.candidate))
        chosen = item.candidate
        print(f"{chosen.family} {len(chosen.sites)} sites rank {chosen.rank}: {accuracies[-1]:.4f}")
    return {
        "benchmark": "zero_shot",
        "encoder": {"name": package.name, "digest": package.digest},
        "settings": {
            "data": "cifar100_small",
            "classes": CLASSES,
            "samples": len(data.targets),
            "epochs": RECIPE.epochs,
            "learning_rate": RECIPE.learning_rate,
            "minibatch": BATCH,
        },
        "spearman": correlations(ranked, accuracies),
        "spearman_within_family": {
            name: correlations(
                [r for r in ranked if r.candidate.family == name],
                [a for r, a in zip(ranked, accuracies, strict=True) if r.candidate.family == name],
            )
            for name in package.families
        },
        "candidates": [
            {
                "family": item.candidate.family,
                "sites": list(item.candidate.sites),
                "rank": item.candidate.rank,
                "parameters": item.parameters,
                "scores": dict(item.scores),
                "accuracy": accuracy,
            }
            for item, accuracy in zip(ranked, accuracies, strict=True)
        ],
        "search_s": round(search_s, 1),
        "train_s": round(time.perf_counter() - begun, 1),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "torch")},
        "seed": SEED,
    }


def correlations(ranked: list[Ranked], accuracies: list[float]) -> dict[str, float]:
    """Rank correlation of each proxy, of the search's pair, and of size alone, with accuracy."""
    found = {
        proxy: spearman([item.scores[proxy] for item in ranked], accuracies)
        for proxy in ranked[0].scores
    }
    pair = [
        sum(
            sum(other.scores[proxy] <= item.scores[proxy] for other in ranked)
            for proxy in ("activations", "gradient")
        )
        for item in ranked
    ]
    found["activations+gradient"] = spearman(pair, accuracies)
    found["all"] = spearman([-item.rank for item in ranked], accuracies)
    found["parameters"] = spearman([item.parameters for item in ranked], accuracies)
    return {name: round(value, 3) for name, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    options = parsed(
        arguments(
            "Training-free proxies against training.", "zero_shot", encoder="the default one"
        ),
        argv,
    )
    package = EncoderPackage.load(options.encoder) if options.encoder else default_encoder_package()
    report = measure(package, options.data / SET)
    print(report["spearman"])
    write(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
