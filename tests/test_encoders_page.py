"""The page on encoders quotes what `driftkeel families` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "encoders.md"


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def test_the_pages_families_are_those_of_the_results() -> None:
    page = PAGE.read_text("utf-8")
    for name, found in _results("families.json")["families"].items():
        quarter, sizes = found.get("accuracy_quarter_rank"), found["bytes"]
        numbers = (found["parameters"], sizes["fp32"], sizes["int8"], sizes["int1"])
        cells = (_percent(found["accuracy"]), _percent(quarter), *(f"{n:,}" for n in numbers))
        assert f"| `{name}` | {' | '.join(cells)} |" in page


def test_the_pages_learning_rates_are_those_of_the_results() -> None:
    page = PAGE.read_text("utf-8")
    for run in _results("families-sparse.json")["runs"]:
        families, rate = run["families"], run["settings"]["learning_rate"]
        assert f"encoder has {_percent(families['gaussian']['accuracy'])} %" in page
        for name in ("lora", "sparse"):
            shares = (families[name]["accuracy"], families[name]["accuracy_quarter_rank"])
            assert f"| {rate} | `{name}` | {' | '.join(map(_percent, shares))} |" in page
