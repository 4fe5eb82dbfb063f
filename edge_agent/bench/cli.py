"""``driftkeel bench``: measure the strategies on any labelled set, or run the published suite.

A thin shell: reads options, has the sets encoded, hands the runs to the runner, prints.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import click
from rich.console import Console
from rich.table import Table

from adapter_store.blobs import write_durably
from edge_agent.bench import report as reports
from edge_agent.bench.activations import Activations, cached
from edge_agent.bench.datasets import LabelledSet, load
from edge_agent.bench.progress import counted, shown
from edge_agent.bench.runner import Outcome, Run, execute, plan, versions
from edge_agent.bench.streams import Kind, StreamSettings
from edge_agent.bench.suite import STRATEGIES, SUITES, set_file, suite_encoder
from edge_agent.bench.worker import Training
from edge_agent.strategies import NAMES
from exporter.package import EncoderPackage, default_encoder_package

MEASURES: Final = (
    "accuracy_matrix",
    "last",
    "average",
    "forgetting",
    "train_s",
    "eval_ms_per_sample",
    "passes_per_sample",
    "bytes_per_task",
    "peak_memory_mb",
)
_TASKS: Final = 10  # as many as a set is cut into when nobody says how large a task is


@dataclass(frozen=True)
class _Names(click.ParamType):  # type: ignore[type-arg] # generic from click 8.3 on
    """A comma-separated choice of names."""

    known: tuple[str, ...]
    name = "NAME,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in str(value).split(",") if part.strip()))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is none of {', '.join(self.known)}", param, ctx)
        if not names:
            self.fail(f"name at least one of {', '.join(self.known)}", param, ctx)
        return names


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_TRAINING = _options(
    click.option("--family", default="bottleneck", show_default=True, help="Adapter family."),
    click.option("--rank", type=click.IntRange(1), default=16, show_default=True),
    click.option("--epochs", type=click.IntRange(1), default=20, show_default=True),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
    click.option(
        "--learning-rate",
        type=click.FloatRange(0, min_open=True),
        default=0.003,
        show_default=True,
        help="Peak learning rate; strategies with a published one of their own keep it.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["bfloat16", "float32"]),
        default="bfloat16",
        show_default=True,
        help="Of the encoder while training.",
    ),
)
_RUNNING = _options(
    click.option(
        "--jobs",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Runs at once; each uses one thread.",
    ),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where prefix activations are kept.  [default: ~/.cache/driftkeel/bench]",
    ),
    click.option("--fresh", is_flag=True, help="Run also what has a result already."),
)


@click.group()
def bench() -> None:
    """Measure how strategies learn and forget.

    `cil` measures any labelled set; `suite` runs the published benchmark and `report` writes its
    tables and plots.
    """


@bench.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="A labelled set: an .npz file (x, y; x_train …; JPEG packs; signals) or a folder with a "
    "folder of images for each class.",
)
@click.option(
    "--encoder",
    default="default",
    show_default=True,
    help="An encoder package's directory, or `default`, the one that ships.",
)
@click.option("--init", type=click.IntRange(0), help="Classes of the first task; 0: as the others.")
@click.option(
    "--increment",
    type=click.IntRange(1),
    help="Classes of every later task.  [default: a tenth of all classes]",
)
@click.option(
    "--order-seed",
    type=click.IntRange(0, 2**32 - 1),
    default=1993,
    show_default=True,
    help="Class order: numpy.random.RandomState(SEED).permutation(classes).",
)
@click.option(
    "--strategies",
    type=_Names(NAMES),
    default=",".join(NAMES),
    help=f"Of {', '.join(NAMES)}.  [default: all]",
)
@click.option(
    "--stream",
    type=click.Choice(["class", "domain", "mixed"]),
    help="What tasks bring: new classes, new domains or both.  [default: class; domain when "
    "--domain-key is given]",
)
@click.option("--domain-key", help="The column that domains come from: domain, speaker, …")
@click.option(
    "--domain-order",
    help="The domains in order, with commas.  [default: permuted by --order-seed]",
)
@click.option("--shots", type=click.IntRange(1), help="Most samples of a class in a task.")
@click.option(
    "--blurry",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Share of every task's samples that arrive in another task.",
)
@click.option(
    "--imbalance",
    type=click.FloatRange(1),
    default=1.0,
    help="How many times the samples of the last class the first one has.",
)
@click.option(
    "--revisit",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Share of every task's samples that arrive in a later task.",
)
@click.option(
    "--label-noise",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Share of every task's training labels that are wrong.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON here.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep each strategy's result here; what is there already is not run again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON instead of a table.")
@_TRAINING
@_RUNNING
@click.pass_context
def cil(context: click.Context, /, **options: Any) -> None:
    """Class- or domain-incremental learning on one labelled set.

    All strategies see the same tasks, features, order and seed, each in a process of its own. A
    set that comes in one part is split 80/20 by the seed.

    \b
    driftkeel bench cil --data cifar100-small.npz --init 10 --increment 10 \\
        --strategies frozen,driftkeel --out result.json
    """  # noqa: D301 - \b keeps click from joining the example's lines
    package = _package(options["encoder"])
    data = load(options["data"])
    settings = _stream(options, len(data.classes.names))
    activations = _encoded(data, package, options)
    runs = plan(
        data.name,
        data,
        settings,
        domain_key=options["domain_key"],
        package=package,
        activations=activations,
        training=_training(options),
        strategies=options["strategies"],
    )
    outcomes = _run(runs, options["runs"], options)
    found = _told(outcomes)
    if options["out"]:
        path: Path = options["out"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(found, indent=1).encode() + b"\n")
    if options["as_json"]:
        click.echo(json.dumps(found, indent=1))
    else:
        _table(found)
    context.exit(int(any(outcome.result is None for outcome in outcomes)))


@bench.command()
@click.option(
    "--data",
    envvar="DRIFTKEEL_DATA",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The directory with data/ and encoders/ (or $DRIFTKEEL_DATA); see benchmarks/README.md.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Results, one file a run; runs that have one are not run again.",
)
@click.option(
    "--suites",
    type=_Names(tuple(SUITES)),
    default=",".join(SUITES),
    help=f"Of {', '.join(SUITES)}.  [default: all]",
)
@click.option(
    "--strategies",
    type=_Names(NAMES),
    default=",".join(name for name in STRATEGIES if name in NAMES),
    show_default=True,
)
@click.option("--seeds", default="0", show_default=True, help="Seeds, with commas.")
@click.option("--encoder", type=click.Path(path_type=Path), help="Another encoder package.")
@_TRAINING
@_RUNNING
@click.pass_context
def suite(context: click.Context, /, **options: Any) -> None:
    """Run the published benchmark; it can be stopped and started again.

    Seed 0 has the published class order, RandomState(1993); seed s has RandomState(1993 + s).
    """
    try:
        seeds = sorted({int(part) for part in options["seeds"].split(",")})
    except ValueError as error:
        raise click.BadParameter("give whole numbers, as 0,1,2", param_hint="--seeds") from error
    cache = _cache(options)
    package = (
        EncoderPackage.load(options["encoder"])
        if options["encoder"]
        else suite_encoder(options["data"], cache, progress=lambda line: click.echo(line, err=True))
    )
    planned: list[Run] = []
    for name in options["suites"]:
        chosen = SUITES[name]
        data = load(set_file(chosen, options["data"]))
        activations = _encoded(data, package, options)
        for seed in seeds:
            planned += plan(
                name,
                data,
                chosen.settings(seed),
                domain_key=chosen.domain_key,
                package=package,
                activations=activations,
                training=_training(options),
                strategies=options["strategies"],
            )
    planned.sort(key=lambda run: run.seed)  # a whole seed first: it is worth something alone
    outcomes = _run(planned, options["out"], options)
    failed = [outcome for outcome in outcomes if outcome.result is None]
    for outcome in failed:
        click.echo(f"failed: {outcome.run.file}: {outcome.error}", err=True)
    click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} results in {options['out']}")
    context.exit(int(bool(failed)))


@bench.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("docs/benchmarks/learning.md"),
    show_default=True,
    help="The page with the markers; plots go to the directory of its name.",
)
def report(results: Path, page: Path) -> None:
    """Write tables and plots of the suite's RESULTS into a page."""
    reports.write(results, page)
    click.echo(f"written to {page}")


