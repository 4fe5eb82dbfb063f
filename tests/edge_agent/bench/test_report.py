"""The page is written from results alone, between its markers."""

import json
from pathlib import Path
from typing import Any

import pytest

from edge_agent.bench import report
from edge_agent.errors import BenchmarkError


def result(folder: Path, suite: str, strategy: str, seed: int, **changed: Any) -> None:
    found = {
        "suite": suite,
        "strategy": strategy,
        "seed": seed,
        "last": 40.0 + seed,
        "average": 50.0,
        "forgetting": 3.0,
        "task_spread": 5.0,
        "train_s": 12.0,
        "eval_ms_per_sample": 3.25,
        "passes_per_sample": 1.5,
        "bytes_per_task": 54321,
        "peak_memory_mb": 250.0,
        "seen": [60.0, 40.0 + seed],
        "settings": {"encoder": {"name": "tiny", "digest": "0" * 64}},
        "versions": {"numpy": "2.0"},
        "machine": {"cpu": "a processor", "cores": 2},
        **changed,
    }
    (folder / suite).mkdir(parents=True, exist_ok=True)
    (folder / suite / f"{strategy}-{seed}.json").write_text(json.dumps(found), encoding="utf-8")


def test_tables_and_plots_replace_what_is_between_the_markers(tmp_path: Path) -> None:
    for seed in (0, 2):
        result(tmp_path / "out", "cifar100", "frozen", seed)
    nothing = {"average": None, "forgetting": None, "seen": [None, 44.0]}
    result(tmp_path / "out", "cifar100", "joint", 0, **nothing)
    page = tmp_path / "learning.md"
    page.write_text(f"# Before\n{report.BEGIN}\nold\n{report.END}\nAfter\n", encoding="utf-8")
    report.write(tmp_path / "out", page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Before\n")
    assert text.endswith("After\n")
    assert "old" not in text
    assert "| `frozen` | 41.0 ± 1.41 | 50.0 ± 0.00 |" in text
    assert "| `joint` | 40.0 | – | – |" in text
    assert "seeds 0, 2" in text
    assert "a processor, 2 cores" in text
    assert "](learning/cifar100.svg)" in text
    assert (tmp_path / "learning" / "cifar100.svg").read_bytes().startswith(b"<?xml")
    report.write(tmp_path / "out", page)
    assert page.read_text(encoding="utf-8") == text


def test_without_results_or_markers_nothing_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(BenchmarkError, match="holds no results"):
        report.write(tmp_path, page)
    result(tmp_path / "out", "own-set", "frozen", 0)
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="add both lines"):
        report.write(tmp_path / "out", page)
    (tmp_path / "out" / "own-set" / "frozen-1.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="no result of the benchmark"):
        report.read(tmp_path / "out")
