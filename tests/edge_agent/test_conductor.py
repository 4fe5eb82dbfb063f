"""A device alone: labels arrive, a real trainer runs, the result is validated and installed."""

import queue
import sys
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from adapter_store.errors import DiskFullError
from edge_agent.agent import Agent
from edge_agent.conductor import Conductor
from edge_agent.config import Config, LearnerSection

WAIT_S = 120.0


@pytest.fixture
def config(config: Config) -> Config:
    learner = LearnerSection(min_labels=30, rank=4, epochs=2)
    return msgspec.structs.replace(config, learner=learner)


class Watch:
    """Waits for an episode to reach a stage, woken by every save."""

    def __init__(self, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
        self._saved: queue.Queue[dict] = queue.Queue()
        save = agent.state.episodes.save

        def noted(values: dict) -> None:
            save(values)
            self._saved.put(values)

        monkeypatch.setattr(agent.state.episodes, "save", noted)

    def until(self, *stages: str) -> dict:
        while True:
            values = self._saved.get(timeout=WAIT_S)
            if values["stage"] in stages:
                return values


@pytest.fixture
def watch(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(agent, monkeypatch)


@pytest.fixture
def shift(agent: Agent, make_images: Callable) -> Callable[[], None]:
    """Known classes first, then unknown ones, every one of which is labelled afterwards."""

    def run(*, label: bool = True) -> None:
        for start in range(0, 64, 8):
            agent.predict(make_images((0, 1, 2), 22, seed=5)[0][start : start + 8])
        images, labels = make_images((3, 4, 5), 16, seed=6)
        answers = [a for i in range(0, 48, 8) for a in agent.predict(images[i : i + 8])]
        for answer, truth in zip(answers, labels, strict=True):
            if label:
                agent.feedback(answer.sample_id, truth)

    return run


def test_a_shift_with_labels_is_learned_and_nothing_is_forgotten(  # noqa: PLR0917 (fixtures)
    agent, config, install, watch, shift, make_images
) -> None:
    install()
    conductor = Conductor(agent, config)
    conductor.start()
    try:
        shift()
        closed = watch.until("closed")
    finally:
        conductor.stop()
    stages = [moment["stage"] for moment in closed["history"]]
    assert stages[-4:] == ["training", "validating", "installed", "closed"]
    assert agent.serving.number == 2
    assert conductor.status()["trainings"] == 1
    for classes in ((0, 1, 2), (3, 4, 5)):
        images, labels = make_images(classes, 8, seed=9)
        answers = agent.predict(images, probe=True)
        assert np.mean([a.label == t for a, t in zip(answers, labels, strict=True)]) >= 0.9
    assert list((agent.state.path / "training").iterdir()) == []


def test_a_device_stopped_while_training_carries_on_after_the_restart(
    agent, config, install, watch, shift
) -> None:
    install()
    never = (sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)")
    conductor = Conductor(agent, config, trainer_command=never)
    conductor.start()
    shift()
    watch.until("training")
    conductor.stop()
    assert agent.serving.number == 1
    conductor = Conductor(agent, config)
    conductor.start()
    try:
        watch.until("closed")
    finally:
        conductor.stop()
    assert agent.serving.number == 2
    assert conductor.status()["trainings"] == 1


def test_a_cancelled_training_is_not_started_again_by_itself(
    agent, config, install, watch, shift
) -> None:
    install()
    never = (sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)")
    conductor = Conductor(agent, config, trainer_command=never)
    conductor.start()
    try:
        assert not conductor.cancel_training()
        shift()
        watch.until("training")
        assert agent.conductor_cancel()
        waiting = watch.until("waiting_for_labels")
        assert not conductor.cancel_training()
        status = conductor.status()
    finally:
        conductor.stop()
    assert waiting["needed"] > waiting["labels"] >= 30
    assert "cancelled by the operator" in waiting["note"]
    assert (status["trainings"], status["training"]) == (1, {})


def test_a_shift_without_labels_says_what_it_waits_for(
    agent, config, install, watch, shift
) -> None:
    install()
    conductor = Conductor(agent, config)
    conductor.start()
    try:
        shift(label=False)
        watch.until("waiting_for_labels")
        episode = agent.status()["episode"]
    finally:
        conductor.stop()
    assert episode["state"] == "waiting_for_labels"
    assert (episode["labels"], episode["labels_needed"]) == (0, 30)
    assert "0 of 30" in episode["detail"]


def test_without_torch_the_device_says_so_and_goes_on_serving(
    agent, config, install, watch, shift
) -> None:
    install()
    script = (
        "import sys, pathlib;"
        "pathlib.Path(sys.argv[1], 'failure.json').write_text("
        '\'{"reason": "install driftkeel[train]"}\'); sys.exit(3)'
    )
    command = (sys.executable, "-S", "-E", "-c", script)
    conductor = Conductor(agent, config, trainer_command=command)
    conductor.start()
    try:
        shift()
        watch.until("training")
        waiting = watch.until("waiting_for_labels")
    finally:
        conductor.stop()
    assert "install driftkeel[train]" in waiting["note"]
    assert agent.predict(np.zeros((1, 32, 32, 3), np.uint8))[0].generation == 1


def test_a_full_disk_delays_an_episode_and_loses_nothing(
    agent, config, install, shift, monkeypatch
) -> None:
    install()
    monkeypatch.setattr("edge_agent.conductor.RETRY_S", 0.01)
    save, fails, opened = agent.state.episodes.save, [3], queue.Queue()

    def full(values: dict) -> None:
        if fails[0]:
            fails[0] -= 1
            raise DiskFullError("the disk is full")
        save(values)
        opened.put(values)

    monkeypatch.setattr(agent.state.episodes, "save", full)
    conductor = Conductor(agent, config)
    conductor.start()
    try:
        shift(label=False)
        assert opened.get(timeout=WAIT_S)["number"] == 1
        assert fails == [0]
    finally:
        conductor.stop()
