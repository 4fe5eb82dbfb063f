"""The memory budget of a training: what it spills, what it splits, what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import TrainingMemoryError
from edge_agent.training_memory import (
    Chosen,
    MemoryBudget,
    SpilledRows,
    peak_bytes,
    planned_micro_batch,
)

MB = 2**20


def budget(free_mb: int) -> MemoryBudget:
    """A budget of that much above what this process has."""
    none = MemoryBudget(0)
    return MemoryBudget(free_mb * MB - none.free())


def test_a_step_runs_as_many_samples_at_once_as_fit() -> None:
    room = budget(300)
    assert room.samples_at_once(1000, batch=32) == 32
    assert 1 <= room.samples_at_once(10 * MB, batch=32) <= 10
    with pytest.raises(TrainingMemoryError, match=r"learner\.max_memory is \d+; set it to \d+"):
        room.samples_at_once(500 * MB, batch=32)


def test_having_taken_too_much_is_said_by_name() -> None:
    MemoryBudget(2 * peak_bytes()).check()
    with pytest.raises(TrainingMemoryError, match=r"learner\.max_memory is 1;"):
        MemoryBudget(MB).check()


def test_activations_that_do_not_fit_are_kept_in_a_file_and_read_the_same(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32)
    small, large = budget(0), budget(500)
    places = [room.activations(tmp_path, 10, (3, 4)) for room in (small, large)]
    assert isinstance(places[0], SpilledRows)
    assert isinstance(places[1], np.ndarray)
    rows = np.array([7, 2, 2])
    for place in places:
        place[0:6], place[6:10] = values[:6], values[6:]
        np.testing.assert_array_equal(place[rows], values.astype(np.float16)[rows])
        chosen = Chosen(place, np.array([9, 0, 4]))
        np.testing.assert_array_equal(chosen[np.array([2, 0])], values.astype(np.float16)[[4, 9]])


def test_the_number_of_samples_at_once_stays_what_the_first_start_chose(tmp_path: Path) -> None:
    assert planned_micro_batch(tmp_path, lambda: 5) == 5
    assert planned_micro_batch(tmp_path, lambda: 7) == 5
