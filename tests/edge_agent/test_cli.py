"""The command line: fitting, asking, refusing, and an orderly end."""

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from adapter_store.errors import ConfigError, StateLockedError
from edge_agent.agent import Agent
from edge_agent.cli import agent as command
from edge_agent.config import load_agent_config
from edge_agent.errors import AgentError

ROOT = Path(__file__).parents[2]
MAIN = "from adapter_store.cli import main; main()"


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(
        '[agent]\ndevice = "device-a"\nstate_dir = "state"\n\n[http]\nport = 0\n', encoding="utf-8"
    )
    return path


@pytest.fixture
def data(tmp_path: Path, make_images) -> Path:
    images, labels = make_images((0, 1, 2), 24, seed=50)
    np.savez(tmp_path / "stripes.npz", x=images, y=np.array(labels))
    return tmp_path / "stripes.npz"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


@contextmanager
def running(config_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A real agent process and its URL; it is waited for by reading what it logs."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "agent", "--config", str(config_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if " on http://" in line), "")
        assert line, "the agent ended before it listened"
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield process, line.rsplit(" on ", 1)[1].strip()
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def test_fit_makes_and_activates_the_first_generation(config_path: Path, data: Path) -> None:
    result = invoke("fit", "--config", config_path, "--data", data)
    assert result.exit_code == 0, result.output
    assert "generation 1: 3 classes" in result.output
    assert "held-out samples: shifts will be noticed late" in result.output
    opened = Agent.open(load_agent_config(config_path))
    try:
        assert opened.serving.labels == ("stripes-0", "stripes-1", "stripes-2")
    finally:
        opened.close()


def test_fit_refuses_to_replace_a_generation_but_adds_when_asked(
    config_path: Path, data: Path, tmp_path: Path, make_images
) -> None:
    invoke("fit", "--config", config_path, "--data", data)
    images, labels = make_images((4, 5), 12, seed=51)
    np.savez(tmp_path / "more.npz", x=images, y=np.array(labels))
    refused = invoke("fit", "--config", config_path, "--data", tmp_path / "more.npz")
    assert isinstance(refused.exception, AgentError)
    assert "--add" in str(refused.exception)
    added = invoke("fit", "--config", config_path, "--data", tmp_path / "more.npz", "--add")
    assert added.exit_code == 0, added.output
    opened = Agent.open(load_agent_config(config_path))
    try:
        assert (opened.serving.number, len(opened.serving.labels)) == (2, 5)
    finally:
        opened.close()


def test_a_config_with_a_typo_is_refused_by_name(config_path: Path, data: Path) -> None:
    config_path.write_text("[agent]\ndevise = 'a'\nstate_dir = 's'\n", encoding="utf-8")
    result = invoke("fit", "--config", config_path, "--data", data)
    assert isinstance(result.exception, ConfigError)
    assert "devise" in str(result.exception)


def test_without_a_config_the_usage_is_told() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "--config FILE" in result.output


def test_status_of_an_agent_that_does_not_run_says_so(config_path: Path) -> None:
    result = invoke("status", "--config", config_path)
    assert isinstance(result.exception, AgentError)
    assert "no agent answers" in str(result.exception)


def test_a_running_agent_answers_refuses_a_second_one_and_stops_on_sigterm(
    config_path: Path, data: Path
) -> None:
    invoke("fit", "--config", config_path, "--data", data)
    with running(config_path) as (process, url):
        with urllib.request.urlopen(f"{url}/healthz", timeout=30) as response:  # noqa: S310
            assert json.load(response) == {"ok": True, "generation": 1}
        told = invoke("status", "--config", config_path)
        assert "generation   1 (3 labels, 1 bundles" in told.output
        everything = invoke("status", "--config", config_path, "--json")
        assert json.loads(everything.output)["device"] == "device-a"
        cancelled = invoke("cancel-training", "--config", config_path)
        assert isinstance(cancelled.exception, AgentError)
        assert "no training is running" in str(cancelled.exception)
        second = invoke("--config", config_path)
        assert isinstance(second.exception, StateLockedError)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not (config_path.parent / "state" / "http.json").exists()


def test_an_agent_without_a_generation_runs_and_says_what_to_do(config_path: Path) -> None:
    with running(config_path) as (_, url):
        told = invoke("status", "--config", config_path)
        assert "none; run `driftkeel agent fit`" in told.output
        assert url.startswith("http://127.0.0.1:")
