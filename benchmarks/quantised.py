"""What does a quantised encoder gain in time and lose in accuracy and in telling what is foreign?

    python -m benchmarks.quantised --data DIR --cache DIR [--encoders NAMES] [--out FILE]

Encoders that are not named keep what the report already says of them.

Every encoder is quantised by every method that applies to it and compared with itself unquantised:
a pass through both sessions as the daemon makes them, one thread, the minima of turns of runs
compared; accuracy of the Gaussian head in four worlds and AUROC of the default score on what is
foreign to them (`benchmarks.worlds`, without corruptions), each with statistics of its own numbers.
Scales and biases come from Tiny-ImageNet images, which no world holds. Settings of the methods were
chosen by time and the features' difference on such images, not by what is reported of accuracy.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks import quantised_page
from benchmarks.command import arguments, parsed, write
from benchmarks.detection import auroc
from benchmarks.tasks import circumstances
from benchmarks.worlds import ENCODERS, World, Worlds, encoder
from edge_agent.bench import datasets
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from exporter.quantise import quantise
from exporter.sessions import EncoderSessions
from ood.combined import CombinedScore
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

GROUPS: Final = ("near", "far", "domain")
# The first of each is the one that `docs/encoders.md` names for such a network.
METHODS: Final = {
    "vit-tiny": ("int8", "int8-static", "int4", "float16"),
    "mobilenet": ("int8-static", "float16"),
    "default": ("int8", "int8-static", "int4", "float16"),
}
BATCHES: Final = (1, 8)
_SAMPLES: Final = Path("data") / "tiny-imagenet-pretrain-jpeg.npz"
_SAMPLE_COUNT: Final = 128
_SAMPLE_SEED: Final = 7
# Packages take turns of several runs, so that each finds its own weights in the caches, as it would
# on a device.
_TURNS: Final = 60
_RUNS_A_TURN: Final = 8

Floats = npt.NDArray[np.float32]


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report and the page.

    Returns:
        0; what was met and missed is told on the page.
    """
    parser = arguments(__doc__ or "", "quantised", encoder="all of --encoders")
    parser.add_argument("--cache", type=Path, required=True, help="where features are kept")
    parser.add_argument("--encoders", nargs="*", choices=ENCODERS, default=ENCODERS)
    options = parsed(parser, argv)
    found = json.loads(options.out.read_bytes())["encoders"] if options.out.exists() else {}
    for name in options.encoders:
        found[name] = measured(name, options.data, options.cache)
    report = {
        "benchmark": "quantised",
        **circumstances(default_encoder_package()),
        "samples": {"set": _SAMPLES.stem, "count": _SAMPLE_COUNT, "seed": _SAMPLE_SEED},
        "encoders": {name: found[name] for name in ENCODERS if name in found},
    }
    del report["encoder"]
    write(report, options.out)
    quantised_page.write(report)
    return 0


def measured(name: str, data: Path, cache: Path) -> dict[str, Any]:
    """One encoder under each of its methods."""
    package = encoder(name, data, cache)
    samples = calibration_samples(package, data)
    with tempfile.TemporaryDirectory() as folder:
        made = {
            method: quantise(package, Path(folder) / method, method=method, images=samples)
            for method in METHODS[name]
        }
        return compared(package, made, samples, data, cache)


def compared(
    package: EncoderPackage,
    made: Mapping[str, EncoderPackage],
    samples: Floats,
    data: Path,
    cache: Path,
) -> dict[str, Any]:
    """An encoder and what was made from it, by method."""
    times = raced({"float32": package, **made}, samples)
    original = Worlds(package, data, cache)
    base = quality(original, original)
    return {
        "name": package.name,
        "digest": package.digest,
        "served_bytes": served_bytes(package),
        "times_ms": times["float32"],
        **base,
        "methods": {
            method: {
                "digest": found.digest,
                "difference": found.manifest.quantised.difference,
                "served_bytes": served_bytes(found),
                "times_ms": times[method],
                "times_faster": {
                    batch: times["float32"][batch] / times[method][batch] for batch in times[method]
                },
                "bit_equal_in_a_batch": bit_equal(found, samples),
                **quality(Worlds(found, data, cache), original),
            }
            for method, found in made.items()
            if found.manifest.quantised is not None
        },
    }


