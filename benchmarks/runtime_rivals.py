"""What other ways of keeping many adapters cost, next to the bare encoder. Part of `runtime`.

The published MOS procedure evaluates every adapter for every sample: as whole passes, as its code
does, and from a shared prefix, which is kinder than its code; in ONNX Runtime and in torch. Lazily
evaluated it decides the same. PEFT mixes adapters in a batch in torch. One ONNX file for each
adapter is what an export without a base gives. All on ViT-Tiny, the last 4 of 12 blocks adapted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.fleet_of_adapters import Fleet
from benchmarks.interleaved import timed
from benchmarks.runtime_path import bare_encoder, samples, serving_of
from edge_agent.bench.suite import SUFFIX_BLOCKS, WEIGHTS
from edge_agent.strategies.engine import Engine
from edge_agent.strategies.heads import LinearHead
from edge_agent.strategies.mos import MosMemory, MosPredictor, MosTask
from edge_agent.strategies.refinement import refine_exhaustive
from exporter.attach import attach
from exporter.package import EncoderPackage
from exporter.programs import load_training_program
from exporter.sessions import session_options
from exporter.vit import VisionTransformer, pooled_depths, split_vit, vit_from_state_dict
from ood.statistics import ClassStatistics, l2_normalise

Floats = NDArray[np.float32]
Run = Callable[[], object]

TASKS: Final = (1, 10, 20, 50)
MIXED: Final = 32
FILES: Final = 20
_CLASSES: Final = 5
_RANK: Final = 8


def retrieval(package: EncoderPackage, data: Path, *, rounds: int) -> list[dict[str, Any]]:
    """The published retrieval, exhaustive and lazy, and the daemon's path, with 1 to 50 adapters.

    Returns:
        A row for each number of adapters: `adapters` and for each way its timings and `ratio`, its
        minimum over the bare encoder's. Ways that no sample took are left out.
    """
    images = samples(package, data)
    engine = Engine(package)
    hidden = engine.sessions.prefix(images)
    bare = bare_encoder(package, 1)
    in_torch = _Torch(package, data)
    rows = []
    for count in TASKS:
        ways = _ways(engine, in_torch, images, hidden, count)
        times = timed({"bare": lambda: bare(images[:1]), **ways}, rounds=rounds)
        limit = times["bare"].minimum_ms
        rows.append(
            {
                "adapters": count,
                "ways": {
                    name: {**asdict(timing), "ratio": timing.minimum_ms / limit}
                    for name, timing in times.items()
                },
            }
        )
    return rows


def _ways(
    engine: Engine, in_torch: _Torch, images: Floats, hidden: Floats, count: int
) -> dict[str, Run]:
    """Everything that is timed with so many adapters, on one sample."""
    memory = _memory(engine, hidden, count)
    lazy, one = MosPredictor(engine, memory), images[:1]
    serving = serving_of(engine.sessions, engine.features(hidden), count)
    ways: dict[str, Run] = {
        "daemon": lambda: serving.infer_prepared(one),
        "every adapter, whole passes": lambda: _every(lazy, memory, one, engine, shared=False),
        "every adapter, shared prefix": lambda: _every(lazy, memory, one, engine, shared=True),
        "every adapter, whole passes, torch": lambda: in_torch.every(
            lazy, memory, one, shared=False
        ),
        "every adapter, shared prefix, torch": lambda: in_torch.every(
            lazy, memory, one, shared=True
        ),
    }
    passes = np.round((lazy.predict(hidden).passes - 1.0) / engine.suffix_share)
    for extra, name in ((1, "first route stood"), (2, "one refinement")):
        found = np.flatnonzero(passes == extra)
        if len(found):
            sample = images[found[:1]]
            ways[f"lazily, {name}"] = lambda sample=sample: lazy.predict(
                engine.sessions.prefix(sample)
            )
    return ways


def peft(package: EncoderPackage, data: Path, *, rounds: int) -> dict[str, Any]:
    """PEFT's mixed batches: 32 samples under 32 adapters next to the same under one, in torch."""
    # Only whoever runs this benchmark installs it.
    import peft as library  # noqa: PLC0415

    torch.set_num_threads(1)
    vit = _vit(package, data)
    first = vit.depth - SUFFIX_BLOCKS
    sites = [f"blocks.{index}.attn.qkv" for index in range(first, vit.depth)]
    model = library.get_peft_model(
        vit, library.LoraConfig(r=_RANK, target_modules=sites), adapter_name="0"
    )
    for index in range(1, MIXED):
        model.add_adapter(str(index), library.LoraConfig(r=_RANK, target_modules=sites))
    model.eval()
    images = samples(package, data)[:MIXED]
    given = torch.from_numpy(images)
    bare = bare_encoder(package, 1)

    def mixed(names: list[str]) -> Run:
        def run() -> object:
            with torch.inference_mode():
                return model(given, adapter_names=names)

        return run

    def plain() -> object:
        with torch.inference_mode(), model.disable_adapter():
            return model(given)

    times = timed(
        {
            "bare, ONNX Runtime": lambda: bare(images),
            "bare, torch": plain,
            "one adapter": mixed(["0"] * MIXED),
            "32 adapters": mixed([str(index) for index in range(MIXED)]),
        },
        rounds=rounds,
    )
    return {
        "version": library.__version__,
        "rank": _RANK,
        "batch": MIXED,
        "times": {name: asdict(timing) for name, timing in times.items()},
        "mixed_ratio": times["32 adapters"].minimum_ms / times["one adapter"].minimum_ms,
    }


