"""Every answer is remembered, every label is kept, and what training may need is not pruned."""

import threading

import numpy as np
import pytest

from adapter_store.errors import LabelError, UnknownSampleError
from adapter_store.journal import SampleRecord
from adapter_store.state import StateDir


def sample(name, **changes) -> SampleRecord:
    fields = {
        "id": name,
        "at": 5.0,
        "generation": 2,
        "label": "cat",
        "probability": 0.75,
        "adapter": None,
        "score": 3.5,
        "p_value": 0.25,
        "features": np.arange(4, dtype=np.float16),
        "image": b"pixels",
        **changes,
    }
    return SampleRecord(**fields)


def fill(state, count, *, start=1) -> list[int]:
    return state.journal.record([sample(f"s{k}") for k in range(start, start + count)], None)


def test_a_sample_comes_back_as_it_was_recorded(state) -> None:
    recorded = sample("one", adapter="a" * 64)
    assert state.journal.record([recorded], {"seen": 1}) == [1]
    found = state.journal.get("one")
    for name in ("id", "at", "generation", "label", "probability", "adapter", "score", "p_value"):
        assert getattr(found, name) == getattr(recorded, name)
    assert found.image == b"pixels"
    assert found.features.dtype == np.float16
    assert np.array_equal(found.features, recorded.features)
    assert (found.seq, found.true_label, found.labelled_at) == (1, None, None)


def test_positions_grow_by_one_over_batches_and_restarts(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        assert fill(state, 3) == [1, 2, 3]
        assert state.journal.record([], None) == []
    with StateDir(tmp_path) as state:
        assert fill(state, 2, start=4) == [4, 5]
        assert [row.id for row in state.journal.recent(10)] == ["s1", "s2", "s3", "s4", "s5"]


def test_a_batch_is_recorded_whole_or_not_at_all(state) -> None:
    state.journal.record([sample("one")], {"seen": 1})
    with pytest.raises(Exception, match="UNIQUE"):
        state.journal.record([sample("two"), sample("one")], {"seen": 3})
    assert [row.id for row in state.journal.recent(10)] == ["one"]
    assert state.journal.alarm_state() == {"seen": 1}


def test_the_alarms_state_is_the_one_after_the_last_sample(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        assert state.journal.alarm_state() is None
        for seen in (1, 2):
            state.journal.record([sample(f"s{seen}")], {"seen": seen, "log": [0.1]})
    with StateDir(tmp_path) as state:
        assert state.journal.alarm_state() == {"seen": 2, "log": [0.1]}


def test_the_same_label_twice_is_one_and_a_later_one_wins(state) -> None:
    fill(state, 1)
    state.journal.feedback("s1", "dog")
    first = state.journal.get("s1")
    state.journal.feedback("s1", "dog")
    assert state.journal.get("s1").labelled_at == first.labelled_at
    state.journal.feedback("s1", "cow")
    assert state.journal.get("s1").true_label == "cow"
    assert state.journal.count_labelled() == 1


def test_feedback_for_an_unknown_sample_names_it(state) -> None:
    with pytest.raises(UnknownSampleError, match="'ghost'"):
        state.journal.feedback("ghost", "dog")
    with pytest.raises(UnknownSampleError, match="'ghost'"):
        state.journal.get("ghost")


@pytest.mark.parametrize("label", ["", "\x1b[2J", "x" * 201])
def test_a_label_that_cannot_be_shown_is_refused(state, label) -> None:
    fill(state, 1)
    with pytest.raises(LabelError):
        state.journal.feedback("s1", label)
    assert state.journal.get("s1").true_label is None


def test_labels_survive_a_restart(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        fill(state, 2)
        state.journal.feedback("s2", "dog")
    with StateDir(tmp_path) as state:
        assert [(row.id, row.true_label) for row in state.journal.labelled()] == [("s2", "dog")]


def test_queries_begin_after_a_position_and_are_oldest_first(state) -> None:
    state.journal.record([sample(f"s{k}", p_value=k / 10) for k in range(1, 7)], None)
    for name in ("s2", "s4", "s5"):
        state.journal.feedback(name, "dog")
    assert [row.seq for row in state.journal.recent(2, since_seq=1)] == [5, 6]
    assert [row.seq for row in state.journal.recent(10, since_seq=4)] == [5, 6]
    assert [row.seq for row in state.journal.labelled(since_seq=2)] == [4, 5]
    assert state.journal.count_labelled(since_seq=4) == 1
    assert state.journal.p_values(since_seq=3) == [0.4, 0.5, 0.6]


def test_pruning_keeps_the_newest_images_and_a_longer_log(state) -> None:
    fill(state, 130)
    state.journal.prune(2)
    assert [row.seq for row in state.journal.recent(200)] == [129, 130]
    old = state.journal.get("s40")
    assert (old.features, old.image, old.label) == (None, None, "cat")
    assert len(state.journal.p_values()) == 2 * 50
    with pytest.raises(UnknownSampleError):
        state.journal.feedback("s30", "dog")
    assert fill(state, 1, start=131) == [131]


def test_labelled_samples_of_an_open_episode_are_never_pruned(state) -> None:
    fill(state, 20)
    for name in ("s3", "s8", "s12"):
        state.journal.feedback(name, "dog")
    state.episodes.save({"number": 1, "stage": "waiting_for_labels", "onset_seq": 8})
    state.journal.prune(1)
    assert [row.seq for row in state.journal.labelled()] == [8, 12]
    assert [row.seq for row in state.journal.recent(50)] == [8, 12, 20]
    state.episodes.save({"number": 1, "stage": "closed", "onset_seq": 8})
    state.journal.prune(1, protect_since_seq=12)
    assert [row.seq for row in state.journal.recent(50)] == [12, 20]
    state.journal.prune(1)
    assert [row.seq for row in state.journal.recent(50)] == [20]


def test_a_sample_without_an_image_is_still_recorded(state) -> None:
    state.journal.record([sample("one", image=None)], None)
    assert state.journal.recent(1)[0].image is None


def test_threads_may_record_label_and_read_at_once(state) -> None:
    fill(state, 1)
    problems = []

    def guarded(work):
        def run() -> None:
            try:
                for turn in range(15):
                    work(turn)
            except Exception as error:  # noqa: BLE001 - told to the test's own thread
                problems.append(error)

        return threading.Thread(target=run)

    threads = [
        guarded(lambda turn: state.journal.record([sample(f"a{turn}")], {"turn": turn})),
        guarded(lambda turn: state.journal.record([sample(f"b{turn}"), sample(f"c{turn}")], None)),
        guarded(lambda turn: state.journal.feedback("s1", f"label {turn}")),
        guarded(lambda _: state.journal.recent(5)),
        guarded(lambda _: state.journal.prune(10)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(state.journal.p_values()) == 1 + 3 * 15
    assert state.journal.get("s1").true_label == "label 14"
