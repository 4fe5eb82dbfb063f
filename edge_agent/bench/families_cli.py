"""`driftkeel families`: the adapter families of an encoder, side by side on one labelled set.

One adapter a family, trained on the training part by the shared loop, with a Gaussian head on its
features. It measures and prints; it keeps nothing but the cache of activations.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from adapter_store.codecs import CODECS, encoded_size
from edge_agent.bench.activations import cached
from edge_agent.bench.datasets import LabelledSet, load
from edge_agent.bench.progress import counted
from edge_agent.errors import BenchmarkError
from edge_agent.strategies.engine import Engine
from exporter.package import EncoderPackage, default_encoder_package
from ood.statistics import ClassStatistics, GaussianHead

Floats = NDArray[np.float32]

# The family without tensors, as `exporter.families` names it; importing that needs torch.
TRAINING_FREE: Final = "gaussian"
_TEST_SHARE: Final = 0.2
_TIMED: Final = 50


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The labelled set.")
@click.option(
    "--encoder",
    "encoder_path",
    type=click.Path(path_type=Path),
    help="An encoder package built for the families; the shipped one when absent.",
)
@click.option("--families", default="all", show_default=True, help="With commas, or all it has.")
@click.option("--rank", default=16, show_default=True, type=click.IntRange(1, 1024))
@click.option("--epochs", default=12, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--learning-rate", default=0.003, show_default=True, type=float)
@click.option("--nested", is_flag=True, help="Train nested ranks and measure a quarter of them.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--cache", type=click.Path(path_type=Path), help="Where activations are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and no table.")
def families(
    data: Path, encoder_path: Path | None, families: str, cache: Path | None, *, as_json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Compare adapter families on a labelled set.

    `gaussian`, a head on the bare encoder, is always measured: it is what training has to beat.
    """
    package = EncoderPackage.load(encoder_path) if encoder_path else default_encoder_package()
    names = package.families if families == "all" else tuple(families.split(","))
    for name in names:
        package.family(name)
    samples = load(data)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache or home / "driftkeel" / "bench"
    with counted(samples.name, len(samples)) as advance:
        kept = cached(samples, package, folder, threads=settings["threads"], progress=advance)
    hidden = kept.rows(np.arange(len(samples))).astype(np.float32)
    test = _test_part(samples, settings["seed"])
    labels = samples.classes.index
    found: dict[str, Any] = {}
    for family in (None, *names):
        name = family or TRAINING_FREE
        click.echo(f"measuring {name}", err=True)
        found[name] = _measured(
            package, family, hidden=hidden, labels=labels, test=test, settings=settings
        )
    about = {"encoder": package.digest, "data": samples.name, "test": int(test.sum()), **settings}
    if as_json:
        click.echo(json.dumps({"families": found, "settings": about}, indent=2))
    else:
        _table(found)


def _test_part(samples: LabelledSet, seed: int) -> NDArray[np.bool_]:
    """The set's own test part, or a fifth of each class."""
    if samples.test is not None:
        return samples.test
    rng = np.random.default_rng(seed)
    test = np.zeros(len(samples), dtype=np.bool_)
    for label in range(len(samples.classes.names)):
        rows = rng.permutation(np.flatnonzero(samples.classes.index == label))
        test[rows[: round(_TEST_SHARE * len(rows))]] = True
    if not test.any() or test.all():
        raise BenchmarkError(f"{samples.name} has too few samples of each class to test on")
    return test


