"""The decision on many adapters says what its benchmark wrote."""

import json
from pathlib import Path

from ood.shortlist import CANDIDATES, DIRECTIONS

ROOT = Path(__file__).parents[1]


def test_the_decision_quotes_the_results() -> None:
    report = json.loads((ROOT / "benchmarks/results/many_classes.json").read_text("utf-8"))
    page = " ".join((ROOT / "docs/decisions/0004-many-adapters.md").read_text("utf-8").split())
    (chosen,) = (
        found
        for found in report["left_out"]
        if (found["directions"], found["candidates"]) == (DIRECTIONS, CANDIDATES)
    )
    assert chosen["nearest_missed"] == 0
    assert chosen["most_lost"] < 2e-5
    assert f"the {CANDIDATES} that are nearest in the {DIRECTIONS} leading" in page
    ten, thousand, most = (
        round(report["costs"][f"{count} components"]["minimum_ms"], 1) for count in (10, 1000, 5000)
    )
    assert f"{ten} ms at 10 components, {thousand} at 1,000, {most} at 5,000" in page
