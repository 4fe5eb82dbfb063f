"""Run with the interpreter of an environment that has OpenVINO; prints what it found as JSON.

`test_openvino.py` starts it with the packages to look at. It imports what a device does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.bank import AdapterBank, BankSuffix
from exporter.families import adapter_family, initial_tensors
from exporter.package import EncoderPackage, default_encoder_package
from exporter.probing import difference, tolerance
from exporter.providers import RuntimeSettings, available
from exporter.sessions import EncoderSessions
from ood.statistics import ClassStatistics, GaussianHead

Array = npt.NDArray[np.float32]


def moved(package: EncoderPackage, family: str, rank: int) -> dict[str, Array]:
    """An adapter that changes what the encoder computes."""
    rng = np.random.default_rng(rank)
    fresh = initial_tensors(adapter_family(family), package.manifest.sites, rank, seed=rank)
    return {
        name: value + rng.normal(scale=0.2, size=value.shape).astype(np.float32)
        for name, value in fresh.items()
    }


def images(package: EncoderPackage, count: int, *, seed: int) -> tuple[Array, list[str]]:
    """Blobs of four kinds with noise."""
    rng = np.random.default_rng(seed)
    size = package.image_size
    rows, columns = np.mgrid[0:size, 0:size] / size
    labels = [str(number % 4) for number in range(count)]
    made = [
        np.sin((1 + int(label)) * 4 * rows + int(label) * columns)
        + rng.normal(0, 0.5, (3, size, size))
        for label in labels
    ]
    return np.asarray(made, np.float32), labels


def look(
    package: EncoderPackage, openvino: EncoderSessions, cpu: EncoderSessions
) -> dict[str, Any]:
    """Compares the two on one encoder."""
    given, labels = images(package, 32, seed=1)
    hidden = cpu.prefix(given)
    found: dict[str, Any] = {
        "tolerance": tolerance(package),
        "prefix": difference(openvino.prefix(given), hidden),
        "alone": max(
            difference(openvino.prefix(given[row : row + 1])[0], openvino.prefix(given)[row])
            for row in range(5)
        ),
    }
    for family in package.families:
        ranks: tuple[int, ...] = (0, 1, 6, 2)
        found[f"suffix-{family}"] = max(
            difference(
                openvino.suffix(hidden, tensors, family), cpu.suffix(hidden, tensors, family)
            )
            for tensors in (moved(package, family, rank) if rank else None for rank in ranks)
        )
        found[f"suffix-{family} acts"] = difference(
            openvino.suffix(hidden, moved(package, family, 6), family),
            openvino.suffix(hidden, None, family),
        )
    head = GaussianHead.from_statistics([ClassStatistics.fit(cpu.base_features(hidden), labels)])
    fresh, _ = images(package, 64, seed=2)
    decided = [
        head.log_likelihoods(s.base_features(s.prefix(fresh))).argmax(axis=1)
        for s in (cpu, openvino)
    ]
    found["decisions"] = int((decided[0] != decided[1]).sum())
    found["classes"] = len(set(decided[0].tolist()))
    found["running"] = openvino.running()
    return found


def bank(package: EncoderPackage, openvino: EncoderSessions, cpu: EncoderSessions) -> float:
    """Compares a bank of two adapters."""
    both = AdapterBank(package, "bottleneck", [moved(package, "bottleneck", r) for r in (2, 5)])
    hidden = cpu.prefix(images(package, 5, seed=3)[0])
    index = np.array([0, 1, -1, 1, 0])
    return difference(
        *(BankSuffix(s, "bottleneck").run(hidden, both, index) for s in (openvino, cpu))
    )


def main(paths: list[str]) -> None:
    """Looks at the shipped encoder and at the packages named."""
    report: dict[str, Any] = {"available": available(), "encoders": {}}
    for path in ["shipped", *paths]:
        shipped = path == "shipped"
        package = default_encoder_package() if shipped else EncoderPackage.load(Path(path))
        settings = RuntimeSettings(providers=("tensorrt", "openvino"), threads=1)
        openvino, cpu = EncoderSessions(package, settings=settings), EncoderSessions(package)
        report["encoders"][Path(path).name] = look(package, openvino, cpu)
        if shipped:
            report["bank"] = bank(package, openvino, cpu)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
