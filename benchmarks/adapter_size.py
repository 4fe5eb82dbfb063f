"""How few bits may an adapter's numbers have, and how small is the bundle then?

An adapter is trained for each task of two class-incremental streams, packed by every codec as a
device packs it, and read back; then the decision of a device that has only this bundle, and that of
one that has all bundles of the stream, are compared with those of the exact adapters and exact
statistics. For codecs of few bits the adapter is also trained on for some epochs through the codec.

    python -m benchmarks.adapter_size [--data DIR] [--cache DIR] [--held-out] [--out FILE]

`--held-out` judges by a fifth of the training samples, left out of the training, and never looks at
a test sample: recipes are chosen that way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adapter_store.bundle import Bundle, Manifest, pack, unpack
from adapter_store.codecs import CODECS, Codec, quantised
from benchmarks.command import arguments, parsed, write
from benchmarks.tasks import circumstances
from edge_agent.bench.activations import Activations, cached
from edge_agent.bench.datasets import load
from edge_agent.bench.streams import build
from edge_agent.bench.suite import SUITES, set_file, suite_encoder
from edge_agent.decision import GroupsDecision
from edge_agent.objectives import CosineHead
from edge_agent.quantised_training import quantise
from edge_agent.strategies.engine import Engine
from edge_agent.trainer_loop import Recipe, train
from exporter.package import EncoderPackage
from ood.calibration import score_quantiles
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics, GaussianHead

STREAMS: Final = ("cifar100", "grocery")
EXACT: Final = "exact"
RANK: Final = 16
MAX_ROUNDS: Final = 4
HELD_OUT: Final = 0.2
# As the learning suite trains.
RECIPE: Final = Recipe(epochs=20, batch_size=32, learning_rate=0.003, seed=0, precision="bfloat16")
# Training on through a codec, from the adapter that is there.
AWARE_CODECS: Final[tuple[Codec, ...]] = ("int2", "int1")
AWARE: Final = replace(RECIPE, epochs=10)

Floats = NDArray[np.float32]
Tensors = dict[str, Floats]


@dataclass(frozen=True, eq=False)
class Part:
    """Samples with what the encoder makes of them.

    Attributes:
        hidden: Prefix activations, float16 [n, ...].
        labels: n label names.
        base: Features of all depths without an adapter, normalised, float32 [n, d].
    """

    hidden: NDArray[np.float16]
    labels: tuple[str, ...]
    base: Floats


@dataclass(frozen=True, eq=False)
class Learned:
    """A task with its bundle in one form, ready to decide.

    Attributes:
        base: Statistics of base features.
        own: Statistics in the adapter's space.
        tensors: The adapter.
        size_bytes: Of the bundle; 0 for exact numbers, which do not travel.
    """

    base: ClassStatistics
    own: ClassStatistics
    tensors: Tensors
    size_bytes: int = 0


def parts_of(
    name: str, engine: Engine, data: Path, cache: Path, count: int, *, held_out: bool
) -> list[tuple[Part, Part]]:
    """What each task of a stream is learned from and judged by."""
    suite = SUITES[name]
    found = load(set_file(suite, data))
    activations = cached(found, engine.package, cache)
    names = np.array(found.classes.names, dtype=object)
    tasks = build(found.classes, found.test, None, suite.settings(0))[:count]
    result = []
    for task in tasks:
        truth, test = found.classes.index, task.test
        learned = task.train
        if held_out:
            learned, test = _split(learned, truth)
        learn, judge = (
            _part(engine, activations, rows, tuple(names[truth[rows]])) for rows in (learned, test)
        )
        result.append((learn, judge))
    return result


def trained(engine: Engine, part: Part, seed: int) -> Tensors:
    """An adapter, trained as the daemon's strategy trains it."""
    objective, targets = _objective(engine, part)
    recipe = replace(RECIPE, seed=seed)
    return engine.train(part.hidden, targets, engine.fresh(seed), objective, recipe)


