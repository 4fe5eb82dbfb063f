"""The agent serves through switches, restarts and a full disk, and remembers what it owes."""

import threading

import numpy as np
import pytest

from adapter_store.errors import (
    BundleError,
    DiskFullError,
    GenerationError,
    StateLockedError,
    UnknownSampleError,
)
from edge_agent.agent import Agent
from edge_agent.errors import NoGenerationError
from exporter.errors import PreprocessError


def labels(answers) -> list[str]:
    return [answer.label for answer in answers]


def test_without_a_generation_it_says_what_to_do(agent, make_images) -> None:
    with pytest.raises(NoGenerationError, match="agent fit"):
        agent.predict(make_images((0,), 1)[0])
    assert agent.status()["generation"] is None


def test_an_answer_is_journalled_with_what_is_needed_to_learn_from_it(
    agent, install, make_images
) -> None:
    install()
    images, _ = make_images((0, 1), 2, seed=20)
    answers = agent.predict(images)
    rows = [agent.state.journal.get(answer.sample_id) for answer in answers]
    assert [(r.label, r.generation) for r in rows] == [(a.label, a.generation) for a in answers]
    assert all(row.image and len(row.features) for row in rows)
    assert len({answer.sample_id for answer in answers}) == len(answers)


def test_a_probe_leaves_no_trace(agent, install, make_images) -> None:
    install()
    foreign, _ = make_images((4, 5), 30, seed=21)
    answers = agent.predict(foreign, probe=True)
    assert agent.state.journal.recent(10) == []
    assert agent.status()["counters"]["alarms"] == 0
    with pytest.raises(UnknownSampleError):
        agent.feedback(answers[0].sample_id, "stripes-4")


def test_a_shift_raises_one_alarm_at_its_sample(agent, install, make_images) -> None:
    install()
    heard: list[tuple[int, int]] = []
    agent.on_alarm(lambda alarm, seq: heard.append((alarm.at, seq)))
    agent.predict(make_images((0, 1, 2), 10, seed=22)[0])
    assert heard == []
    agent.predict(make_images((4, 5), 15, seed=23)[0])
    at, seq = heard[0]
    assert seq == at > 30
    assert agent.status()["last_alarm"]["seq"] == seq


def test_the_alarm_does_not_depend_on_a_restart(config, agent, install, make_images) -> None:
    install()
    known, _ = make_images((0, 1, 2), 10, seed=24)
    foreign, _ = make_images((4, 5), 15, seed=25)
    heard: list[int] = []
    agent.predict(known)
    agent.predict(foreign[:3])
    agent.close()
    again = Agent.open(config)
    try:
        again.on_alarm(lambda alarm, _: heard.append(alarm.at))
        again.predict(foreign[3:])
        assert heard[0] > len(known)
        assert again.state.journal.recent(1)[0].seq == len(known) + len(foreign)
    finally:
        again.close()


def test_feedback_reaches_the_journal_and_the_observers(agent, install, make_images) -> None:
    install()
    called: list[bool] = []
    agent.on_feedback(lambda: called.append(True))
    answer = agent.predict(make_images((0,), 1)[0])[0]
    agent.feedback(answer.sample_id, "stripes-0")
    agent.feedback(answer.sample_id, "stripes-0")
    (row,) = agent.state.journal.labelled()
    assert (row.id, row.true_label) == (answer.sample_id, "stripes-0")
    assert called


def test_feedback_for_an_unknown_sample_is_refused(agent, install) -> None:
    install()
    with pytest.raises(UnknownSampleError):
        agent.feedback("f" * 32, "stripes-0")


def test_going_back_a_generation_gives_its_answers_back(
    agent, install, make_bundle, make_images
) -> None:
    first, second = make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1)
    images, _ = make_images(range(6), 4, seed=26)
    one = install(first)
    before = [(a.label, a.probability) for a in agent.predict(images, probe=True)]
    two = install(first, second)
    after = [(a.label, a.probability) for a in agent.predict(images, probe=True)]
    assert after != before
    agent.activate(one)
    assert [(a.label, a.probability) for a in agent.predict(images, probe=True)] == before
    agent.activate(two)
    assert [(a.label, a.probability) for a in agent.predict(images, probe=True)] == after
    assert agent.state.generations.current().number == two


def test_what_serves_after_a_restart_is_what_the_pointer_names(
    config, agent, install, make_bundle
) -> None:
    first = make_bundle((0, 1, 2))
    one = install(first)
    install(first, make_bundle((3, 4), adapter=1))
    agent.activate(one)
    agent.close()
    again = Agent.open(config)
    try:
        assert again.serving.number == one
        assert [g["number"] for g in again.generations() if g["running"]] == [one]
    finally:
        again.close()