def one_file_each(package: EncoderPackage, data: Path, *, rounds: int) -> dict[str, Any]:
    """A whole ONNX file for each adapter: what opening one takes, its size, and a run."""
    images = samples(package, data)[:1]
    fleet = Fleet(package, l2_normalise(np.eye(2, package.feature_dim)), FILES)
    bare = bare_encoder(package, 1)
    with tempfile.TemporaryDirectory() as folder:
        files = [
            attach(package, bundle.tensors, Path(folder) / f"{digest}.onnx", whole=True)
            for digest, bundle in fleet.items()
        ]

        def opened(file: Path) -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(
                file, session_options(1), providers=["CPUExecutionProvider"]
            )

        session = opened(files[0])
        times = timed(
            {
                "bare": lambda: bare(images),
                "run": lambda: session.run(None, {"images": images}),
                "switch": lambda: opened(files[1]),
            },
            rounds=rounds,
        )
        size = float(np.mean([file.stat().st_size for file in files]))
    return {"file_bytes": size, "times": {name: asdict(timing) for name, timing in times.items()}}


def _vit(package: EncoderPackage, data: Path) -> VisionTransformer:
    return vit_from_state_dict(load_file(data / WEIGHTS), image_size=package.image_size)


def _memory(engine: Engine, hidden: Floats, count: int) -> MosMemory:
    """Tasks with random adapters, each knowing some of the samples: they only have to cost time."""
    fleet = Fleet(engine.package, engine.features(hidden), count)
    adapters = [bundle.tensors for bundle in fleet.values()]
    first = engine.network(hidden, adapters[0])
    rng = np.random.default_rng(0)
    tasks, rows = [], []
    for index, tensors in enumerate(adapters):
        chosen = rng.permutation(len(hidden))[: 4 * _CLASSES]
        labels = [f"class {index}.{k}" for k in np.arange(len(chosen)) % _CLASSES]
        statistics = ClassStatistics.fit(first[chosen], labels)
        prototypes = l2_normalise(statistics.means)
        tasks.append(MosTask(tensors, statistics, prototypes))
        rows.append(prototypes)
    head = np.concatenate(rows)
    return MosMemory(tuple(tasks), LinearHead(head, np.zeros(len(head), np.float32)))


def _every(
    lazy: MosPredictor, memory: MosMemory, images: Floats, engine: Engine, *, shared: bool
) -> object:
    """The published evaluation: all adapters, then refinement among their logits."""
    hidden = engine.sessions.prefix(images)
    features = []
    for task in memory.tasks:
        given = hidden if shared else engine.sessions.prefix(images)
        features.append(engine.network(given, task.tensors))
    return _refined(lazy, memory, features)


def _refined(lazy: MosPredictor, memory: MosMemory, features: list[Floats]) -> object:
    logits = np.stack([memory.head.logits(each) for each in features])
    owner = np.repeat(np.arange(len(memory.tasks)), _CLASSES)
    return refine_exhaustive(lazy.first_logits(features[0]), logits, owner)


class _Torch:
    """The same in torch: the prefix as a module, the suffix as the captured program."""

    def __init__(self, package: EncoderPackage, data: Path) -> None:
        torch.set_num_threads(1)
        self._prefix, _ = split_vit(
            _vit(package, data),
            SUFFIX_BLOCKS,
            pooled_depths(12, SUFFIX_BLOCKS, prefix_alone=package.base_from_prefix),
            prefix_alone=package.base_from_prefix,
        )
        self._suffix = load_training_program(package, package.families[0])
        self._width = package.network_dim

    def every(
        self, lazy: MosPredictor, memory: MosMemory, images: Floats, *, shared: bool
    ) -> object:
        """All adapters, then refinement among their logits."""
        given, features = torch.from_numpy(images), []
        with torch.inference_mode():
            hidden = self._prefix(given)
            for task in memory.tasks:
                hidden = hidden if shared else self._prefix(given)
                tensors = {name: torch.from_numpy(value) for name, value in task.tensors.items()}
                features.append(self._suffix(hidden, tensors)[:, : self._width].numpy())
        return _refined(lazy, memory, [l2_normalise(each) for each in features])


def rivals(package: EncoderPackage, data: Path, *, rounds: int) -> Mapping[str, Any]:
    """All of them; PEFT where it is installed."""
    found: dict[str, Any] = {
        "retrieval": retrieval(package, data, rounds=rounds),
        "one_file_each": one_file_each(package, data, rounds=rounds),
    }
    try:
        found["peft"] = peft(package, data, rounds=rounds)
    except ImportError as error:
        found["peft"] = {"left_out": f"peft is not installed: {error}"}
    return found
