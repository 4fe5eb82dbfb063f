"""The page on exports quotes what its benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "exporting.md"
FORMS = ("bare", "nothing fed", "fed", "fed, checked once", "attached", "folded")
METHODS = ("average", "statistics", "fisher", "arithmetic", "ties", "dare", "side-by-side")


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))


def single_rows() -> list[str]:
    rows = []
    for family, found in _results("exports-96.json")["families"].items():
        times = found["batch_1_ms"]
        cells = (f"{times[form]:.3f}" if form in times else "–" for form in FORMS)
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return rows


def switch_rows() -> list[str]:
    rows = []
    for family, found in _results("exports-96.json")["families"].items():
        switch, mixed = found["switch_ms"], found["mixed"]
        fold = switch.get("fold and rebuild")
        cells = (
            f"{switch['check tensors']:.2f}",
            f"{switch['attach a file']:.2f}",
            "–" if fold is None else f"{fold:.0f}",
            f"{mixed['one adapter_ms']:.1f}",
            f"{mixed['bank_ms']:.1f} ({mixed['suffix_ratio']:.2f} ×)",
            f"{mixed['whole_ratio']:.2f} ×",
            f"{mixed['row by row_ms']:.1f}",
        )
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return rows


def merging_rows() -> list[str]:
    families = _results("merging.json")["families"]
    names = ("no adapter", "all installed", "no adapter, the merge's statistics", *METHODS)
    return [
        f"| {name} | "
        + " | ".join(f"{100 * found[name]:.1f}" for found in families.values())
        + " |"
        for name in names
    ]


def test_the_pages_times_are_those_of_the_results() -> None:
    page = PAGE.read_text("utf-8")
    for row in (*single_rows(), *switch_rows()):
        assert row in page


def test_the_pages_merges_are_those_of_the_results() -> None:
    page = PAGE.read_text("utf-8")
    for row in merging_rows():
        assert row in page
