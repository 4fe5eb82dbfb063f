"""docs/benchmarks/quantised.md's tables, from the reports of `quantised` and its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.pages import PAGE as OOD_PAGE
from benchmarks.pages import table, write_section

PAGE: Final = OOD_PAGE.parent / "quantised.md"
ADAPTERS: Final = "quantised_adapters"
_FASTER: Final = 1.8
_LOST: Final = 0.5


def write(report: Mapping[str, Any], page: Path = PAGE) -> None:
    """Write the section between its markers."""
    write_section("quantised", section(report), page)


def section(report: Mapping[str, Any]) -> str:
    """The section's Markdown."""
    machine = report["machine"]
    lines = [verdict(name, found) for name, found in report["encoders"].items()]
    rows = [row for name, found in report["encoders"].items() for row in _rows(name, found)]
    head = (
        "encoder",
        "method",
        "served weights",
        "batch 1, ms",
        "times faster",
        "batch 8, ms",
        "times faster",
        "features differ by",
        "accuracy lost",
        "AUROC lost: near",
        "far",
        "domain",
    )
    worlds = [row for name, found in report["encoders"].items() for row in _worlds(name, found)]
    names = next(iter(report["encoders"].values()))["test_samples"]
    about_worlds = (
        "Accuracy in percent by world, and in brackets with the class statistics of the "
        "unquantised encoder:"
    )
    about_times = (
        f"{machine['cpu']}, {machine['cores']} cores, one thread, onnxruntime "
        f"{report['versions']['onnxruntime']}; the machine had other work, times are minima of "
        "runs in turns."
    )
    by_world = table(("encoder", "method", *(f"{n} (n = {k:,})" for n, k in names.items())), worlds)
    return "\n\n".join(("\n".join(lines), table(head, rows), about_worlds, by_world, about_times))


def write_adapters(report: Mapping[str, Any], page: Path = PAGE) -> None:
    """Write the section on adapters, from the report of `quantised_adapters`."""
    write_section(ADAPTERS, adapters(report), page)


def adapters(report: Mapping[str, Any]) -> str:
    """That section's Markdown."""
    forms, states = ("float32", "int8"), ("without", "with")
    rows = [
        (str(row["task"]), *(f"{row[form][state]:.1f}" for form in forms for state in states))
        for row in report["tasks"]
    ]
    means = [
        sum(row[form][state] for row in report["tasks"]) / len(report["tasks"])
        for form in forms
        for state in states
    ]
    rows.append(("mean", *(f"{value:.1f}" for value in means)))
    columns = (f"{form}, {state} adapter" for form in forms for state in states)
    about = (
        f"{report['encoder']['name']}, {report['tasks'][0]['test_samples']} test samples a task."
    )
    return f"{about}\n\n{table(('task', *columns), rows)}"


def verdict(name: str, found: Mapping[str, Any]) -> str:
    """The bars for an encoder's own method: met, or missed by how much."""
    method, own = next(iter(found["methods"].items()))
    faster = own["times_faster"]["1"]
    lost = _mean_lost(found["accuracy"], own["accuracy"])
    groups = _groups_lost(found, own)
    worst = max(groups, key=lambda group: groups[group])
    return (
        f"- **{name}**, `{method}`: at least {_FASTER} times faster at batch 1: "
        f"{_told(faster >= _FASTER)} with {faster:.2f}. At most {_LOST} points of accuracy lost, "
        f"mean over worlds: {_told(lost <= _LOST)} with {lost:+.2f}. At most {_LOST} of AUROC lost "
        f"in every group: {_told(groups[worst] <= _LOST)}, most in {worst} with "
        f"{groups[worst]:+.2f}. A sample's features in a batch are those alone, bit for bit: "
        f"{_told(own['bit_equal_in_a_batch'])}."
    )


def _rows(name: str, found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    times = found["times_ms"]
    served = f"{found['served_bytes'] / 1e6:.1f} MB"
    rows: list[tuple[str, ...]] = [
        (name, "float32", served, f"{times['1']:.2f}", "1", f"{times['8']:.2f}", "1", *["–"] * 5)
    ]
    for method, own in found["methods"].items():
        lost = (
            _mean_lost(found["accuracy"], own["accuracy"]),
            *_groups_lost(found, own).values(),
        )
        rows.append(
            (
                name,
                method,
                f"{own['served_bytes'] / 1e6:.1f} MB",
                f"{own['times_ms']['1']:.2f}",
                f"{own['times_faster']['1']:.2f}",
                f"{own['times_ms']['8']:.2f}",
                f"{own['times_faster']['8']:.2f}",
                f"{100 * own['difference']:.1f} %",
                *(f"{value:+.2f}" for value in lost),
            )
        )
    return rows


def _worlds(name: str, found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (name, "float32", *(f"{value:.1f}" for value in found["accuracy"].values()))
    ]
    for method, own in found["methods"].items():
        stale = own["accuracy_with_the_originals_statistics"]
        cells = (f"{value:.1f} ({stale[world]:.1f})" for world, value in own["accuracy"].items())
        rows.append((name, method, *cells))
    return rows


def _mean_lost(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return sum(before[key] - after[key] for key in before) / len(before)


def _groups_lost(found: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, value in found["auroc"].items():
        groups.setdefault(key.split(" / ")[0], []).append(value - own["auroc"][key])
    return {group: sum(lost) / len(lost) for group, lost in groups.items()}


def _told(met: bool) -> str:
    return "met" if met else "missed"
