"""Laws of streams, whatever the settings, and what each setting does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from edge_agent.bench.datasets import Column
from edge_agent.bench.streams import StreamSettings, StreamTask, build
from edge_agent.errors import BenchmarkError

CLASSES, DOMAINS, EACH = 6, 3, 20


def column(values: np.ndarray, prefix: str) -> Column:
    count = int(values.max()) + 1
    return Column(values.astype(np.int64), tuple(f"{prefix}{k}" for k in range(count)))


CLASS = column(np.repeat(np.arange(CLASSES), DOMAINS * EACH), "c")
DOMAIN = column(np.tile(np.repeat(np.arange(DOMAINS), EACH), CLASSES), "d")
OWN_TEST = np.random.default_rng(0).random(len(CLASS.index)) < 0.25

any_settings = st.builds(
    StreamSettings,
    kind=st.sampled_from(["class", "domain", "mixed"]),
    init=st.integers(1, CLASSES),
    increment=st.integers(1, CLASSES),
    order_seed=st.integers(0, 2**32 - 1),
    shots=st.none() | st.integers(1, 12),
    imbalance=st.floats(1, 20),
    blurry=st.floats(0, 0.5),
    revisit=st.floats(0, 0.4),
    label_noise=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
own_test = st.sampled_from([None, OWN_TEST])


def built(chosen: StreamSettings, test: np.ndarray | None) -> tuple[StreamTask, ...]:
    """The stream, unless so few samples were moved about so much that a task has none left."""
    try:
        return build(CLASS, test, DOMAIN, chosen)
    except BenchmarkError:
        reject()


@settings(max_examples=60, deadline=None)
@given(any_settings, own_test)
def test_a_sample_is_learned_once_at_most_and_never_when_it_tests(
    chosen: StreamSettings, test: np.ndarray | None
) -> None:
    tasks = built(chosen, test)
    learned = np.concatenate([task.train for task in tasks])
    tested = np.concatenate([task.test for task in tasks])
    assert len(set(learned)) == len(learned)
    assert len(set(tested)) == len(tested)
    assert not set(learned) & set(tested)
    if test is not None:
        assert set(tested) == set(np.flatnonzero(test))


@settings(max_examples=30, deadline=None)
@given(any_settings, own_test)
def test_the_same_seed_gives_the_same_stream(
    chosen: StreamSettings, test: np.ndarray | None
) -> None:
    for one, two in zip(built(chosen, test), built(chosen, test), strict=True):
        assert np.array_equal(one.train, two.train)
        assert np.array_equal(one.labels, two.labels)
        assert np.array_equal(one.test, two.test)


@settings(max_examples=30, deadline=None)
@given(any_settings)
def test_every_class_and_domain_is_tested_however_the_training_is_thinned(
    chosen: StreamSettings,
) -> None:
    tasks = build(CLASS, None, DOMAIN, chosen)
    tested = np.concatenate([task.test for task in tasks])
    assert set(CLASS.index[tested]) == set(range(CLASSES))
    assert set(DOMAIN.index[tested]) == set(range(DOMAINS))
    assert len(tested) == pytest.approx(0.2 * len(CLASS.index), rel=0.1)


def test_the_class_order_is_numpys_permutation_of_the_seed() -> None:
    index = np.tile(np.arange(100), 6)
    classes = column(index, "c")
    tasks = build(classes, None, None, StreamSettings(init=10, increment=10, order_seed=1993))
    order = np.random.RandomState(1993).permutation(100)
    for number, task in enumerate(tasks):
        assert set(index[task.train]) == set(order[10 * number : 10 * number + 10])


def test_the_first_task_may_be_larger_and_the_last_smaller() -> None:
    tasks = build(CLASS, None, None, StreamSettings(init=3, increment=2))
    assert [len(set(CLASS.index[task.train])) for task in tasks] == [3, 2, 1]


def test_domains_come_in_the_order_given() -> None:
    chosen = StreamSettings(kind="domain", domain_order=("d2", "d0", "d1"))
    tasks = build(CLASS, None, DOMAIN, chosen)
    assert [task.name for task in tasks] == ["d2", "d0", "d1"]
    assert [set(DOMAIN.index[task.train]) for task in tasks] == [{2}, {0}, {1}]
    assert all(set(CLASS.index[task.train]) == set(range(CLASSES)) for task in tasks)


def test_in_a_mixed_stream_new_classes_and_new_domains_arrive_together() -> None:
    tasks = build(CLASS, None, DOMAIN, StreamSettings(kind="mixed", init=2, increment=2))
    cells = [set(zip(CLASS.index[t.train], DOMAIN.index[t.train], strict=True)) for t in tasks]
    assert len(tasks) == 5  # three groups of classes, three domains
    assert sum(map(len, cells)) == len(set().union(*cells)) == CLASSES * DOMAINS
    both = cells[1]
    assert len({k for k, _ in both} - {k for k, _ in cells[0]}) == 2
    assert len({d for _, d in both} - {d for _, d in cells[0]}) == 1


def test_shots_bound_every_class_of_every_task() -> None:
    for kind in ("class", "domain"):
        tasks = build(CLASS, None, DOMAIN, StreamSettings(kind=kind, init=2, increment=2, shots=5))
        for task in tasks:
            counts = np.bincount(CLASS.index[task.train])
            assert set(counts[counts > 0]) == {5}


def test_imbalance_is_the_ratio_of_the_first_class_to_the_last() -> None:
    tasks = build(CLASS, None, None, StreamSettings(init=1, increment=1, imbalance=8))
    counts = [len(task.train) for task in tasks]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(8, rel=0.05)


def test_blurred_samples_come_anywhere_else_and_revisits_only_later() -> None:
    plain = StreamSettings(init=2, increment=2)
    order = np.random.RandomState(plain.order_seed).permutation(CLASSES)
    home = {int(k): place // 2 for place, k in enumerate(order)}
    blurred = build(CLASS, None, None, replace(plain, blurry=0.3))
    away = [
        home[int(k)] - number
        for number, task in enumerate(blurred)
        for k in CLASS.index[task.train]
    ]
    assert np.mean(np.array(away) != 0) == pytest.approx(0.3, abs=0.01)
    assert min(away) < 0 < max(away)
    revisited = build(CLASS, None, None, replace(plain, revisit=0.3))
    for number, task in enumerate(revisited):
        assert all(home[int(k)] <= number for k in CLASS.index[task.train])
    assert any(home[int(k)] < 2 for k in CLASS.index[revisited[2].train])


def test_label_noise_is_the_share_of_wrong_labels_and_leaves_the_tests_alone() -> None:
    chosen = StreamSettings(init=3, increment=3, label_noise=0.2)
    for task, clean in zip(
        build(CLASS, None, None, chosen),
        build(CLASS, None, None, replace(chosen, label_noise=0.0)),
        strict=True,
    ):
        wrong = task.labels != CLASS.index[task.train]
        assert wrong.mean() == pytest.approx(0.2, abs=0.01)
        assert set(task.labels) <= set(CLASS.index[task.train])
        assert np.array_equal(task.test, clean.test)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (StreamSettings(init=9), "init is 9, but there are 6 classes"),
        (StreamSettings(init=2, blurry=1.0), "blurry is 1.0, expected 0 to below 1"),
        (StreamSettings(init=2, shots=0), "shots is 0, expected at least 1"),
        (StreamSettings(kind="domain", domain_order=("d0", "x")), "the set's domains are d0, d1"),
    ],
)
def test_settings_that_make_no_stream_are_refused(chosen: StreamSettings, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        build(CLASS, None, DOMAIN, chosen)


def test_a_task_without_a_test_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="0 to test"):
        build(column(np.arange(4), "c"), None, None, StreamSettings(init=2, increment=2))


def test_a_domain_stream_needs_domains() -> None:
    with pytest.raises(BenchmarkError, match="--domain-key"):
        build(CLASS, None, None, StreamSettings(kind="domain"))
