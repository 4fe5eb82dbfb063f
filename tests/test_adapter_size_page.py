"""The page on sizes quotes what its two benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "adapter_size.md"


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))


def codec_rows() -> list[str]:
    rows = []
    for stream, found in _results("adapter_size.json")["streams"].items():
        for row in found["rows"][1:]:
            lost = " | ".join(
                f"{row[f'{how}_points_lost']:.2f} ± {row[f'{how}_spread']:.2f}"
                for how in ("alone", "decided", "of_all")
            )
            rows.append(f"| {stream} | {row['form']} | {row['bytes']:,} | {lost} |")
    return rows


def statistics_rows() -> list[str]:
    lost: dict[tuple[str, str], dict[tuple[str, int | None], float]] = {}
    for row in _results("statistics_size.json")["rows"]:
        if row["dim"] == 576:
            key = row["features"], row["split"]
            lost.setdefault(key, {})[row["form"], row["shots"]] = row["points_lost"]
    forms = ("compact, default", "compact, 43 B a dimension", "compact, 48 B a dimension")
    return [
        f"| {name} by {split} | "
        + " | ".join(f"{found[form, None]:.2f} / {found[form, 10]:.2f}" for form in forms)
        + " |"
        for (name, split), found in sorted(lost.items())
    ]


def test_the_pages_tables_are_those_of_the_results() -> None:
    page = PAGE.read_text("utf-8")
    for row in (*codec_rows(), *statistics_rows()):
        assert row in page