def test_no_request_fails_while_generations_are_switched(
    agent, install, make_bundle, make_images
) -> None:
    first = make_bundle((0, 1, 2))
    one, two = install(first), install(first, make_bundle((3, 4), adapter=1))
    images, _ = make_images((0, 1), 1)
    stop, failures, served = threading.Event(), [], set()

    def ask() -> None:
        while not stop.is_set():
            try:
                served.update(answer.generation for answer in agent.predict(images))
            except Exception as error:  # noqa: BLE001 - any failure is the finding
                failures.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in (one, two) * 2:
        agent.activate(number)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert served <= {one, two}
    assert agent.status()["swap_ms"] > 0


def test_activating_tells_the_observers_once_and_the_running_one_is_a_no_op(agent, install) -> None:
    told: list[int] = []
    agent.on_activated(told.append)
    number = install()
    agent.activate(number)
    assert told == [number]


def test_an_unknown_generation_is_refused_and_the_running_one_serves(
    agent, install, make_images
) -> None:
    number = install()
    with pytest.raises(GenerationError):
        agent.activate(number + 40)
    assert agent.predict(make_images((0,), 1)[0])[0].generation == number


def test_a_damaged_bundle_is_refused_and_the_running_generation_serves(
    agent, install, make_bundle, make_images, calibration
) -> None:
    number = install()
    cut = agent.state.blobs.put(make_bundle((3, 4), adapter=1)[:-100])
    with pytest.raises(BundleError):
        agent.load_candidate([cut], calibration)
    with pytest.raises(BundleError):
        agent.build_generation([cut], calibration, parent=number, reason="test")
    assert [g["number"] for g in agent.generations()] == [number]
    assert agent.predict(make_images((0,), 1)[0])[0].generation == number


def test_a_candidate_is_tried_in_memory_only(
    agent, install, make_bundle, make_images, calibration
) -> None:
    number = install(make_bundle((0, 1, 2)))
    digest = agent.state.blobs.put(make_bundle((3, 4), adapter=1))
    candidate = agent.load_candidate([*agent.serving.bundles, digest], calibration)
    images, truth = make_images((3, 4), 6, seed=27)
    hits = [a == b for a, b in zip(labels(candidate.predict(images)), truth, strict=True)]
    assert np.mean(hits) >= 0.9
    assert agent.serving.number == number
    assert agent.state.journal.recent(10) == []


def test_a_full_disk_stops_no_answer_and_is_reported(
    agent, install, make_images, monkeypatch
) -> None:
    install()

    def full(*_: object) -> list[int]:
        raise DiskFullError("no space left on device")

    images, truth = make_images((0, 1), 4, seed=28)
    with monkeypatch.context() as broken:
        broken.setattr(agent.state.journal, "record", full)
        assert labels(agent.predict(images)) == list(truth)
        status = agent.status()
    assert status["counters"]["journal_errors"] == 1
    assert "no space" in status["journal_problem"]
    agent.predict(images)
    assert agent.status()["journal_problem"] == ""
    assert len(agent.state.journal.recent(100)) == len(images)


def test_a_shift_is_noticed_on_a_full_disk(agent, install, make_images, monkeypatch) -> None:
    install()
    heard: list[int] = []
    agent.on_alarm(lambda _, seq: heard.append(seq))

    def full(*_: object) -> list[int]:
        raise DiskFullError("no space left on device")

    monkeypatch.setattr(agent.state.journal, "record", full)
    for _ in range(4):
        agent.predict(make_images((4, 5), 10, seed=29)[0])
    assert heard[0] == 0


def test_a_second_agent_on_the_state_directory_is_refused(config, agent) -> None:
    with pytest.raises(StateLockedError):
        Agent.open(config)


def test_an_array_that_is_no_image_is_refused(agent, install) -> None:
    install()
    with pytest.raises(PreprocessError):
        agent.predict(np.zeros((1, 8, 8), np.uint8))


def test_status_counts_what_was_done(agent, install, make_images) -> None:
    install()
    agent.predict(make_images((0, 1), 2)[0])
    agent.predict(make_images((0,), 3)[0], probe=True)
    status = agent.status()
    assert status["counters"]["requests"] == 2
    assert status["counters"]["samples"] == 4
    assert status["counters"]["probes"] == 3
    assert status["passes_per_sample"] == 1.0
    assert status["latency_ms"]["p99"] >= status["latency_ms"]["p50"] > 0
    assert status["generation"]["labels"] == ["stripes-0", "stripes-1", "stripes-2"]


def test_the_conductors_status_is_merged(agent) -> None:
    agent.conductor_status = lambda: {"trainings": 2}
    assert agent.status()["trainings"] == 2