def _package(given: str) -> EncoderPackage:
    return default_encoder_package() if given == "default" else EncoderPackage.load(Path(given))


def _stream(options: dict[str, Any], classes: int) -> StreamSettings:
    kind: Kind = options["stream"] or ("domain" if options["domain_key"] else "class")
    increment = options["increment"] or math.ceil(classes / _TASKS)
    order = options["domain_order"]
    return StreamSettings(
        kind=kind,
        init=options["init"] or increment,
        increment=increment,
        order_seed=options["order_seed"],
        domain_order=tuple(part.strip() for part in order.split(",")) if order else (),
        shots=options["shots"],
        imbalance=options["imbalance"],
        blurry=options["blurry"],
        revisit=options["revisit"],
        label_noise=options["label_noise"],
        seed=options["seed"],
    )


def _training(options: dict[str, Any]) -> Training:
    precision: Literal["float32", "bfloat16"] = options["precision"]
    return Training(
        family=options["family"],
        rank=options["rank"],
        epochs=options["epochs"],
        batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        precision=precision,
    )


def _cache(options: dict[str, Any]) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache: Path = options["cache"] or Path(home) / "driftkeel" / "bench"
    return cache


def _encoded(data: LabelledSet, package: EncoderPackage, options: dict[str, Any]) -> Activations:
    with counted(data.name, len(data)) as advance:
        return cached(data, package, _cache(options), threads=options["jobs"], progress=advance)


def _run(runs: Sequence[Run], out: Path | None, options: dict[str, Any]) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix="driftkeel-bench-") as folder, shown(len(runs)) as told:
        return execute(
            runs,
            out or Path(folder),
            jobs=options["jobs"],
            watcher=told,
            fresh=options["fresh"],
        )


def _told(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `cil` writes."""
    found: dict[str, Any] = {
        "strategies": {
            outcome.run.strategy: {name: outcome.result[name] for name in MEASURES}
            for outcome in outcomes
            if outcome.result is not None
        },
        "settings": outcomes[0].run.settings,
        "versions": versions(),
    }
    if failed := {o.run.strategy: o.error for o in outcomes if o.result is None}:
        found["failed"] = failed
    return found


def _table(found: dict[str, Any]) -> None:
    heads = ("last %", "average %", "forgotten", "train s", "ms", "passes", "bytes", "MB")
    table = Table(caption="ms and passes a sample, bytes a task, MB at the peak")
    table.add_column("strategy", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, measured in found["strategies"].items():
        table.add_row(name, *(reports.shown(measured[key]) for key in MEASURES[1:]))
    # A file or a pipe has no width; there every row stays one line.
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(table)
    for name, error in found.get("failed", {}).items():
        click.echo(f"{name} failed: {error}", err=True)
