"""``driftkeel tune``: what it prints, what it leaves, and that it waits for no running agent."""

import json
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapter_store.errors import StateLockedError
from edge_agent import tune_device
from edge_agent.agent import Agent
from edge_agent.config import load_agent_config
from edge_agent.tune_cli import row, told, tune
from edge_agent.tune_device import Tuning
from edge_agent.tuning import ALONE, Measured, measure
from exporter.providers import RuntimeSettings

FAST = RuntimeSettings(threads=2)


@pytest.fixture
def config_path(tmp_path: Path, agent: Agent, install) -> Path:
    """A device with one generation, stopped."""
    install()
    agent.close()
    path = tmp_path / "agent.toml"
    path.write_text('[agent]\ndevice = "device-a"\nstate_dir = "state"\n', encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, few samples and one round, so that nothing takes long."""
    monkeypatch.setattr(tune_device, "cores", lambda: 2)
    monkeypatch.setattr(tune_device, "_SAMPLES", 8)
    monkeypatch.setattr(tune_device, "candidates", lambda *_: [RuntimeSettings(), FAST])
    monkeypatch.setattr(tune_device, "measure", partial(measure, rounds=1))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, little: None) -> None:
    def measured(_, settings, **__):
        return [Measured(s, {ALONE: (2.0 if s == FAST else 4.0,)}) for s in settings]

    monkeypatch.setattr(tune_device, "measure", measured)


def invoke(path: Path, *more: str) -> Result:
    return CliRunner().invoke(tune, ["--config", str(path), "--seconds", "1", *more])


def numbers(path: Path) -> tuple[list[int], int]:
    opened = Agent.open(load_agent_config(path))
    try:
        return [g["number"] for g in opened.generations()], opened.serving.number
    finally:
        opened.close()


def test_it_measures_for_real_and_prints_a_table(config_path: Path) -> None:
    result = invoke(config_path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "chosen" in result.output
    assert "decisions on 8 images of noise" in " ".join(result.output.split())
    assert numbers(config_path) == ([1], 1)


def test_what_is_faster_is_kept_and_runs_after_the_next_start(config_path: Path, fast) -> None:
    result = invoke(config_path)
    assert result.exit_code == 0, result.output
    said = "generation 2: cpu, 2 threads, optimisation all, 2.00 times as fast as the defaults"
    assert said in result.output
    assert numbers(config_path) == ([1, 2], 2)


def test_a_second_tuning_that_finds_the_same_changes_nothing(config_path: Path, fast) -> None:
    invoke(config_path)
    result = invoke(config_path)
    assert "that is what runs now; nothing was changed" in result.output
    assert numbers(config_path) == ([1, 2], 2)


def test_a_dry_run_changes_nothing_and_says_what_is_faster(config_path: Path, fast) -> None:
    result = invoke(config_path, "--dry-run")
    assert "2 threads" in result.output
    assert "nothing was changed (--dry-run)" in result.output
    assert numbers(config_path) == ([1], 1)


def test_as_json_everything_is_said(config_path: Path, fast) -> None:
    result = invoke(config_path, "--json")
    found = json.loads(result.stdout)
    assert found["generation"] == 2
    assert found["chosen"] == {"providers": ["cpu"], "threads": 2, "graph_optimisation": "all"}
    assert found["changes"] is True
    assert len(found["measured"]) == 2
    assert found["measured"][0]["batches"]["1"] == {"median_ms": 4.0, "fastest_ms": 4.0, "runs": 1}


def test_a_running_agent_has_to_be_stopped_first(config_path: Path) -> None:
    running = Agent.open(load_agent_config(config_path))
    try:
        result = invoke(config_path)
    finally:
        running.close()
    assert isinstance(result.exception, StateLockedError)
    assert "stop it first" in str(result.exception)


def test_a_refused_candidate_is_shown_with_its_reason() -> None:
    able = Measured(RuntimeSettings(), {1: (1.0,), 8: (8.0,)})
    refused = Measured(FAST, refused="decisions are others")
    tuning = Tuning(
        measured=(able, refused),
        chosen=able,
        default=able,
        running=RuntimeSettings(),
        machine=tune_device.this_machine(),
        samples=1,
        own_samples=True,
    )
    assert row(refused, tuning)[-1] == "refused: decisions are others"
    assert row(able, tuning) == (
        "cpu",
        "1",
        "all",
        "1.00",
        "1.00",
        "8.00",
        "8.00",
        "chosen, runs now",
    )
    assert told(tuning, None, dry_run=False).endswith("nothing was changed")