def _measured(
    package: EncoderPackage,
    family: str | None,
    *,
    hidden: Floats,
    labels: NDArray[np.int64],
    test: NDArray[np.bool_],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything about one family; of None, the bare encoder."""
    # Only here: the command's help needs no torch.
    from edge_agent.trainer_loop import Recipe  # noqa: PLC0415

    recipe = Recipe(
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        nested=settings["nested"],
    )
    engine = Engine(
        package,
        recipe=recipe,
        family=family or package.families[0],
        rank=settings["rank"],
        threads=settings["threads"],
    )
    begun = time.perf_counter()
    tensors = _trained(engine, hidden[~test], labels[~test], recipe.seed) if family else {}
    train_s = time.perf_counter() - begun
    measured: dict[str, Any] = {
        "accuracy": _accuracy(engine, tensors, hidden, labels, test),
        "parameters": sum(value.size for value in tensors.values()),
        "train_s": train_s if family else 0.0,
        "latency_ms": _latency_ms(engine, tensors, hidden[test][:1]),
        "merge_ms": _merge_ms(tensors),
        "bytes": {
            codec: encoded_size({k: v.shape for k, v in tensors.items()}, codec) if family else 0
            for codec in CODECS
        },
    }
    if family and settings["nested"]:
        measured["accuracy_quarter_rank"] = _truncated(engine, tensors, hidden, labels, test)
    return measured


def _trained(
    engine: Engine, hidden: Floats, labels: NDArray[np.int64], seed: int
) -> dict[str, Floats]:
    from edge_agent.objectives import CosineHead  # noqa: PLC0415

    classes, targets = np.unique(labels, return_inverse=True)
    base = engine.adapted(hidden)
    head = np.stack([base[targets == k].mean(axis=0) for k in range(len(classes))])
    objective = CosineHead(head.astype(np.float32))
    return engine.train(hidden, targets.astype(np.int64), engine.fresh(seed), objective)


def _accuracy(
    engine: Engine,
    tensors: Mapping[str, Floats],
    hidden: Floats,
    labels: NDArray[np.int64],
    test: NDArray[np.bool_],
) -> float:
    """Share of the test part that a Gaussian head on the adapted features gets right."""
    features = engine.adapted(hidden, tensors or None)
    # Widths that sort as the numbers do, so that the head's order is the classes'.
    names = np.array([f"{label:08d}" for label in labels])
    head = GaussianHead.from_statistics([ClassStatistics.fit(features[~test], tuple(names[~test]))])
    likely = head.label_probabilities(head.log_likelihoods(features[test]))
    found = np.array(head.labels)[likely.argmax(axis=1)]
    return float(np.mean(found == names[test]))


def _truncated(
    engine: Engine,
    tensors: Mapping[str, Floats],
    hidden: Floats,
    labels: NDArray[np.int64],
    test: NDArray[np.bool_],
) -> float | None:
    from exporter.families import adapter_family, truncate  # noqa: PLC0415

    family = adapter_family(engine.family)
    if not family.ranked:
        return None
    return _accuracy(
        engine, truncate(family, tensors, max(engine.rank // 4, 1)), hidden, labels, test
    )


def _latency_ms(engine: Engine, tensors: Mapping[str, Floats], one: Floats) -> float:
    """Median milliseconds of one sample's suffix."""
    engine.adapted(one, tensors or None)
    taken = []
    for _ in range(_TIMED):
        begun = time.perf_counter()
        engine.adapted(one, tensors or None)
        taken.append(time.perf_counter() - begun)
    return 1000 * float(np.median(taken))


def _merge_ms(tensors: Mapping[str, Floats]) -> float:
    """Milliseconds of one momentum merge, W <- 0.9 W + 0.1 M, as it follows a training step."""
    begun = time.perf_counter()
    for value in tensors.values():
        np.add(0.9 * value, 0.1 * value)
    return 1000 * (time.perf_counter() - begun)


def _table(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(caption="ms of one sample's suffix, ms of one merge, bytes of an adapter")
    table.add_column("family", no_wrap=True)
    quarter = any("accuracy_quarter_rank" in row for row in found.values())
    heads = ["accuracy %", *(["at rank / 4"] if quarter else []), "numbers", "train s", "ms"]
    for head in [*heads, "merge ms", *CODECS]:
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in found.items():
        small = row.get("accuracy_quarter_rank")
        cells = [f"{100 * row['accuracy']:.1f}"]
        if quarter:
            cells.append("-" if small is None else f"{100 * small:.1f}")
        cells += [str(row["parameters"]), f"{row['train_s']:.1f}", f"{row['latency_ms']:.2f}"]
        cells.append(f"{row['merge_ms']:.2f}")
        table.add_row(name, *cells, *(str(row["bytes"][codec]) for codec in CODECS))
    console = Console()
    # A file or a pipe has no width; there every row stays one line.
    (console if console.is_terminal else Console(width=140)).print(table)
