"""`driftkeel bench` from the outside: files, messages and exit status."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_agent.bench import cli
from edge_agent.bench.cli import MEASURES, bench
from edge_agent.bench.suite import STRATEGIES, SUITES, set_file, suite_encoder
from edge_agent.errors import BenchmarkError


def call(*words: object) -> Result:
    return CliRunner().invoke(bench, [str(word) for word in words])


def test_cil_writes_exactly_the_documented_json(
    striped_file: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "result.json"
    done = call(
        *("cil", "--data", striped_file, "--cache", cache, "--init", 2, "--increment", 2),
        *("--strategies", "frozen", "--out", out, "--json"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found) == {"strategies", "settings", "versions"}
    assert set(found["strategies"]["frozen"]) == set(MEASURES)
    assert json.loads(done.stdout) == found


def test_a_domain_key_makes_a_domain_stream_and_results_are_kept(
    striped_file: Path, cache: Path, tmp_path: Path
) -> None:
    words = ("cil", "--data", striped_file, "--cache", cache, "--domain-key", "domain")
    words += ("--strategies", "frozen", "--runs", tmp_path)
    done = call(*words)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / striped_file.name / "frozen-0.json").read_text("utf-8"))
    assert {task["name"] for task in kept["settings"]["tasks"]} == {"dawn", "noon", "dusk"}
    assert "frozen" in done.stdout
    assert "measured before" in call(*words).stderr


def test_a_strategy_that_fails_is_told_and_is_exit_status_1(
    striped_file: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    done = call(
        *("cil", "--data", striped_file, "--cache", cache, "--init", 2, "--increment", 2),
        *("--strategies", "frozen", "--family", "nonesuch", "--out", out),
    )
    assert done.exit_code == 1
    assert "frozen failed" in done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert "nonesuch" in found["failed"]["frozen"]
    assert found["strategies"] == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--strategies", "frozen,best"], "'best' is none of"),
        (["--strategies", ","], "name at least one"),
    ],
)
def test_a_wrong_strategy_is_refused_with_the_right_ones(words: list[str], told: str) -> None:
    done = call("cil", "--data", "x.npz", *words)
    assert done.exit_code == 2
    assert told in done.output


def test_without_sizes_a_set_is_cut_into_about_ten_tasks() -> None:
    options = dict.fromkeys(("stream", "domain_key", "domain_order", "shots", "increment"))
    numbers = {"order_seed": 1, "imbalance": 1.0, "blurry": 0.0, "revisit": 0.0, "label_noise": 0.0}
    settings = cli._stream({**options, **numbers, "init": 0, "seed": 0}, 81)
    assert (settings.init, settings.increment) == (9, 9)


def test_the_published_suite_is_what_the_documentation_says() -> None:
    assert len(SUITES) == 10
    assert SUITES["cifar100"].settings(0).order_seed == 1993
    assert SUITES["cifar100"].settings(2).order_seed == 1995
    assert SUITES["pacs"].stream.domain_order == ("photo", "art_painting", "cartoon", "sketch")
    assert SUITES["grocery-10shot"].settings(1).shots == 10
    assert {"frozen", "joint", "driftkeel"} <= set(STRATEGIES)


def test_sets_and_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"cifar100-small\.npz is neither in"):
        set_file(SUITES["cifar100"], tmp_path)
    with pytest.raises(BenchmarkError, match=r"vit_tiny_patch16_224\.safetensors is missing"):
        suite_encoder(tmp_path, tmp_path)


def test_seeds_are_numbers(tmp_path: Path) -> None:
    done = call("suite", "--data", tmp_path, "--out", tmp_path, "--seeds", "0,x")
    assert done.exit_code == 2
    assert "whole numbers" in done.output
