"""Tuning a device: what it keeps, what rolls back, and that no answer changes."""

import logging
from collections.abc import Iterator
from functools import partial

import msgspec
import numpy as np
import pytest

from edge_agent import tune_device
from edge_agent.agent import Agent
from edge_agent.config import Config
from edge_agent.errors import NoGenerationError
from edge_agent.runtime_settings import Machine, Tuned
from edge_agent.tune_device import Tuning, described, keep, tune
from edge_agent.tuning import ALONE, Measured, measure
from exporter.errors import EncoderError
from exporter.providers import RuntimeSettings, running
from tests.exporter.stand_in import StandIn, stand_in

FAST = RuntimeSettings(threads=2, graph_optimisation="extended")


def clock() -> Iterator[float]:
    """Seconds that pass with every look."""
    now = 0.0
    while True:
        now += 0.001
        yield now


def tuned(agent: Agent, **how) -> Tuning:
    ticks = clock()
    return tune(agent, seconds=0.001, clock=lambda: next(ticks), **how)


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, few samples and one round, so that nothing takes long."""
    monkeypatch.setattr(tune_device, "cores", lambda: 2)
    monkeypatch.setattr(tune_device, "_SAMPLES", 8)
    monkeypatch.setattr(tune_device, "TOGETHER", 2)
    monkeypatch.setattr(tune_device, "measure", partial(measure, rounds=1))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, little: None) -> RuntimeSettings:
    """Measuring finds that two threads with another optimisation take half as long."""

    def measured(_, settings, **__):
        return [Measured(s, {ALONE: (2.0 if s == FAST else 4.0,)}) for s in settings]

    monkeypatch.setattr(tune_device, "measure", measured)
    return FAST


def test_every_way_is_measured_and_what_runs_is_known(agent, install) -> None:
    install()
    said: list[str] = []
    turns: list[tuple[int, int]] = []
    found = tuned(agent, say=said.append, tell=lambda *done: turns.append(done))
    assert len(found.measured) == 6
    assert all(each.runs_ms[1] and each.runs_ms[2] for each in found.measured)
    assert not any(each.refused for each in found.measured)
    assert found.running == found.default.settings == RuntimeSettings()
    assert said == ["comparing answers to 8 images of noise", "measuring 6 settings"]
    assert turns


def test_measuring_changes_nothing(agent, install, fast) -> None:
    number = install()
    assert tuned(agent).changes
    assert [g["number"] for g in agent.generations()] == [number]
    assert agent.sessions.settings == RuntimeSettings()


def test_answers_are_compared_on_the_devices_own_samples(agent, install, fast, make_images) -> None:
    install()
    agent.predict(make_images((0, 1), 5, seed=1)[0])
    found = tuned(agent)
    assert (found.samples, found.own_samples) == (8, True)


def test_what_was_found_becomes_a_generation_of_the_same_bundles(
    agent, install, fast, make_bundle, make_images
) -> None:
    number = install(make_bundle((0, 1, 2)), make_bundle((3, 4), adapter=1))
    images, _ = make_images((0, 1, 2, 3, 4), 4, seed=2)
    before = [(a.label, a.adapter) for a in agent.predict(images, probe=True)]
    made = keep(agent, tuned(agent), now=5.0)
    old = agent.state.generations.get(number)
    assert made.manifest.parent == number
    assert made.manifest.bundles == old.manifest.bundles
    assert made.manifest.calibration == old.manifest.calibration
    assert made.manifest.prepared == old.manifest.prepared
    assert made.manifest.reason == "tuned: cpu, 2 threads, optimisation extended"
    kept = msgspec.convert(made.manifest.runtime, Tuned)
    assert (kept.settings, kept.median_ms, kept.default_ms) == (FAST, 2.0, 4.0)
    assert agent.serving.number == made.number
    assert agent.sessions.settings == FAST
    after = agent.predict(images, probe=True)
    assert [(a.label, a.adapter) for a in after] == before
    assert {a.generation for a in after} == {made.number}


def test_rolling_back_brings_the_earlier_settings_back(agent, install, fast) -> None:
    number = install()
    made = keep(agent, tuned(agent), now=5.0)
    agent.activate(number)
    assert agent.sessions.settings == RuntimeSettings()
    assert agent.status()["runtime"]["source"] == "defaults"
    agent.activate(made.number)
    assert agent.sessions.settings == FAST


def test_generations_made_later_keep_the_settings_and_share_the_sessions(
    agent, install, fast, make_bundle
) -> None:
    install()
    made = keep(agent, tuned(agent), now=5.0)
    sessions = agent.sessions
    later = install(make_bundle((0, 1, 2)), make_bundle((3, 4)))
    assert agent.state.generations.get(later).manifest.runtime == made.manifest.runtime
    assert agent.sessions is sessions


def test_the_settings_survive_a_restart(agent, install, fast, config: Config) -> None:
    install()
    keep(agent, tuned(agent), now=5.0)
    agent.close()
    again = Agent.open(config)
    try:
        assert again.sessions.settings == FAST
        assert again.status()["runtime"] == {
            "provider": "cpu",
            "threads": 2,
            "graph_optimisation": "extended",
            "source": "tuning",
            "problem": "",
            "graphs": again.sessions.running(),
        }
    finally:
        again.close()


def test_on_another_machine_the_defaults_run_and_status_and_log_say_why(
    agent, install, fast, monkeypatch, caplog
) -> None:
    install()
    keep(agent, tuned(agent), now=5.0)
    agent.close()
    other = Machine(cpu="another", cores=1, architecture="x", onnxruntime="0")
    monkeypatch.setattr("edge_agent.runtime_settings.this_machine", lambda: other)
    with caplog.at_level(logging.WARNING):
        again = Agent.open(agent.config)
    try:
        assert again.sessions.settings == RuntimeSettings()
        assert "run `driftkeel tune` again" in again.status()["runtime"]["problem"]
    finally:
        again.close()
    assert "run `driftkeel tune` again" in caplog.text


def test_an_alignment_stays_with_the_tuned_generation(agent, install, fast, calibration) -> None:
    number = install()
    store = agent.state.generations
    old = store.get(number)
    arrays = {"an array": np.ones((2, 2), np.float32)}
    aligned = store.create(old.manifest, old.calibration_features(), arrays)
    made = tune_device.installer.with_runtime(agent.state, aligned, {}, reason="tuned", now=1.0)
    assert made.manifest.aligned
    assert np.array_equal(made.alignment()["an array"], arrays["an array"])


def test_without_a_generation_it_says_what_to_do_first(agent) -> None:
    with pytest.raises(NoGenerationError, match="agent fit"):
        tuned(agent)


def test_a_provider_that_answers_like_the_cpu_is_a_candidate(agent, install, monkeypatch) -> None:
    install()
    stand_in(monkeypatch)
    found = tuned(agent)
    threads = [m.settings.threads for m in found.measured if "openvino" in m.settings.providers]
    assert threads == [1, 2]
    assert not any(each.refused for each in found.measured)


class Unsure(StandIn):
    """Answers as the CPU does but to many samples at once."""

    def run(self, *arguments, **more):
        (rows,) = super().run(*arguments, **more)
        off = running(self) == "openvino" and len(rows) > 4
        return [np.roll(rows, 1, axis=0) if off else rows]


def test_what_answers_otherwise_is_refused_by_name_and_never_chosen(
    agent, install, monkeypatch
) -> None:
    install()
    stand_in(monkeypatch, Unsure)
    found = tuned(agent)
    refused = {each.settings: each.refused for each in found.measured if each.refused}
    assert {settings.providers for settings in refused} == {("openvino",)}
    assert all("features differ by" in reason for reason in refused.values())
    assert found.chosen.settings.providers == ("cpu",)


class Absent(StandIn):
    def run(self, *arguments, **more):
        if running(self) == "openvino":
            raise RuntimeError("the device is gone")
        return super().run(*arguments, **more)


def test_a_provider_that_does_not_run_is_named_and_where_nothing_is_left_it_is_an_error(
    agent, install, monkeypatch
) -> None:
    install()
    stand_in(monkeypatch, Absent)
    found = tuned(agent)
    assert {each.refused for each in found.measured if each.refused} == {
        "openvino does not run prefix"
    }
    section = msgspec.structs.replace(agent.config.agent, providers=("openvino",))
    agent.config = msgspec.structs.replace(agent.config, agent=section)
    with pytest.raises(EncoderError, match="openvino does not run prefix"):
        tuned(agent)


def test_settings_read_as_words() -> None:
    assert described(RuntimeSettings()) == "cpu, 1 thread, optimisation all"
