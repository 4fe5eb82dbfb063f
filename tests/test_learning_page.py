"""The page on learning says what the suite's runs gave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "benchmarks" / "learning.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text("utf-8"))
TITLES = {
    "cifar100": "CIFAR-100",
    "grocery": "Grocery",
    "pacs": "PACS",
    "fsdd": "Spoken digits",
    "cwru": "Bearings",
}


def last(suite: str, strategy: str) -> float:
    return float(np.mean([run["last"] for run in RESULTS["suite"][suite][strategy].values()]))


@pytest.mark.parametrize("suite", RESULTS["suite"])
def test_the_lead_of_the_default_is_what_the_runs_gave(suite: str) -> None:
    name, _, shots = suite.partition("-")
    others = {s: last(suite, s) for s in RESULTS["suite"][suite] if s not in {"driftkeel", "joint"}}
    best = max(others, key=lambda other: others[other])
    ours = last(suite, "driftkeel")
    share = 100 * ours / last(suite, "joint")
    row = (
        f"| {TITLES[name]}{', 10 shots' if shots else ''} | `{best}` {others[best]:.1f} "
        f"| **{ours:.1f}** | {ours - others[best]:+.1f} | {share:.0f} % |"
    )
    assert row in PAGE


def test_the_streams_beside_the_suite_are_quoted_as_measured() -> None:
    fifty, noisy, shipped = RESULTS["other_streams"].values()
    assert f"and {fifty['driftkeel']['passes_per_sample']:.2f} (50 tasks" in PAGE
    assert f"to {noisy['driftkeel']['last']:.1f}, seed 0" in PAGE
    assert f"to {shipped['frozen']['last']:.1f} % with `frozen`" in PAGE
