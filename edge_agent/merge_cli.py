"""``driftkeel merge``: several bundles into one, measured on their tasks before it is saved.

Thin: reads options and files, calls `exporter.merging` and `edge_agent.merged`, prints and writes.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from adapter_store.blobs import write_durably
from adapter_store.bundle import bundle_digest
from edge_agent.errors import TrainingDataError
from edge_agent.fit import load_labelled
from edge_agent.merged import Adapters, Importances, MergedBundle, merge_bundles
from exporter.console import training_extra
from exporter.merging import (
    Change,
    Merged,
    arithmetic,
    by_importance,
    dare,
    merged,
    side_by_side,
    ties,
    weighted,
)
from exporter.package import EncoderPackage, default_encoder_package
from exporter.sessions import EncoderSessions

METHODS = (
    "average", "weighted", "statistics", "fisher", "arithmetic", "ties", "dare", "side-by-side",
)  # fmt: skip
# What their papers use where nothing can be tuned on.
_ARITHMETIC_SCALE = 0.4
_TIES_SCALE = 1.0


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Labelled samples of each bundle, in the same order, as `agent fit` takes them; best "
    "ones that it was not trained on.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="average",
    show_default=True,
    help="How to merge; docs/exporting.md says what each is for.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new bundle.")
@click.option(
    "--encoder",
    "encoder_path",
    type=click.Path(path_type=Path),
    help="The encoder package's directory; the shipped encoder when absent.",
)
@click.option("--weight", multiple=True, type=float, help="weighted: one for each bundle.")
@click.option("--scale", type=float, help="arithmetic, ties: the papers' λ.  [default: 0.4, 1]")
@click.option("--keep", type=float, default=0.2, show_default=True, help="ties: share to keep.")
@click.option("--drop", type=float, default=0.5, show_default=True, help="dare: share to drop.")
@click.option("--seed", type=int, default=0, show_default=True, help="dare: names its chance.")
@click.option("--rank", type=int, help="The merged rank; the largest of theirs when absent.")
def merge(
    bundles: tuple[Path, ...],
    data: tuple[Path, ...],
    out: Path,
    encoder_path: Path | None,
    **settings: Any,
) -> None:
    """Merge BUNDLES of one encoder and family into one.

    Prints what a device would answer rightly on each task's held-out samples without adapters,
    with all bundles installed, with the merged bundle's statistics but no adapter, and with the
    merged bundle alone; then writes it.
    """
    if len(data) != len(bundles):
        raise click.UsageError(f"{len(bundles)} bundles need as many --data; found {len(data)}")
    if settings["method"] == "fisher":
        with training_extra():
            import edge_agent.importance  # noqa: F401, PLC0415 - before anything is computed
    package = EncoderPackage.load(encoder_path) if encoder_path else default_encoder_package()
    made = merge_bundles(
        EncoderSessions(package, threads=os.cpu_count() or 1),
        [_read(path) for path in bundles],
        [load_labelled(path, package.image_size) for path in data],
        partial(way, settings),
        created_at=time.time(),
        created_by=getpass.getuser(),
    )
    _table(made)
    write_durably(out, made.data)
    click.echo(f"{out}: {bundle_digest(made.data)}, {len(made.data)} bytes")


def way(
    settings: Mapping[str, Any],
    family: str,
    adapters: Adapters,
    samples: Sequence[int],
    importances: Importances,
) -> Merged:
    """Merges adapters as the command's options say.

    Args:
        settings: `method`, `rank`, `weight`, `scale`, `keep`, `drop` and `seed`.
        family: The adapters' family.
        adapters: Their tensors.
        samples: How many samples each was trained on.
        importances: How much each of their numbers matters; asked by `fisher` alone.
    """
    method, rank = settings["method"], settings["rank"]
    weights = {"weighted": settings["weight"], "statistics": samples}.get(method)
    shares = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    scale = settings["scale"]
    if method == "side-by-side":
        return Merged(side_by_side(family, adapters, shares), kept=1.0)

    def dropped(changes: Sequence[Change]) -> Change:
        rng = np.random.default_rng(settings["seed"])
        return weighted(dare(changes, settings["drop"], rng), shares)

    def by_information(changes: Sequence[Change]) -> Change:
        return by_importance(changes, importances())

    ways: dict[str, Callable[[Sequence[Change]], Change]] = {
        "arithmetic": partial(arithmetic, scale=_ARITHMETIC_SCALE if scale is None else scale),
        "ties": partial(ties, keep=settings["keep"], scale=_TIES_SCALE if scale is None else scale),
        "dare": dropped,
        "fisher": by_information,
    }
    chosen = ways.get(method, partial(weighted, weights=shares))
    return merged(family, adapters, chosen, rank=rank)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingDataError(f"cannot read {path}: {error.strerror}") from error


def _table(made: MergedBundle) -> None:
    table = Table(caption=f"% of held-out samples; the rank holds {100 * made.kept:.1f} %")
    heads = ("task", "samples", "no adapter", "all installed", "merge's statistics", "merged")
    for head in heads:
        table.add_column(head, justify="left" if head == "task" else "right")
    for task in made.tasks:
        shares = (task.base, task.apart, task.statistics, task.merged)
        table.add_row(task.task, str(task.samples), *(f"{100 * share:.1f}" for share in shares))
    Console().print(table)