def trained_through(
    engine: Engine, part: Part, tensors: Tensors, codec: Codec, seed: int
) -> Tensors:
    """The adapter, trained on while every step sees it as the codec will leave it."""
    objective, targets = _objective(engine, part)

    def program(hidden: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        features: Tensor = engine.program(hidden, quantise(given, codec))
        return features

    return train(
        program,
        part.hidden,
        targets,
        tensors,
        objective,
        recipe=replace(AWARE, seed=seed),
        checkpoint=None,
        report=lambda _: None,
    )


def exact(engine: Engine, part: Part, tensors: Tensors) -> Learned:
    """Nothing rounded."""
    own = own_features(engine, part.hidden, tensors)
    return Learned(
        ClassStatistics.fit(part.base, part.labels),
        ClassStatistics.fit(own, part.labels),
        tensors,
    )


def packed(engine: Engine, part: Part, tensors: Tensors, codec: Codec) -> Learned:
    """The bundle as it is read back; its statistics are of the adapter that the codec leaves."""
    stored = quantised(tensors, codec)
    whole = exact(engine, part, stored)
    scores = MahalanobisScore.from_statistics([whole.base]).score(part.base)
    manifest = Manifest(
        encoder=engine.package.digest,
        family=engine.family,
        rank=engine.rank,
        sites=engine.package.sites,
        labels=whole.base.labels,
        task="a task of ten classes",
        created_at=0.0,
        created_by="benchmark",
        samples=whole.base.samples,
        score_quantiles=tuple(score_quantiles(scores)),
        codec=codec,
    )
    described = signature(part.base, seed=engine.package.digest)
    data = pack(Bundle(manifest, stored, whole.base, whole.own, described))
    read = unpack(data)
    return Learned(read.base, read.own, dict(read.tensors), len(data))


def own_features(engine: Engine, hidden: NDArray[Any], tensors: Tensors) -> Floats:
    """Normalised features of the network's own output with an adapter, float32 [n, d]."""
    return engine.network(hidden, tensors)


def right(engine: Engine, groups: Sequence[Learned], part: Part) -> NDArray[np.bool_]:
    """Which samples a device with these bundles decides rightly, bool [n]."""
    decision = GroupsDecision(
        [group.base for group in groups],
        [group.own for group in groups],
        max_rounds=MAX_ROUNDS,
    )

    def asked(group: int, rows: NDArray[np.int64]) -> Floats:
        return own_features(engine, part.hidden[rows], groups[group].tensors)

    found = decision.route(part.base, asked).label
    result: NDArray[np.bool_] = np.array(decision.labels)[found] == np.array(part.labels)
    return result


def right_alone(engine: Engine, group: Learned, part: Part) -> NDArray[np.bool_]:
    """The same by the adapter's own space alone, with no help of base features."""
    head = GaussianHead.from_statistics([group.own])
    found = head.log_likelihoods(own_features(engine, part.hidden, group.tensors)).argmax(axis=1)
    names = np.array([label for _, label in head.components])
    result: NDArray[np.bool_] = names[found] == np.array(part.labels)
    return result


def measure(engine: Engine, tasks: Sequence[tuple[Part, Part]]) -> dict[str, Any]:
    """Every form of every task's bundle: sizes, and accuracies beside those of exact numbers."""
    forms: dict[str, list[Learned]] = {}
    for number, (learn, _) in enumerate(tasks):
        begun = time.perf_counter()
        tensors = trained(engine, learn, number)
        made = {EXACT: exact(engine, learn, tensors)}
        made |= {codec: packed(engine, learn, tensors, codec) for codec in CODECS}
        for codec in AWARE_CODECS:
            aware = trained_through(engine, learn, tensors, codec, number)
            made[f"{codec}, trained through it"] = packed(engine, learn, aware, codec)
        for form, learned in made.items():
            forms.setdefault(form, []).append(learned)
        print(f"task {number + 1} of {len(tasks)}: {time.perf_counter() - begun:.0f} s", flush=True)
    judged = [judge for _, judge in tasks]
    return {form: _judged(engine, learned, judged) for form, learned in forms.items()}


def _judged(
    engine: Engine, groups: Sequence[Learned], parts: Sequence[Part]
) -> dict[str, list[float]]:
    """A number for each task: bytes and percentages."""
    each = list(zip(groups, parts, strict=True))
    rows = {
        "bytes": [float(group.size_bytes) for group, _ in each],
        "alone": [100 * right_alone(engine, group, part).mean() for group, part in each],
        "decided": [100 * right(engine, [group], part).mean() for group, part in each],
        "of_all": [100 * right(engine, groups, part).mean() for part in parts],
    }
    return {name: [round(float(value), 3) for value in values] for name, values in rows.items()}


def compared(forms: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row a form: the largest bundle, and the points lost against exact numbers."""
    rows = []
    for form, found in forms.items():
        lost = {
            name: np.array(forms[EXACT][name]) - np.array(found[name])
            for name in ("alone", "decided", "of_all")
        }
        rows.append(
            {
                "form": form,
                "bytes": round(max(found["bytes"])),
                **{f"{name}_accuracy": round(float(np.mean(found[name])), 2) for name in lost},
                **{f"{name}_points_lost": round(float(v.mean()), 2) for name, v in lost.items()},
                **{f"{name}_spread": round(float(v.std(ddof=1)), 2) for name, v in lost.items()},
            }
        )
    return rows


def _objective(engine: Engine, part: Part) -> tuple[CosineHead, NDArray[np.int64]]:
    names, targets = np.unique(np.array(part.labels, dtype=object), return_inverse=True)
    network = engine.network(part.hidden)
    rows = np.stack([network[targets == k].mean(axis=0) for k in range(len(names))])
    return CosineHead(rows.astype(np.float32)), targets.astype(np.int64)


def _split(
    rows: NDArray[np.int64], truth: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Four fifths of every class to learn from, and the rest."""
    held = np.zeros(len(rows), np.bool_)
    rng = np.random.default_rng(0)
    for name in np.unique(truth[rows]):
        members = rng.permutation(np.flatnonzero(truth[rows] == name))
        held[members[: int(len(members) * HELD_OUT)]] = True
    return rows[~held], rows[held]


def _part(
    engine: Engine, activations: Activations, rows: NDArray[np.int64], labels: tuple[str, ...]
) -> Part:
    hidden = activations.rows(rows)
    return Part(hidden, labels, engine.features(hidden))


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = arguments(
        "What an adapter loses by having few bits.", "adapter_size", encoder="ViT-Tiny at 96 px"
    )
    parser.add_argument("--cache", type=Path, default=Path("bench-out") / "cache")
    parser.add_argument("--tasks", type=int, default=6, help="the first so many of each stream")
    parser.add_argument("--held-out", action="store_true", help="judge by training samples")
    options = parsed(parser, argv)
    package = (
        EncoderPackage.load(options.encoder)
        if options.encoder
        else suite_encoder(options.data, options.cache)
    )
    engine = Engine(package, recipe=RECIPE, rank=RANK)
    streams = {}
    for name in STREAMS:
        tasks = parts_of(
            name, engine, options.data, options.cache, options.tasks, held_out=options.held_out
        )
        forms = measure(engine, tasks)
        rows = compared(forms)
        streams[name] = {"tasks": len(tasks), "rows": rows, "each_task": forms}
        for row in rows:
            print(name, row, flush=True)
    report = {
        "benchmark": "adapter_size",
        **circumstances(package),
        "judged_by": "held-out training samples" if options.held_out else "test samples",
        "recipe": RECIPE,
        "aware_recipe": AWARE,
        "rank": RANK,
        "streams": streams,
    }
    write(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
