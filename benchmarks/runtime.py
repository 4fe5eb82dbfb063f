"""What a sample costs on the whole path of the daemon, as a multiple of the bare encoder's time.

The path is what `Serving` does with a prepared image: prefix, base features, shift score, routing,
adapters, label. The bare encoder is the same network as one ONNX file in ONNX Runtime. Both are
timed in turns, with 1 to 1,000 installed bundles that all have an adapter.

    python -m benchmarks.runtime --data DIR [--encoders vit-tiny,default] [--rounds 200]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks import command, worlds
from benchmarks.fleet_of_adapters import Fleet
from benchmarks.interleaved import timed
from benchmarks.tasks import circumstances
from edge_agent.bench import datasets
from edge_agent.serving import Serving
from exporter.attach import attach
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions, session_options
from ood.statistics import l2_normalise

Floats = NDArray[np.float32]

COUNTS: Final = (1, 10, 50, 1000)
BATCHES: Final = (1, 8, 32)
_SAMPLES: Final = 400
_CALIBRATION: Final = 300


def measured(package: EncoderPackage, data: Path, *, threads: int, rounds: int) -> dict[str, Any]:
    """Time one encoder's path for every number of bundles and every batch."""
    found = datasets.load(data / command.SET)
    rows = np.random.default_rng(0).permutation(len(found))[:_SAMPLES]
    images = prepare(found.read(np.sort(rows), package.image_size), package)
    sessions = EncoderSessions(package, threads)
    features = l2_normalise(sessions.suffix(sessions.prefix(images)))
    bare = _bare(package, threads)
    result: dict[str, Any] = {}
    for count in COUNTS:
        serving = _serving(sessions, features, count)
        for batch in BATCHES:
            for passes, sample in _samples(serving, images, batch).items():
                ways = {
                    "bare": lambda sample=sample: bare(sample),
                    "path": lambda sample=sample, serving=serving: serving.infer_prepared(sample),
                }
                times = timed(ways, rounds=max(rounds // batch, 20))
                key = f"{count} bundles, batch {batch}, {passes} adapter passes"
                result[key] = {name: asdict(timing) for name, timing in times.items()}
                ratio = times["path"].minimum_ms / times["bare"].minimum_ms
                print(f"{package.name}, {threads} threads, {key}: {ratio:.2f} x", file=sys.stderr)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run it and write the report."""
    parser = command.arguments(__doc__ or "", "runtime", encoder="several")
    parser.add_argument("--encoders", default="vit-tiny,mobilenet,default")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    options = command.parsed(parser, argv)
    report: dict[str, Any] = {}
    for name in options.encoders.split(","):
        package = worlds.encoder(name, options.data, options.cache)
        for threads in map(int, options.threads.split(",")):
            report[f"{name}, {threads} threads"] = measured(
                package, options.data, threads=threads, rounds=options.rounds
            )
    command.write({"circumstances": circumstances(package), "runs": report}, options.out)
    return 0


def _bare(package: EncoderPackage, threads: int) -> Callable[[Floats], object]:
    with tempfile.TemporaryDirectory() as folder:
        file = attach(package, {}, Path(folder) / "bare.onnx", whole=True)
        session = onnxruntime.InferenceSession(
            file, session_options(threads), providers=["CPUExecutionProvider"]
        )
    return lambda images: session.run(None, {"images": images})


def _serving(sessions: EncoderSessions, features: Floats, count: int) -> Serving:
    rng = np.random.default_rng(1)
    rows = features[rng.integers(0, len(features), _CALIBRATION)]
    noisy = rows + rng.normal(0, 0.02, rows.shape).astype(np.float32)
    return Serving(
        sessions,
        Fleet(sessions.package, features, count),
        l2_normalise(noisy),
        number=1,
        false_alarm_every=1e6,
        max_rounds=4,
    )


def _samples(serving: Serving, images: Floats, batch: int) -> dict[int, Floats]:
    """A batch for every number of adapter passes that all of its samples take, as far as found."""
    passes = np.concatenate(
        [
            [answer.passes for answer in serving.infer_prepared(images[start : start + 32]).answers]
            for start in range(0, len(images), 32)
        ]
    )
    chosen = {}
    for place, value in enumerate(np.unique(passes)):
        rows = np.flatnonzero(passes == value)
        if len(rows) >= batch:
            chosen[place + int(value > 1)] = images[rows[:batch]]
    return chosen


if __name__ == "__main__":
    raise SystemExit(main())
