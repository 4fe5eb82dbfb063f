"""What are the default encoder's features worth, as shipped and run by ONNX Runtime?

A Gaussian head with one shared covariance, computed in one pass from frozen features: on the
CIFAR-100 subset (10,000 training and 4,000 test images) and on scikit-learn's digits (even images
train, odd ones test).

    python -m benchmarks.default_encoder --data DIR [--encoder DIR] [--out FILE]
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
from sklearn.datasets import load_digits

from benchmarks.command import SET, arguments, parsed, write
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

BATCH = 64


def features_of(sessions: EncoderSessions, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised base features of uint8 images [n, h, w, 3]."""
    parts = []
    for start in range(0, len(images), BATCH):
        prepared = prepare(images[start : start + BATCH], sessions.package)
        parts.append(sessions.suffix(sessions.prefix(prepared)))
        if start % (BATCH * 40) == 0:
            print(f"\r{start}/{len(images)}", end="", flush=True)
    print(f"\r{len(images)}/{len(images)}")
    return l2_normalise(np.concatenate(parts))


def accuracy(
    sessions: EncoderSessions,
    train: tuple[NDArray[np.uint8], NDArray[np.integer[Any]]],
    test: tuple[NDArray[np.uint8], NDArray[np.integer[Any]]],
) -> float:
    """Accuracy of the shared-covariance head on frozen features."""
    statistics = ClassStatistics.fit(features_of(sessions, train[0]), [str(y) for y in train[1]])
    head = GaussianHead.from_statistics([statistics])
    found = head.log_likelihoods(features_of(sessions, test[0])).argmax(axis=1)
    names = np.array([label for _, label in head.components])
    return float(np.mean(names[found] == test[1].astype(str)))


def measure(package: EncoderPackage, cifar100: Path) -> dict[str, Any]:
    """Both accuracies, with what they were measured on."""
    sessions = EncoderSessions(package, threads=os.cpu_count() or 1)
    begun = time.perf_counter()
    with np.load(cifar100) as file:
        cifar = accuracy(
            sessions, (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])
        )
    digits = load_digits()
    grey = np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    halves = [(grey[i::2], digits.target[i::2]) for i in (0, 1)]
    return {
        "benchmark": "default_encoder",
        "encoder": {"name": package.name, "digest": package.digest},
        "accuracy": {"cifar100_small": cifar, "digits": accuracy(sessions, *halves)},
        "seconds": round(time.perf_counter() - begun, 1),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "scikit-learn")},
        "seed": None,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    options = parsed(
        arguments(
            "Accuracy of a head on frozen features.", "default_encoder", encoder="the default one"
        ),
        argv,
    )
    package = EncoderPackage.load(options.encoder) if options.encoder else default_encoder_package()
    report = measure(package, options.data / SET)
    print(report["accuracy"])
    write(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
