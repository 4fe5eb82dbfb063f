"""How much accuracy do wrong labels cost, and how much does leaving doubtful ones out give back?

scikit-learn's digits through the default encoder, 40 labelled images of each class. A share of the
labels is replaced by another class at random; the statistics head is fitted on all samples, on
those that `edge_agent.cleaning` trusts, and on those whose labels are right (which only the
benchmark knows). Reports accuracy on 797 images with right labels, for five draws; the trainer
learns statistics and adapters from the trusted samples.

    python -m benchmarks.label_noise [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from benchmarks.default_encoder import features_of
from edge_agent.cleaning import trusted_labels
from exporter.package import default_encoder_package
from exporter.sessions import EncoderSessions
from ood.mixture import Mixture
from ood.statistics import ClassStatistics

DRAWS = 5
NOISE = (0.0, 0.1, 0.2)
PER_CLASS = (10, 20, 40, 80)
TESTED = 797


def spoiled(
    labels: NDArray[np.str_], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.str_], NDArray[np.bool_]]:
    """Labels of which a share is another class at random, and which those are."""
    names = np.unique(labels)
    wrong = np.zeros(len(labels), dtype=np.bool_)
    wrong[rng.permutation(len(labels))[: round(share * len(labels))]] = True
    moved = (np.searchsorted(names, labels) + rng.integers(1, len(names), len(labels))) % len(names)
    return np.where(wrong, names[moved], labels), wrong


def draw(
    seed: int, features: NDArray[np.float32], labels: NDArray[np.str_], per_class: int, share: float
) -> dict[str, float]:
    """One draw of the samples and of the wrong labels."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    test, rest = order[:TESTED], order[TESTED:]
    train = np.concatenate([rest[labels[rest] == name][:per_class] for name in np.unique(labels)])
    given, wrong = spoiled(labels[train], share, rng)
    trusted = trusted_labels(features[train], list(given))

    def accuracy(chosen: NDArray[np.bool_]) -> float:
        statistics = ClassStatistics.fit(features[train[chosen]], list(given[chosen]))
        mixture = Mixture.from_statistics([statistics])
        guesses = mixture.log_likelihoods(features[test]).argmax(axis=1)
        return float(np.mean(np.array(mixture.labels)[guesses] == labels[test]))

    return {
        "all": accuracy(np.ones(len(train), dtype=np.bool_)),
        "trusted": accuracy(trusted),
        "right": accuracy(~wrong),
        "wrong_left_out": float(np.mean(~trusted[wrong])) if wrong.any() else 0.0,
        "right_left_out": float(np.mean(~trusted[~wrong])),
    }


def measure() -> dict[str, Any]:
    """Every noise share and number of samples."""
    package = default_encoder_package()
    digits = load_digits()
    grey = np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    features = features_of(EncoderSessions(package), grey)
    labels = digits.target.astype(str)
    results: dict[str, Any] = {}
    for per_class in PER_CLASS:
        for share in NOISE:
            draws = [draw(seed, features, labels, per_class, share) for seed in range(DRAWS)]
            means = {key: round(float(np.mean([d[key] for d in draws])), 4) for key in draws[0]}
            results[f"{per_class} a class, {share:.0%} wrong"] = means
            print(per_class, share, means)
    return {
        "benchmark": "label_noise",
        "encoder": {"name": package.name, "digest": package.digest},
        "settings": {"draws": DRAWS, "tested": TESTED},
        "accuracy": results,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "scikit-learn")},
        "seed": list(range(DRAWS)),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description="Accuracy under wrong labels.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "label_noise.json"
    )
    options = parser.parse_args(argv)
    report = measure()
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    at_worst = report["accuracy"]["40 a class, 20% wrong"]
    return int(at_worst["trusted"] < at_worst["right"] - 0.05)


if __name__ == "__main__":
    raise SystemExit(main())
