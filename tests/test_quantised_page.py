"""The page on quantised encoders is what its benchmark wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quantised_page import PAGE, adapters, section
from exporter.package import default_encoder_package

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def report(name: str = "quantised") -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def test_the_page_is_that_of_the_reports() -> None:
    page = PAGE.read_text("utf-8")
    assert section(report()) in page
    assert adapters(report("quantised_adapters")) in page


def test_what_the_other_limit_gave_is_that_of_its_report() -> None:
    found = report("quantised-three-percent")["encoders"]["mobilenet"]
    own = found["methods"]["int8-static"]
    lost = [value - own["accuracy"][world] for world, value in found["accuracy"].items()]
    told = f"{own['times_faster']['1']:.2f} times faster at batch 1 with {sum(lost) / 4:.2f} points"
    assert told in PAGE.read_text("utf-8").replace("\n", " ")


def test_the_default_encoder_measured_is_the_one_that_ships() -> None:
    assert report()["encoders"]["default"]["digest"] == default_encoder_package().digest
