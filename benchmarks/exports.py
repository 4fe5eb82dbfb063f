"""What does each way of running an adapter cost next to the bare encoder?

A ViT-Tiny with random weights (times do not depend on the numbers), its last 4 of 12 blocks the
suffix, one thread. Compares, at batch 1, the bare suffix, the suffix graph with nothing fed, the
adapter fed, attached from an ONNX Runtime adapter file, and folded into the weights; what a switch
costs in each; and a batch of 32 in which every row has its own of 32 adapters with the same batch
under one adapter. Reports the largest difference of every form from torch beside it.

    python -m benchmarks.exports [--image-size 96] [--out FILE]

Every form is timed in turns, in short series within which caches stay warm, and the fastest run of
each counts; ratios are of such minima. Runs are timed by the processor time of their one thread,
which other work on the machine disturbs little; switches, which read and write files, by the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.command import write
from exporter.adapter_files import AttachedAdapter, write_adapter
from exporter.bank import AdapterBank, BankSuffix
from exporter.build import build_vit
from exporter.derived import BARE_GRAPH, read_derived
from exporter.errors import EncoderError
from exporter.fold import FoldedSuffix, Folder
from exporter.package import EncoderPackage
from exporter.parity import parity
from exporter.sessions import EncoderSessions, FedAdapter
from exporter.vit import VisionTransformer

Array = NDArray[np.float32]
Run = Callable[[], object]

RANKS: Final = {"bottleneck": 16, "lora": 8, "sparse": 8, "ssf": 1}
ROUNDS: Final = 60
SERIES: Final = 12
BATCH: Final = 32
ADAPTERS: Final = 32


def built(image_size: int, folder: Path) -> EncoderPackage:
    """A ViT-Tiny with random weights as a package."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=image_size, patch=16, dim=192, depth=12, heads=3, hidden=768)
    return build_vit(
        vit.state_dict(),
        image_size=image_size,
        suffix_blocks=4,
        name="vit-tiny, random",
        out=folder / "encoder",
        families=tuple(RANKS),
    )


def adapter(package: EncoderPackage, family: str, rng: np.random.Generator) -> dict[str, Array]:
    """A random adapter that leaves features their size."""
    return {
        name: rng.normal(
            scale=0.05, size=[RANKS[family] if axis == "rank" else int(axis) for axis in shape]
        ).astype(np.float32)
        for name, shape in package.family(family).tensors.items()
    }


def fastest_ms(
    forms: Mapping[str, Run], rounds: int = ROUNDS, clock: Callable[[], float] = time.thread_time
) -> dict[str, float]:
    """The fastest run of each form, in milliseconds, all timed in turns."""
    best = dict.fromkeys(forms, np.inf)
    for _ in range(rounds):
        for name, run in forms.items():
            for _ in range(SERIES):
                begun = clock()
                run()
                best[name] = min(best[name], clock() - begun)
    return {name: round(1000 * seconds, 4) for name, seconds in best.items()}


def measured(sessions: EncoderSessions, family: str, folder: Path) -> dict[str, Any]:
    """Everything about one family."""
    package = sessions.package
    rng = np.random.default_rng(0)
    one = rng.standard_normal((1, *package.hidden_shape), dtype=np.float32)
    tensors = adapter(package, family, rng)
    path = write_adapter(package, family, tensors, folder)
    attached = AttachedAdapter(sessions, family, path)
    fed = FedAdapter(sessions, family, tensors)
    graph = read_derived(package, BARE_GRAPH)
    bare = FoldedSuffix(package, graph.data, package.named_weights(graph.weights), threads=1)
    single: dict[str, Run] = {
        "bare": lambda: bare.run(one),
        "nothing fed": lambda: sessions.suffix(one, None, family),
        "fed": lambda: sessions.suffix(one, tensors, family),
        "fed, checked once": lambda: fed.run(one),
        "attached": lambda: attached.run(one),
    }
    switch: dict[str, Run] = {
        "attach a file": lambda: AttachedAdapter(sessions, family, path),
        "check tensors": lambda: FedAdapter(sessions, family, tensors),
        "write a file": lambda: write_adapter(package, family, tensors, folder),
    }
    folder_of = Folder(sessions)
    try:
        folded = folder_of.fold(family, tensors)
    except EncoderError:
        pass
    else:
        single["folded"] = lambda: folded.run(one)
        switch["fold and rebuild"] = lambda: folder_of.fold(family, tensors)
    report = parity(package, family, tensors, one.repeat(2, axis=0))
    return {
        "rank": RANKS[family],
        "numbers": sum(value.size for value in tensors.values()),
        "batch_1_ms": fastest_ms(single),
        "switch_ms": fastest_ms(switch, rounds=3, clock=time.perf_counter),
        "mixed": mixed(sessions, family, rng),
        "largest_difference": {name: form.largest for name, form in report.forms.items()},
    }


def mixed(sessions: EncoderSessions, family: str, rng: np.random.Generator) -> dict[str, float]:
    """A batch in which every row has its own adapter, and the same batch under one."""
    package = sessions.package
    images = rng.standard_normal((BATCH, 3, package.image_size, package.image_size)).astype(
        np.float32
    )
    hidden = sessions.prefix(images)
    adapters = [adapter(package, family, rng) for _ in range(ADAPTERS)]
    bank, suffix = AdapterBank(package, family, adapters), BankSuffix(sessions, family)
    index = rng.permutation(ADAPTERS)[:BATCH]

    def one_by_one() -> None:
        for row in range(BATCH):
            sessions.suffix(hidden[row : row + 1], adapters[index[row]], family)

    found = fastest_ms(
        {
            "prefix": lambda: sessions.prefix(images),
            "one adapter": lambda: sessions.suffix(hidden, adapters[0], family),
            "bank": lambda: suffix.run(hidden, bank, index),
            "row by row": one_by_one,
        },
        rounds=3,
    )
    whole = (found["prefix"] + found["bank"]) / (found["prefix"] + found["one adapter"])
    return {
        **{f"{name}_ms": value for name, value in found.items()},
        "suffix_ratio": round(found["bank"] / found["one adapter"], 4),
        "whole_ratio": round(whole, 4),
    }


def measure(image_size: int) -> dict[str, Any]:
    """The whole report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = built(image_size, folder)
        sessions = EncoderSessions(package)
        families = {}
        for family in RANKS:
            families[family] = measured(sessions, family, folder)
            print(family, families[family])
    return {
        "benchmark": "exports",
        "image_size": image_size,
        "suffix_blocks": 4,
        "threads": 1,
        "families": families,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "torch")},
        "seed": 0,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report.

    Returns:
        0 when a mixed batch, a switch and a fold keep to their bars.
    """
    parser = argparse.ArgumentParser(description="The cost of each way of running an adapter.")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    report = measure(options.image_size)
    name = f"exports-{options.image_size}.json"
    write(report, options.out or Path(__file__).parent / "results" / name)
    rows = report["families"].values()
    return int(
        any(
            row["mixed"]["whole_ratio"] > 1.25
            or row["switch_ms"]["attach a file"] > 5
            or row["switch_ms"].get("fold and rebuild", 0) > 80
            for row in rows
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
