"""Tables and plots of the suite's results, written between the markers of a page.

`driftkeel bench report` calls `write`. Every number comes from a result file; nothing is typed by
hand. Plotting needs matplotlib, which only this imports.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from adapter_store.blobs import write_durably
from edge_agent.bench.suite import STRATEGIES, SUITES
from edge_agent.errors import BenchmarkError

BEGIN: Final = "<!-- learning results -->"
END: Final = "<!-- end of learning results -->"
_COLUMNS: Final = {
    "last": "last, %",
    "average": "average, %",
    "forgetting": "forgetting, points",
    "task_spread": "spread over tasks, points",
    "train_s": "training, s",
    "eval_ms_per_sample": "ms a sample",
    "passes_per_sample": "passes a sample",
    "bytes_per_task": "bytes a task",
    "peak_memory_mb": "peak memory, MB",
}

Results = Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]
"""Results by suite and strategy, one a seed."""


def read(folder: Path) -> Results:
    """Read every result under a directory.

    Raises:
        BenchmarkError: There is none, or a file is no result.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(result["suite"], {}).setdefault(result["strategy"], []).append(result)
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path} is no result of the benchmark: {error}") from error
    if not found:
        raise BenchmarkError(f"{folder} holds no results; run `driftkeel bench suite` first")
    return {
        suite: {
            name: sorted(found[suite][name], key=lambda r: r["seed"])
            for name in _ordered(found[suite], STRATEGIES)
        }
        for suite in _ordered(found, SUITES)
    }


def write(folder: Path, page: Path) -> None:
    """Replace what is between the page's markers, and the plots beside it.

    A page that does not exist is made; plots go to the directory of the page's name.

    Raises:
        BenchmarkError: There are no results, or the page has no markers.
    """
    results = read(folder)
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"{page} has no place between {BEGIN!r} and {END!r}; add both lines")
    plots = page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    sections = [_provenance(results)]
    for suite, strategies in results.items():
        _plot(strategies, plots / f"{suite}.svg")
        title = SUITES[suite].title if suite in SUITES else suite
        sections += [
            f"### {title}",
            table(strategies),
            f"![{title}: accuracy, passes and bytes]({plots.name}/{suite}.svg)",
        ]
    body = "\n\n".join(sections)
    write_durably(page, f"{head}{BEGIN}\n{body}\n{END}{tail}".encode())


def table(strategies: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """One suite's table, as Markdown: the mean over seeds ± their standard deviation."""
    lines = [
        f"| strategy | {' | '.join(_COLUMNS.values())} |",
        f"|---|{'---|' * len(_COLUMNS)}",
    ]
    for name, runs in strategies.items():
        cells = [_cell([run[key] for run in runs]) for key in _COLUMNS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """A number as people read it.

    Example:
        >>> shown(44.312), shown(123456.0), shown(None)
        ('44.3', '123,456', '–')
    """
    if value is None:
        return "–"
    return (
        f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:.1f}"
        if abs(value) >= 10
        else (f"{value:.2f}")
    )


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    mean = shown(float(np.mean(known)))
    return mean if len(known) == 1 else f"{mean} ± {shown(float(np.std(known, ddof=1)))}"


def _ordered(names: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> list[str]:
    listed = [name for name in known if name in names]
    return listed + sorted(set(names) - set(listed))


def _provenance(results: Results) -> str:
    runs = [
        run for strategies in results.values() for found in strategies.values() for run in found
    ]
    machines = {f"{run['machine']['cpu']}, {run['machine']['cores']} cores" for run in runs}
    encoders = {
        f"{run['settings']['encoder']['name']} (`{run['settings']['encoder']['digest'][:12]}`)"
        for run in runs
    }
    used = {" ".join(pair) for run in runs for pair in run["versions"].items()}
    seeds = sorted({run["seed"] for run in runs})
    told = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        f"Written on {day} from {len(runs)} runs with {told}; encoder "
        f"{', '.join(sorted(encoders))}; {'; '.join(sorted(machines))}, one thread a run; "
        f"{', '.join(sorted(used))}."
        + (" Mean ± standard deviation over the seeds." if len(seeds) > 1 else "")
    )


def _plot(strategies: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - of the `demo` extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    # The same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "driftkeel", "font.size": 9}):
        figure, (over, cost, size) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for number, (name, runs) in enumerate(strategies.items()):
            colour = f"C{number % 10}"
            curves = np.array([run["seen"] for run in runs], dtype=np.float64)
            tasks = np.arange(1, curves.shape[1] + 1)
            mean = curves.mean(axis=0)
            over.plot(tasks, mean, marker="o", markersize=3, label=name, color=colour)
            if len(runs) > 1:
                spread = curves.std(axis=0, ddof=1)
                over.fill_between(tasks, mean - spread, mean + spread, color=colour, alpha=0.2)
            last = float(np.mean([run["last"] for run in runs]))
            passes = float(np.mean([run["passes_per_sample"] for run in runs]))
            cost.plot([passes], [last], "o", color=colour)
            cost.annotate(name, (passes, last), xytext=(4, 4), textcoords="offset points")
            stored = float(np.mean([run["bytes_per_task"] for run in runs]))
            size.barh(name, stored, color=colour)
        over.set(xlabel="tasks learned", ylabel="accuracy on all of them, %")
        over.xaxis.get_major_locator().set_params(integer=True)
        over.legend(fontsize=7)
        cost.set(xlabel="encoder passes a sample", ylabel="accuracy after the last task, %")
        cost.margins(0.2)
        size.set(xlabel="bytes a task", xscale="log")
        size.invert_yaxis()
        for axes in (over, cost, size):
            axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
