"""The page on shift says what its benchmarks of scores and of the alarm wrote."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import alarm_page, kinds, ood_page
from benchmarks.pages import PAGE
from ood.kinds import _BIAS, _BIAS_BLIND, _WEIGHTS, _WEIGHTS_BLIND

RESULTS = Path(ood_page.__file__).parent / "results"


def test_the_section_on_scores_is_made_from_the_results() -> None:
    report = json.loads((RESULTS / "ood.json").read_text("utf-8"))
    assert ood_page.section(report) in PAGE.read_text("utf-8")


def test_the_section_on_the_alarm_is_made_from_the_results() -> None:
    report = json.loads((RESULTS / "alarm.json").read_text("utf-8"))
    assert alarm_page.section(report).strip() in PAGE.read_text("utf-8")


def test_the_section_on_kinds_is_made_from_the_results() -> None:
    names = ("kinds", "kind_weights")
    report, weights = (json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in names)
    assert kinds.page(report, weights).strip() in PAGE.read_text("utf-8")


def test_the_weights_of_kinds_are_those_that_were_fitted() -> None:
    report = json.loads((RESULTS / "kind_weights.json").read_text("utf-8"))
    for key, weights, bias in (
        ("with_frames", _WEIGHTS, _BIAS),
        ("blind", _WEIGHTS_BLIND, _BIAS_BLIND),
    ):
        fitted = {name: tuple(values) for name, values in report[key]["weights"].items()}
        assert (fitted, report[key]["bias"]) == (weights, bias)


def test_the_worst_pair_and_the_group_means_come_from_the_values() -> None:
    from benchmarks.ood import summary  # noqa: PLC0415 - only this test needs it

    keys = [
        (group, "world", name)
        for group in ("near", "far", "domain", "corruption")
        for name in ("one", "two")
    ]
    metrics = {"aupr": 0.5, "fpr95": 0.5}
    values = {
        "default": {key: {"auroc": 0.9 if key[2] == "one" else 0.6, **metrics} for key in keys},
        "pytorch-ood A": {key: {"auroc": 0.7, **metrics} for key in keys},
        "pytorch-ood B": {key: {"auroc": 0.5, **metrics} for key in keys},
        "pytorch-ood partial": {keys[0]: {"auroc": 1.0, **metrics}},
    }
    bar = summary(values)["bars"]["near"]
    assert bar["best_rival"] == "pytorch-ood A"
    assert round(bar["default"], 6) == 0.75
    assert bar["worst_pair"] == "world / two"
    assert round(bar["worst_gap"], 6) == -0.1
    assert bar["pairs_more_than_half_a_point_below"] == 1
