from __future__ import annotations

import numpy as np
import pytest

from ood.errors import OodError
from ood.frames import FrameFacts, Limits, frame_facts, repeated


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def fault(image: np.ndarray) -> str:
    return Limits().fault(frame_facts(image[None])[0])


def test_a_picture_is_no_fault() -> None:
    assert fault(pictures(1)[0]) == ""


def test_black_saturated_blank_and_partly_dead_frames_are_told_apart() -> None:
    shape = (16, 16, 3)
    half = pictures(1)[0]
    half[:8] = 0
    assert fault(np.full(shape, 3, np.uint8)) == "black"
    assert fault(np.full(shape, 255, np.uint8)) == "saturated"
    assert fault(np.full(shape, 128, np.uint8)) == "blank"
    assert fault(half) == "partly dead"
    assert fault(half.transpose(1, 0, 2)) == "partly dead"


def test_a_frame_shown_again_is_frozen() -> None:
    frames = frame_facts(pictures(3)[[0, 1, 0, 2, 2]])
    assert repeated(frames).tolist() == [False, False, True, False, True]
    assert Limits().faults(frames) == ["", "", "frozen", "", "frozen"]


def test_what_the_known_world_shows_is_no_fault() -> None:
    quiet = pictures(40)
    quiet[:, :10] = 0
    night = np.concatenate([pictures(36, 1), np.full((4, 16, 16, 3), 2, np.uint8)])
    assert not any(Limits.of(frame_facts(quiet)).faults(frame_facts(quiet)))
    assert not any(Limits.of(frame_facts(night)).faults(frame_facts(night)))


def test_few_known_frames_say_nothing_about_what_is_normal() -> None:
    assert Limits.of(frame_facts(np.zeros((5, 16, 16, 3), np.uint8))) == Limits()


def test_facts_survive_the_journal_and_damage_is_refused() -> None:
    facts = frame_facts(pictures(1))[0]
    again = FrameFacts.from_bytes(facts.to_bytes())
    assert again.digest == facts.digest
    assert again.mean == pytest.approx(facts.mean)
    assert again.noise == pytest.approx(facts.noise)
    assert again.edges == facts.edges
    with pytest.raises(OodError, match="57 or 40 bytes"):
        FrameFacts.from_bytes(b"short")
    with pytest.raises(OodError, match="NaN"):
        FrameFacts.from_bytes(b"\xff" * 40)


def test_facts_that_the_first_version_noted_are_read_and_known_to_lack_some() -> None:
    facts = frame_facts(pictures(1))[0]
    first = FrameFacts.from_bytes(facts.to_bytes()[:40])
    assert first.mean == pytest.approx(facts.mean)
    assert first.digest == facts.digest
    assert not first.complete
    assert facts.complete
    assert Limits().faults([first]) == [""]


def ending(n: int, empty: int, seed: int) -> np.ndarray:
    """Pictures, so many of them empty on the right, as short sounds are in their spectrograms."""
    frames = pictures(n, seed)
    frames[:empty, :, 8:] = 0
    return frames


def test_a_half_that_is_often_empty_is_dead_when_it_is_empty_in_all() -> None:
    limits = Limits.of(frame_facts(ending(100, 30, 0)))
    as_ever = limits.faults(frame_facts(ending(50, 20, 1)))
    dead = limits.faults(frame_facts(ending(50, 40, 2)))
    assert not any(as_ever)
    assert dead == ["partly dead"] * 40 + [""] * 10


def test_a_half_that_is_never_empty_is_dead_at_once_wherever_others_are_empty() -> None:
    limits = Limits.of(frame_facts(ending(100, 30, 0)))
    left = pictures(1, 3)
    left[:, :, :8] = 0
    assert limits.faults(frame_facts(left)) == ["partly dead"]


def test_what_is_no_batch_of_frames_is_refused() -> None:
    with pytest.raises(OodError, match="uint8"):
        frame_facts(np.full((1, 8, 8, 3), np.nan))
    with pytest.raises(OodError, match="say nothing"):
        frame_facts(np.zeros((1, 1, 8, 3), np.uint8))


def test_edges_say_nothing_while_known_frames_are_of_the_first_version() -> None:
    known = [
        FrameFacts.from_bytes(facts.to_bytes()[:40]) for facts in frame_facts(ending(100, 30, 0))
    ]
    assert not any(Limits.of(known).faults(frame_facts(ending(50, 20, 1))))
