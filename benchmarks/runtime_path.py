"""What a sample costs on the daemon's whole path, as a multiple of the bare encoder's time.

The path is what `Serving` does with a prepared image: prefix, base features, shift score, routing,
adapters, label. The bare encoder is the same network as one ONNX file in ONNX Runtime. Both are
timed in turns, with 1 to 1,000 installed bundles that all have an adapter. Part of `runtime`.
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

from benchmarks import command
from benchmarks.fleet_of_adapters import Fleet
from benchmarks.interleaved import timed
from edge_agent.bench import datasets
from edge_agent.serving import Serving, base_passes, suffix_share
from exporter.attach import attach
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions, session_options
from ood.statistics import l2_normalise

Floats = NDArray[np.float32]

COUNTS: Final = (1, 10, 50, 1000)
BATCHES: Final = (1, 8, 32)
# Larger batches are timed with these counts alone.
_TOGETHER: Final = (10, 1000)
# A batch whose every sample looks twice needs so many adapters at once; a device keeps 50 and would
# read others from its disk.
_IN_MEMORY: Final = 64
_SAMPLES: Final = 400
_CALIBRATION: Final = 300
_FEWEST: Final = 8


def samples(package: EncoderPackage, data: Path) -> Floats:
    """Real pictures, made ready: float32 [400, 3, s, s]."""
    found = datasets.load(data / command.SET)
    rows = np.random.default_rng(0).permutation(len(found))[:_SAMPLES]
    return prepare(found.read(np.sort(rows), package.image_size), package)


def bare_encoder(package: EncoderPackage, threads: int) -> Callable[[Floats], object]:
    """The encoder as one ONNX file, as anybody would run it."""
    with tempfile.TemporaryDirectory() as folder:
        file = attach(package, {}, Path(folder) / "bare.onnx", whole=True)
        session = onnxruntime.InferenceSession(
            file, session_options(threads), providers=["CPUExecutionProvider"]
        )
    return lambda images: session.run(None, {"images": images})


def serving_of(sessions: EncoderSessions, features: Floats, count: int) -> Serving:
    """A generation of so many bundles with an adapter each."""
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
        adapters_in_memory=_IN_MEMORY,
    )


def measured(
    package: EncoderPackage, data: Path, *, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Time one encoder's path for every number of bundles, every batch and every route.

    Returns:
        A row for each: `bundles`, `batch`, `adapter_passes` (1: the first route stood; 2: one
        refinement), the timings of `bare` and `path`, and `ratio`, of their minima.
    """
    images = samples(package, data)
    sessions = EncoderSessions(package, threads)
    features = sessions.base_features(sessions.prefix(images))
    bare = bare_encoder(package, threads)
    rows: list[dict[str, Any]] = []
    for count in COUNTS:
        serving = serving_of(sessions, features, count)
        for batch in BATCHES if count in _TOGETHER else BATCHES[:1]:
            for passes, sample in _by_passes(serving, package, images, batch).items():
                ways = {
                    "bare": lambda sample=sample: bare(sample),
                    "path": lambda sample=sample, serving=serving: serving.infer_prepared(sample),
                }
                times = timed(ways, rounds=max(rounds // batch, _FEWEST))
                ratio = times["path"].minimum_ms / times["bare"].minimum_ms
                rows.append(
                    {
                        "bundles": count,
                        "batch": batch,
                        "adapter_passes": passes,
                        "ratio": ratio,
                        **{name: asdict(timing) for name, timing in times.items()},
                    }
                )
                print(
                    f"{package.name}, {threads} threads, {count} bundles, batch {batch}, "
                    f"{passes} adapter passes: {ratio:.2f} x",
                    file=sys.stderr,
                )
    return rows


def _by_passes(
    serving: Serving, package: EncoderPackage, images: Floats, batch: int
) -> dict[int, Floats]:
    """A batch for every number of adapter passes that all of its samples take, as far as found."""
    parts = [images[start : start + 32] for start in range(0, _SAMPLES, 32)]
    answers = [answer for part in parts for answer in serving.infer_prepared(part).answers]
    share, base = suffix_share(package), base_passes(package)
    passes = np.array([round((answer.passes - base) / share) for answer in answers])
    chosen = {}
    for value in (1, 2):
        rows = np.flatnonzero(passes == value)
        if len(rows) >= batch:
            chosen[value] = images[rows[:batch]]
    return chosen
