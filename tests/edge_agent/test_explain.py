"""Why an alarm fired is read back from the state, also while an agent holds it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from adapter_store.errors import StoreError
from adapter_store.explanation import MAX_POINTS
from adapter_store.ood_cli import ood
from adapter_store.state import StateReader
from edge_agent.episode import Policy, open_episode
from edge_agent.errors import AgentError
from edge_agent.explain import _thinned, explain
from ood.alarm import Alarm


@pytest.fixture
def alarmed(agent, install, make_images):
    """An agent whose input shifted from stripes it knows to stripes it does not."""
    install()
    heard: list[tuple[Alarm, int]] = []
    agent.on_alarm(lambda alarm, seq: heard.append((alarm, seq)))
    known, _ = make_images((0, 1, 2), 12, seed=5)
    foreign, _ = make_images((4, 5), 40, seed=6)
    agent.predict(known)
    agent.predict(foreign)
    (alarm, seq) = heard[0]
    episode = open_episode(
        1,
        now=1.0,
        alarm_seq=seq,
        onset_seq=seq - (alarm.at - alarm.onset),
        generation=agent.serving.number,
        pinned=False,
        policy=Policy(),
    )
    agent.state.episodes.save(episode.to_dict())
    return agent


@pytest.fixture
def config_file(alarmed, tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    state = json.dumps(alarmed.config.agent.state_dir)
    encoder = json.dumps(str(alarmed.package.path))
    path.write_text(
        f'[agent]\ndevice = "device-a"\nstate_dir = {state}\nencoder = {encoder}\n'
        "[alarm]\nfalse_alarm_every = 10000\n",
        encoding="utf-8",
    )
    return path


def test_the_replayed_evidence_reaches_the_alarm_at_the_alarms_sample(alarmed) -> None:
    found = explain(alarmed.state, 1, parts=alarmed.package.manifest.feature_parts)
    assert found.seqs[-1] == found.alarm_seq
    assert found.evidence[-1] >= found.alarm_at
    assert max(found.evidence[:-1]) < found.alarm_at
    assert sum(found.known) == pytest.approx(1.0)
    assert sum(found.shifted) == pytest.approx(1.0)
    assert all(alarmed.state.journal.get(name).seq >= found.onset_seq for name in found.examples)
    assert found.nearest[0][0].startswith("stripes-")


@pytest.mark.parametrize("count", [0, 1, 2, MAX_POINTS, MAX_POINTS + 1, 5000])
def test_a_long_stretch_is_thinned_to_its_peaks_and_its_last_sample(count: int) -> None:
    levels = np.random.default_rng(count).random(count).tolist()
    places = _thinned(levels)
    assert places == sorted(set(places))
    assert len(places) == min(count, MAX_POINTS)
    if count:
        assert places[-1] == count - 1
        assert max(levels[k] for k in places) == max(levels)


def test_an_episode_that_is_not_there_is_named(alarmed) -> None:
    with pytest.raises(AgentError, match="no episode 7; it has 1"):
        explain(alarmed.state, 7, parts=())


def test_the_command_reads_the_state_that_a_running_agent_holds(config_file: Path) -> None:
    said = CliRunner().invoke(ood, ["explain", "1", "--config", str(config_file)])
    assert said.exit_code == 0, said.output
    assert "The alarm fired at sample" in said.output
    assert "#" in said.output
    said = CliRunner().invoke(ood, ["explain", "1", "--config", str(config_file), "--json"])
    assert json.loads(said.output)["episode"] == 1


@pytest.mark.parametrize("name", ["why.png", "why.svg"])
def test_a_picture_is_drawn(config_file: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / name
    command = ["explain", "1", "--config", str(config_file), "--plot", str(out)]
    said = CliRunner().invoke(ood, command)
    assert said.exit_code == 0, said.output
    assert out.stat().st_size > 1000


def test_without_matplotlib_the_words_come_and_the_picture_is_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imported(name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    command = ["explain", "1", "--config", str(config_file), "--plot", str(tmp_path / "x.png")]
    said = CliRunner().invoke(ood, command)
    assert said.exit_code == 1
    assert "driftkeel[demo]" in said.output
    assert "The alarm fired" in said.output


def test_a_directory_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no agent's state directory"):
        StateReader(tmp_path)


def test_many_refused_frames_are_a_sensor_fault_until_one_is_a_picture(
    agent, install, make_images
) -> None:
    install()
    for _ in range(16):
        agent.refusals.note("the array has 3 values that are NaN")
    assert "sensor fault: 16 frames" in agent.status()["sensor_problem"]
    assert agent.status()["counters"]["refused"] == 16
    agent.predict(make_images((0,), 1)[0])
    assert agent.status()["sensor_problem"] == ""


def test_every_answered_frame_is_noted(agent, install, make_images) -> None:
    install()
    agent.predict(np.zeros((2, 32, 32, 3), np.uint8))
    assert len(agent.state.journal.frames()) == 2
