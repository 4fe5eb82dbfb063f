"""An episode is diagnosed once confirmed, and what was diagnosed decides what is done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adapter_store.journal import SampleRecord
from adapter_store.state import StateDir
from edge_agent import episode_events as ev
from edge_agent.diagnosis import healthy, healthy_in_a_row
from edge_agent.episode import Episode, Policy, Stage, open_episode
from edge_agent.episode_steps import resume, step
from edge_agent.report import describe_episode
from ood.frames import frame_facts

POLICY = Policy(min_labels=8, align_samples=64, diagnose=True, healthy_frames=8)


def confirmed() -> Episode:
    episode = open_episode(
        1, now=1.0, alarm_seq=20, onset_seq=10, generation=1, pinned=False, policy=POLICY
    )
    seen = ev.SamplesSeen(since_alarm=32, foreign=30, since_onset=42)
    episode, actions = step(episode, seen, now=2.0, policy=POLICY)
    assert actions == (ev.Diagnose(),)
    return episode


def diagnosed(
    kind: str, confidence: float = 0.9, **more: object
) -> tuple[Episode, tuple[ev.Action, ...]]:
    found = ev.Diagnosed(kind, confidence, ("seen so",), **more)  # type: ignore[arg-type]
    return step(confirmed(), found, now=3.0, policy=POLICY)


def test_it_is_asked_once_and_again_after_a_restart() -> None:
    episode = confirmed()
    seen = ev.SamplesSeen(since_alarm=64, foreign=60, since_onset=74)
    assert step(episode, seen, now=3.0, policy=POLICY) == (episode, ())
    assert resume(Episode.from_dict(episode.to_dict()), POLICY) == (ev.Diagnose(),)


def test_a_sensor_fault_does_nothing_but_wait_for_healthy_frames() -> None:
    episode, actions = diagnosed("sensor fault")
    assert (episode.stage, actions) == (Stage.SENSOR_FAULT, ())
    assert resume(episode, POLICY) == ()
    for event in (
        ev.LabelsAvailable(500),
        ev.SearchDue(),
        ev.SearchAnswered((ev.CandidateRef("a" * 64, 1, 1.0, b"", b""),)),
        ev.SamplesSeen(900, 900, 900),
        ev.AlignmentTried(3, "helps"),
        ev.FramesSeen(7),
    ):
        episode, actions = step(episode, event, now=4.0, policy=POLICY)
        assert (episode.stage, actions) == (Stage.SENSOR_FAULT, ())
    assert "sensor fault: seen so" in describe_episode(episode)
    episode, actions = step(episode, ev.FramesSeen(8), now=5.0, policy=POLICY)
    assert (episode.open, actions) == (False, ())
    assert "works again" in episode.outcome


def test_a_prior_change_closes_without_training() -> None:
    episode, actions = diagnosed("prior change")
    assert (episode.stage, actions) == (Stage.CLOSED, ())
    assert "prior change" in episode.outcome


def test_new_classes_are_not_aligned_and_their_samples_are_shown() -> None:
    group = ev.GroupFound(12, ("s1", "s2"), "cat", 2.5)
    episode, actions = diagnosed("new classes", groups=(group,))
    assert (actions, episode.align_at, episode.groups) == ((ev.Search(),), None, (group,))
    episode, _ = step(episode, ev.SearchFailed("offline"), now=4.0, policy=POLICY)
    assert episode.stage is Stage.WAITING_FOR_LABELS
    assert "look at samples s1" in episode.note
    assert Episode.from_dict(episode.to_dict()) == episode


def test_new_classes_in_doubt_may_be_aligned_and_are_shown_all_the_same() -> None:
    group = ev.GroupFound(12, ("s1", "s2"), "cat", 2.5)
    episode, _ = diagnosed("new classes", 0.7, groups=(group,))
    episode, _ = step(episode, ev.SearchFailed("offline"), now=4.0, policy=POLICY)
    assert (episode.kind, episode.align_at) == ("new classes", 64)
    aligned, actions = step(episode, ev.AlignmentTried(2, "helps"), now=5.0, policy=POLICY)
    assert (aligned.kind, aligned.groups) == ("new classes", (group,))
    assert actions == (ev.Activate(2, "", trained=False),)


@pytest.mark.parametrize("kind", ["domain shift", "unclear"])
def test_a_new_look_goes_on_as_ever_and_may_be_aligned(kind: str) -> None:
    episode, actions = diagnosed(kind)
    assert (episode.stage, actions) == (Stage.SEEKING, (ev.Search(),))
    assert episode.align_at == 64
    assert any(kind in moment.note for moment in episode.history)


def test_a_pinned_device_is_diagnosed_when_unpinned() -> None:
    episode = replace(confirmed(), pinned=True)
    _, actions = step(episode, ev.PinChanged(pinned=False), now=4.0, policy=POLICY)
    assert actions == (ev.Diagnose(),)


def record(name: str, image: np.ndarray | None) -> SampleRecord:
    facts = None if image is None else frame_facts(image[None])[0].to_bytes()
    return SampleRecord(
        name, 1.0, 1, "a", 0.9, None, 1.0, 0.5, np.ones(4, np.float16), b"", frame=facts
    )


def test_frames_of_a_broken_sensor_are_left_out_and_counted(tmp_path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    dark = np.zeros((16, 16, 3), np.uint8)
    with StateDir(tmp_path) as state:
        state.journal.record([record(f"known{k}", pictures[k]) for k in range(30)], None)
        shifted = [
            record("picture", pictures[30]),
            record("black", dark),
            record("again", pictures[30]),
            record("unnoted", None),
            *(record(f"well{k}", pictures[31 + k]) for k in range(3)),
        ]
        state.journal.record(shifted, None)
        rows = state.journal.recent(100, since_seq=30)
        kept = [row.id for row in healthy(state.journal, rows, 31)]
        assert kept == ["picture", "unnoted", "well0", "well1", "well2"]
        assert healthy_in_a_row(state.journal, 31, 8) == 3
        assert healthy_in_a_row(state.journal, 31, 2) == 2