def calibration_samples(package: EncoderPackage, data: Path) -> Floats:
    """Images for scales and biases, prepared for the encoder."""
    found = datasets.load(data / _SAMPLES)
    rows = np.random.default_rng(_SAMPLE_SEED).permutation(len(found))[:_SAMPLE_COUNT]
    return prepare(found.read(np.sort(rows), package.image_size), package)


def raced(packages: Mapping[str, EncoderPackage], samples: Floats) -> dict[str, dict[str, float]]:
    """Milliseconds of a pass by package and batch size: minima over turns."""
    sessions = {name: EncoderSessions(package) for name, package in packages.items()}
    best = {name: {str(batch): float("inf") for batch in BATCHES} for name in sessions}
    for batch in BATCHES:
        rows = samples[:batch]
        for _ in range(_TURNS // batch):
            for name, session in sessions.items():
                for _ in range(_RUNS_A_TURN):
                    begun = time.perf_counter()
                    session.suffix(session.prefix(rows))
                    taken = 1e3 * (time.perf_counter() - begun)
                    best[name][str(batch)] = min(best[name][str(batch)], taken)
    return best


def quality(worlds: Worlds, original: Worlds) -> dict[str, Any]:
    """Accuracies by world and AUROC by pair, in percent, with statistics of its own numbers.

    Args:
        worlds: Under the encoder in question.
        original: Under the encoder it was made from, whose statistics are tried as well.
    """
    accuracies, with_originals, separation = {}, {}, {}
    for name, world in worlds.worlds.items():
        head = _head(world)
        accuracies[name] = _accuracy(head, world)
        with_originals[name] = _accuracy(_head(original.worlds[name]), world)
        parts = worlds.package.manifest.feature_parts
        score = CombinedScore(head, l2_normalise(world.calibration.features), parts=parts)
        known = score.score(l2_normalise(world.test.features))
        for pair in worlds.pairs(GROUPS):
            if pair.known == name:
                foreign = score.score(l2_normalise(pair.features))
                key = f"{pair.group} / {name} / {pair.foreign}"
                separation[key] = 100 * auroc(known, foreign)
    return {
        "test_samples": {name: len(world.test.rows) for name, world in worlds.worlds.items()},
        "accuracy": accuracies,
        "accuracy_with_the_originals_statistics": with_originals,
        "auroc": separation,
    }


def bit_equal(package: EncoderPackage, samples: Floats) -> bool:
    """Whether each of eight samples has the same features alone and among the others."""
    sessions = EncoderSessions(package)
    together = sessions.suffix(sessions.prefix(samples[:8]))
    alone = [sessions.suffix(sessions.prefix(row[None])) for row in samples[:8]]
    return np.array_equal(together, np.concatenate(alone))


def served_bytes(package: EncoderPackage) -> int:
    """Bytes of the weights that the prefix and one suffix are given."""
    manifest = package.manifest
    graphs = (*manifest.graphs,)[:2]
    weights = {k: v for graph in graphs for k, v in package.graph_weights(graph).items()}
    return sum(value.nbytes for value in weights.values())


def _head(world: World) -> GaussianHead:
    statistics = ClassStatistics.fit(l2_normalise(world.fit.features), world.fit.labels)
    return GaussianHead.from_statistics([statistics])


def _accuracy(head: GaussianHead, world: World) -> float:
    names = np.array([label for _, label in head.components])
    found = names[head.log_likelihoods(l2_normalise(world.test.features)).argmax(axis=1)]
    return 100 * float(np.mean(found == np.array(world.test.labels)))


if __name__ == "__main__":
    raise SystemExit(main())
