"""The section on the alarm of docs/benchmarks/ood.md, and its plot, from the report of `alarm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.pages import PAGE, table, write_section

PLOT: Final = PAGE.parent / "ood" / "alarm.svg"

_INTRODUCTION: Final = """\
Written by [`benchmarks/alarm.py`](../../benchmarks/alarm.py) into
[`results/alarm.json`](../../benchmarks/results/alarm.json). Delays are compared on the same score
streams of a device's own detector (ViT-Tiny, 200 calibration samples), after every detector's one
parameter was set to the same *measured* run length without a shift. "By class" is the default,
which a change of class proportions does not alarm; "one pool" does not tell classes apart, as no
rival does."""

_TRIED: Final = """\
Ratios are medians over the pairs. Neither delay bar is met on every pair, least of all where scores
hardly differ (other classes of CIFAR-100, art paintings, other speakers).
Without telling classes apart the alarm is mostly sooner, and a change of proportions alone raises
it (last table). A sample that only exceeds known scores gains a factor of 1/q at most, and n
calibration scores allow no q below 1/(n + 1): a class with a dozen of 200 scores needs several
samples to be sure. Rivals look at how far scores lie beyond the known ones, which promises nothing
without knowing their distribution; they are set here by a run length that nobody could measure on a
device.

Levels for classes from 8 calibration samples instead of 20, bets on all levels together and bets
that share their evidence were chosen on simulated shifts and on `cwru-load0`, which is among the
judged pairs; what 8 does on the others had been seen, too. One choice was made by all pairs: bets
that share equally made weak gradual shifts later, and small bets now share less. Tried without gain
over these: 5 or 12 samples a class; two to four sizes of bets; five to ten levels; bets on powers
of the rank; bets that keep their evidence beside those that share it. Tried with gain only where a
shift falls on few classes, and left out: larger bets on classes that have lately become more
frequent."""


def write(report: Mapping[str, Any], page: Path = PAGE, plot: Path = PLOT) -> None:
    """Write the section between its markers, and the plot beside the page."""
    write_section("alarm", section(report), page)
    _draw(report["compared"], plot)


def section(report: Mapping[str, Any]) -> str:
    """The section's Markdown."""
    parts = [_INTRODUCTION, bars(report), "![Delays](ood/alarm.svg)", _TRIED]
    parts += [
        "### Run lengths without a shift",
        run_lengths(report["budgets"]),
        "### Delays",
        delays(report["compared"]),
        "### A change of class proportions alone",
        proportions(report["proportions"]),
    ]
    return "\n\n".join(parts)


def bars(report: Mapping[str, Any]) -> str:
    """Each bar and what was measured."""
    found = report["bars"]
    rows: list[Sequence[object]] = [
        (
            "lower 95 % bound of the run length ≥ the budget (1e3, 1e4, 1e5; n = 50, 200, 1,000)",
            (
                f"{found['budgets_held']} of {found['budgets_asked']} cases, at least "
                f"{found['least_margin']:.2f} times the budget"
            ),
            _told(found["budgets_held"] == found["budgets_asked"]),
        )
    ]
    for shape, most in (("abrupt", 0.5), ("gradual", 1.0)):
        ours, pooled = found[shape], found[f"{shape}_pooled"]
        met = ours["median_ratio"] is not None and ours["median_ratio"] <= most
        rows.append(
            (
                f"median delay, {shape}, ≤ {most:g} of the best rival's",
                f"{_ratio(ours)}; one pool {_ratio(pooled)}",
                _told(met and ours["met_in"] == ours["pairs"]),
            )
        )
    cost, state = found["us_one_by_one"], found["state_bytes"]
    rows += [
        ("cost ≤ 20 µs a sample", f"{cost:g} µs one by one", _told(cost <= 20)),
        ("state ≤ 32 KB", f"{state:,} bytes with 400 classes", _told(state <= 32 * 1024)),
        (
            "restart between any two samples: same decisions",
            f"{report['restarts']['samples']} restarts, {report['restarts']['alarms']} alarms",
            _told(found["restart_safe"]),
        ),
    ]
    return table(("bar", "measured", ""), rows)


def run_lengths(budgets: Sequence[Mapping[str, Any]]) -> str:
    """Measured run lengths, of streams that are independent and of some that are not."""
    rows = [
        (
            row["stream"],
            row["block"],
            row["calibration"],
            f"{row['budget']:,.0f}",
            f"{row['runs']:,}",
            f"{row['lower_95']:,.0f}",
            "yes" if row["holds"] else "no",
        )
        for row in budgets
    ]
    head = ("stream", "`block`", "n", "budget", "runs", "lower 95 % bound", "held")
    return table(head, rows) + (
        "\n\nRuns are cut at a small multiple of the budget, which can only shorten their mean. "
        "Streams that are not independent ask for `alarm.block`; with a block of 1 they show why."
    )


def delays(compared: Sequence[Mapping[str, Any]]) -> str:
    """The median delay for every pair and shape."""
    rows = [
        (
            f"{row['world']} / {row['pair']}",
            row["shape"],
            _samples(row["ours"]),
            _samples(row["pooled"]),
            _samples(row["rival"]),
            row["best_rival"] if row["rival"] is not None else "–",
        )
        for row in compared
    ]
    head = ("pair", "shape", "by class", "one pool", "best rival", "which")
    return table(head, rows) + (
        "\n\nMedian samples from the shift to the alarm; – where fewer than half of the streams "
        "were noticed."
    )


def proportions(found: Mapping[str, Mapping[str, float]]) -> str:
    """The share of streams in which other proportions alone raise an alarm."""
    rows = [
        (
            world,
            n,
            *(
                f"{100 * values[f'{classes}, {mode}, n={n}']:.1f} %"
                for classes in ("nearest", "true")
                for mode in ("by class", "one pool")
            ),
        )
        for world, values in found.items()
        for n in (200, 1000)
    ]
    head = ("world", "n", "by class", "one pool", "true classes, by class", "true, one pool")
    return table(head, rows) + (
        "\n\nStreams of 1,000 samples with other proportions, of the classes they are nearest to "
        "or of the true ones, that alarm under a budget of 10,000; a tenth may."
    )


def _ratio(found: Mapping[str, Any]) -> str:
    middle = "–" if found["median_ratio"] is None else f"{found['median_ratio']:.2f}"
    return f"median ratio {middle}, {found['met_in']} of {found['pairs']} pairs"


def _samples(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _told(met: bool) -> str:
    return "met" if met else "**missed**"


def _draw(compared: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - only to draw

    shapes = list(dict.fromkeys(row["shape"] for row in compared))
    figure = Figure(figsize=(3.2 * len(shapes), 3.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(shapes), sharex=True, sharey=True))
    limit = max(row[key] or 1 for row in compared for key in ("rival", "ours", "pooled"))
    for panel, shape in zip(panels, shapes, strict=True):
        rows = [row for row in compared if row["shape"] == shape]
        for key, name, mark in (("ours", "by class", "o"), ("pooled", "one pool", "x")):
            # A shift that was not noticed lies on the edge.
            points = [(row["rival"] or 2 * limit, row[key] or 2 * limit) for row in rows]
            panel.plot(*zip(*points, strict=True), mark, label=name, alpha=0.7)
        panel.plot([1, 2 * limit], [1, 2 * limit], color="gray", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=shape, xlabel="best rival, samples")
    panels[0].set_ylabel("driftkeel, samples")
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
