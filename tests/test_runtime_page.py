"""The runtime's page says what its benchmark wrote."""

import json
import shutil
from pathlib import Path

from benchmarks import prefix_base, runtime_page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "runtime.md"
REPORT = ROOT / "benchmarks" / "results" / "runtime.json"


def test_the_page_is_written_from_the_report(tmp_path: Path) -> None:
    again = tmp_path / "runtime.md"
    shutil.copy(PAGE, again)
    runtime_page.write(json.loads(REPORT.read_text("utf-8")), again, tmp_path / "runtime")
    assert again.read_text("utf-8") == PAGE.read_text("utf-8")


def test_every_part_was_measured() -> None:
    report = json.loads(REPORT.read_text("utf-8"))
    assert {"path", "rivals", "forms", "daemon", "soak"} <= set(report)
    assert len(report["soak"]["resident_mb"]) == 50


def test_the_decision_on_base_features_quotes_its_results() -> None:
    report = json.loads((REPORT.parent / "prefix_base.json").read_text("utf-8"))
    assert prefix_base.section(report) in prefix_base.PAGE.read_text("utf-8")
