"""The page on quantised encoders is what its benchmark wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quantised_page import PAGE, section
from exporter.package import default_encoder_package

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "quantised.json"


def report() -> Any:
    return json.loads(RESULTS.read_text("utf-8"))


def test_the_page_is_that_of_the_report() -> None:
    assert section(report()) in PAGE.read_text("utf-8")


def test_the_default_encoder_measured_is_the_one_that_ships() -> None:
    assert report()["encoders"]["default"]["digest"] == default_encoder_package().digest
