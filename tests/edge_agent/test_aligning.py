"""A device aligns a new camera's features while it waits for labels, and nothing else."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_store.bundle import pack
from edge_agent import episode_work as work
from edge_agent.agent import Agent
from edge_agent.alignment import Alignment
from edge_agent.conductor import Conductor
from edge_agent.config import Config, LearnerSection
from edge_agent.episode import Episode
from edge_agent.fit import encode, fit
from edge_agent.learner import Learner
from edge_agent.serving import Answer
from examples.demo.digits import FIRST, NEW, Split, worlds

WAIT_S = 120.0


def in_colour(split: Split) -> Split:
    """As the agent takes it: uint8 [n, h, w, 3]."""
    return Split(np.repeat(split.images[..., None], 3, axis=3), split.labels)


WORLD = worlds(seed=3)[0]
FIT, STREAM = in_colour(WORLD.fit), in_colour(WORLD.stream)
PROBE = in_colour(WORLD.probe.first(100))
KNOWN = STREAM.only(FIRST).first(48)
SHIFTED = Split(STREAM.only(FIRST).images[48:], STREAM.only(FIRST).labels[48:])


def darker(split: Split) -> Split:
    """The same digits by a camera with another gain and offset."""
    return Split((split.images * 0.7 + 70).astype(np.uint8), split.labels)


@dataclass(frozen=True)
class Fitted:
    """What a device is fitted on: a packed bundle of digits 0-4, and calibration features."""

    bundle: bytes
    calibration: NDArray[np.float32]


@pytest.fixture(scope="module")
def fitted(sessions) -> Fitted:
    features = encode(sessions, FIT.images)
    labels = tuple(str(k) for k in FIT.labels)
    made = fit(
        features,
        labels,
        encoder=sessions.package.digest,
        task="digits",
        created_by="test",
        created_at=0.0,
    )
    return Fitted(pack(made.bundle), made.calibration_features)


@pytest.fixture
def device(agent: Agent, fitted: Fitted) -> Agent:
    """An agent that knows digits 0-4 by one camera; generation 1."""
    digest = agent.state.blobs.put(fitted.bundle)
    made = agent.build_generation([digest], fitted.calibration, parent=None, reason="test")
    agent.activate(made.number)
    return agent


class Story:
    """A conductor at work, and what it saved and activated."""

    def __init__(self, agent: Agent, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self._happened: queue.Queue[tuple[dict | None, int | None]] = queue.Queue()
        save = agent.state.episodes.save

        def noted(values: dict) -> None:
            save(values)
            self._happened.put((values, None))

        monkeypatch.setattr(agent.state.episodes, "save", noted)
        agent.on_activated(lambda number: self._happened.put((None, number)))
        self._agent = agent
        self.conductor = Conductor(agent, config)
        self.conductor.start()

    def send(self, split: Split) -> list[Answer]:
        answers = []
        for start in range(0, len(split), 8):
            answers += self._agent.predict(split.images[start : start + 8])
        return answers

    def until_saved(self, wanted: Callable[[dict], bool]) -> dict:
        while True:
            values, _ = self._happened.get(timeout=WAIT_S)
            if values is not None and wanted(values):
                return values

    def until_activated(self) -> int:
        while True:
            _, number = self._happened.get(timeout=WAIT_S)
            if number is not None:
                return number


@pytest.fixture
def story(device: Agent, config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    story = Story(device, config, monkeypatch)
    yield story
    story.conductor.stop()


def refused(values: dict) -> bool:
    return any("align" in moment["note"] for moment in values["history"])


def accuracy(agent: Agent, split: Split) -> float:
    answers = agent.predict(split.images, probe=True)
    return float(np.mean([a.label == str(t) for a, t in zip(answers, split.labels, strict=True)]))


def told(agent: Agent, split: Split) -> list[tuple[str, float, float]]:
    answers = agent.predict(split.images, probe=True)
    return [(a.label, a.probability, a.ood_score) for a in answers]


def aligned(agent: Agent) -> int:
    """Build, and activate, a generation aligned to the darker camera."""
    features = encode(agent.sessions, darker(SHIFTED.first(128)).images)
    running = agent.state.generations.current()
    calibration = running.calibration_features()
    made = agent.build_generation(
        running.manifest.bundles,
        calibration,
        parent=running.number,
        reason="aligned",
        alignment=Alignment.fit(features, calibration),
    )
    agent.activate(made.number)
    return made.number


def test_a_new_camera_is_aligned_while_its_episode_waits_for_labels(device, story) -> None:
    camera = darker(PROBE.only(FIRST))
    before, clear = accuracy(device, camera), told(device, PROBE)
    story.send(KNOWN)
    story.send(darker(SHIFTED.first(96)))
    assert story.until_activated() == 2
    assert before < 0.8
    assert accuracy(device, camera) > 0.9
    # What came before the shift comes back, and digits nobody taught it: answered as ever.
    assert told(device, PROBE) == clear
    status = device.status()
    assert status["generation"]["aligned"]
    assert status["episode"]["state"] == "waiting_for_labels"
    assert "aligned, waiting for labels: 0 of 64" in status["episode"]["detail"]
    first, second = status["generations"]
    assert (first["aligned"], second["aligned"], second["parent"]) == (False, True, 1)
    assert second["bundles"] == first["bundles"]


@pytest.mark.parametrize("classes", [NEW, range(10)], ids=["new", "mixed"])
def test_new_classes_are_never_aligned_away(device, story, classes) -> None:
    story.send(KNOWN)
    story.send(STREAM.only(classes).first(128))
    # What is surely new classes is not tried to be aligned at all.
    values = story.until_saved(
        lambda v: refused(v) or (v["kind"] == "new classes" and v["stage"] == "waiting_for_labels")
    )
    assert values["kind"] == "new classes" or "does not help" in values["history"][-1]["note"]
    assert values["aligned"] is None
    assert [generation.number for generation in device.state.generations.list()] == [1]


def test_how_foreign_a_sample_is_goes_by_what_came(device) -> None:
    split = Split(
        np.concatenate([PROBE.images, darker(PROBE).images]),
        np.concatenate([PROBE.labels, PROBE.labels]),
    )
    before = [score for _, _, score in told(device, split)]
    aligned(device)
    assert [score for _, _, score in told(device, split)] == before


def test_a_label_of_a_new_class_ends_the_aligning(device, story) -> None:
    story.send(KNOWN)
    answers = story.send(darker(SHIFTED.first(48)))
    device.feedback(answers[0].sample_id, "seven")
    story.send(darker(SHIFTED.first(96)))
    values = story.until_saved(refused)
    assert "seven came, which are new classes" in values["history"][-1]["note"]
    assert device.serving.number == 1


@pytest.mark.parametrize("config", [LearnerSection(align=False)], indirect=True)
def test_a_device_that_shall_not_align_does_not(device, config, story) -> None:
    story.send(KNOWN)
    story.send(darker(SHIFTED.first(96)))
    values = story.until_saved(lambda v: v["stage"] == "waiting_for_labels")
    assert values["align_at"] is None


@pytest.fixture
def config(config: Config, request: pytest.FixtureRequest) -> Config:
    return msgspec.structs.replace(config, learner=getattr(request, "param", LearnerSection()))


def test_a_restart_and_a_rollback_restore_every_answer(device, config) -> None:
    split = darker(PROBE)
    plain = told(device, split)
    number = aligned(device)
    with_it = told(device, split)
    assert with_it != plain
    device.activate(1)
    assert told(device, split) == plain
    device.activate(number)
    assert told(device, split) == with_it
    device.close()
    again = Agent.open(config)
    try:
        assert again.serving.number == number
        assert told(again, split) == with_it
    finally:
        again.close()


def test_the_next_bundle_replaces_the_alignment(device, make_bundle, tmp_path) -> None:
    number = aligned(device)
    before = device.state.generations.get(1).calibration_features()
    story = Episode.from_dict(
        {
            "number": 1,
            "stage": "installed",
            "opened_at": 0.0,
            "alarm_seq": 1,
            "onset_seq": 1,
            "generation": 1,
            "needed": 64,
        }
    )
    device.predict(darker(SHIFTED.first(8)).images)
    digest = device.state.blobs.put(make_bundle((0, 1)))
    learner = Learner(tmp_path / "jobs", lambda _: None, threads=1, max_seconds=1.0)
    made = work.build(device, learner, story, name="job", digest=digest, trained=False, reason="")
    assert (made.manifest.parent, made.manifest.aligned, made.alignment()) == (number, False, {})
    assert digest in made.manifest.bundles
    # Calibration goes on from what was known: nothing aligned got into it.
    kept = made.calibration_features()[: -len(darker(SHIFTED.first(8)))]
    assert {row.tobytes() for row in kept} <= {row.tobytes() for row in before}


def test_an_adapter_does_not_look_at_what_is_aligned(agent, make_bundle, make_images) -> None:
    """Its own features are not aligned, so that they would say something about another world."""
    images, _ = make_images((0, 1, 2), 25, seed=77)
    calibration = encode(agent.sessions, images)
    digest = agent.state.blobs.put(make_bundle((0, 1, 2), adapter=5))
    dark = (images * 0.5).astype(np.uint8)
    alignment = Alignment.fit(encode(agent.sessions, dark), calibration)
    serving = agent.load_candidate([digest], calibration, alignment=alignment)
    assert {(a.adapter, a.passes) for a in serving.predict(dark)} == {(None, 1.0)}
    assert {a.adapter for a in serving.predict(images)} == {digest}
