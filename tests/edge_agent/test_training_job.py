"""A training job's directory and the split of its samples."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import TrainingDataError
from edge_agent.training_job import (
    PROGRESS,
    TrainingJob,
    read_job,
    read_progress,
    split_samples,
    split_stopping,
    write_job,
)


def job(count: int) -> TrainingJob:
    return TrainingJob(
        device="d",
        encoder="e" * 64,
        encoder_dir="/nowhere",
        rank=2,
        epochs=1,
        batch_size=4,
        learning_rate=0.1,
        momentum=0.1,
        threads=1,
        max_seconds=1.0,
        seed=0,
        created_at=1.5,
        task="t",
        parents=[],
        ids=[str(i) for i in range(count)],
        labels=["ab"[i % 2] for i in range(count)],
        train=[i % 3 > 0 for i in range(count)],
    )


IMAGES = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)


def test_a_job_comes_back_as_written(tmp_path: Path) -> None:
    earlier = {"s/w": np.ones((2, 3), np.float32)}
    write_job(tmp_path / "job", job(6), IMAGES, earlier)
    read, images, means = read_job(tmp_path / "job")
    assert read == job(6)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(means["s/w"], earlier["s/w"])


def test_a_job_that_is_there_is_not_changed(tmp_path: Path) -> None:
    write_job(tmp_path / "job", job(6), IMAGES, {})
    write_job(tmp_path / "job", job(4), IMAGES[:4], {})
    assert read_job(tmp_path / "job")[0] == job(6)


def test_a_half_written_job_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job.tmp").mkdir()
    with pytest.raises(TrainingDataError):
        read_job(tmp_path / "job")
    write_job(tmp_path / "job", job(6), IMAGES, {})
    assert read_job(tmp_path / "job")[0] == job(6)


def test_half_a_line_of_progress_is_passed_over(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == {}
    (tmp_path / PROGRESS).write_bytes(b'{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_progress(tmp_path) == {"epoch": 2}


@given(st.lists(st.sampled_from("abc"), min_size=12, max_size=60), st.randoms())
def test_the_split_is_stratified_and_knows_no_order(labels: list[str], rng: object) -> None:
    ids = [f"id{i}" for i in range(len(labels))]
    try:
        train = split_samples(ids, labels)
    except TrainingDataError:
        counts = [labels.count(label) for label in set(labels)]
        assert len(counts) < 2 or max(counts) < 4
        return
    for label in set(labels):
        members = [t for t, name in zip(train, labels, strict=True) if name == label]
        assert len(members) - sum(members) == int(len(members) * 0.25)
    order = list(range(len(labels)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    shuffled = split_samples([ids[i] for i in order], [labels[i] for i in order])
    assert shuffled == [train[i] for i in order]


@pytest.mark.parametrize("labels", [["a"] * 10, ["a", "b", "c"]])
def test_samples_that_allow_no_training_are_refused(labels: list[str]) -> None:
    with pytest.raises(TrainingDataError):
        split_samples([str(i) for i in range(len(labels))], labels)


def test_a_fifth_of_every_class_says_when_to_stop() -> None:
    ids, labels = [f"id{i}" for i in range(100)], ["ab"[i % 2] for i in range(100)]
    learns = split_stopping(ids, labels)
    assert [labels[i] for i in range(100) if not learns[i]].count("a") == 10
    assert learns.count(False) == 20
    order = list(range(99, -1, -1))
    turned = split_stopping([ids[i] for i in order], [labels[i] for i in order])
    assert turned == [learns[i] for i in order]


@pytest.mark.parametrize(("count", "classes"), [(70, 2), (200, 50)])
def test_where_a_fifth_is_too_little_all_samples_are_learned_from(count: int, classes: int) -> None:
    labels = [str(i % classes) for i in range(count)]
    assert all(split_stopping([f"id{i}" for i in range(count)], labels))
