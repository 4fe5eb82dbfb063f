"""The alarm keeps its budget for small calibration sets, reacts fast, and survives a restart."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.alarm import AlarmState, ShiftTest
from ood.errors import OodError


def _test(n: int = 100, budget: float = 1e6, seed: int = 0, **options: object) -> ShiftTest:
    scores = np.random.default_rng(seed).normal(size=n)
    return ShiftTest(scores, false_alarm_every=budget, **options)


@pytest.mark.parametrize("n", [50, 200])
def test_run_length_without_shift_is_at_least_the_budget(n: int) -> None:
    # Fresh calibration set and stream for every run; runs are cut at ten budgets.
    budget, runs = 100, 120
    rng = np.random.default_rng(n)
    lengths = []
    for _ in range(runs):
        test = ShiftTest(rng.normal(size=n), false_alarm_every=budget)
        _, alarm = test.update(test.initial_state(), rng.normal(size=10 * budget))
        lengths.append(alarm.at if alarm else 10 * budget)
    low = np.mean(lengths) - 1.645 * np.std(lengths) / np.sqrt(runs)
    assert low >= budget


@pytest.mark.parametrize("n", [50, 200])
def test_later_runs_without_shift_are_as_long_as_the_first(n: int) -> None:
    # Calibration sets that mislead once must not do so again and again.
    budget, length, runs = 50, 2000, 100
    rng = np.random.default_rng(n)
    alarms = 0
    for _ in range(runs):
        test = ShiftTest(rng.normal(size=n), false_alarm_every=budget)
        alarms += test.update(test.initial_state(), rng.normal(size=length))[0].alarms
    assert alarms <= runs * length / budget


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 4), st.integers(0, 2)), max_size=60), st.integers(0, 2))
def test_evidence_grows_by_one_in_the_mean_whatever_has_been_seen(stream, class_) -> None:
    # The martingale that the budget rests on, exactly: over where the next sample may fall.
    owner = np.repeat([0, 1, 2], [30, 18, 12])
    test = _test(60, class_of=owner)
    state = test.initial_state()
    if stream:
        state, _ = test.update(state, [score for score, _ in stream], [k for _, k in stream])
    group = test.exceedance.group_of[class_]
    levels = test.exceedance.levels[group]
    place = group * len(levels)
    rates = [1.0, *(k / state.drawn[group] for k in state.above[place : place + len(levels)]), 0.0]
    scores = [levels[0] - 1, *((a + b) / 2 for a, b in pairwise(levels)), levels[-1] + 1]
    mean = sum(
        (high - low) * test.evidence(test.update(state, [score], [class_])[0])
        for (high, low), score in zip(pairwise(rates), scores, strict=True)
        if high > low
    )
    assert mean == pytest.approx(test.evidence(state) + 1)


@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize(("part", "limit"), [(0.8, 25), (0.4, 120)])
def test_a_shift_is_noticed_soon(n: int, part: float, limit: int) -> None:
    rng = np.random.default_rng(n)
    delays = []
    for seed in range(21):
        scores = np.random.default_rng(seed).normal(size=n)
        test = ShiftTest(scores, false_alarm_every=1e6)
        state, alarm = test.update(test.initial_state(), rng.normal(size=100))
        assert alarm is None
        above = rng.random(600) < part
        edge = np.quantile(scores, 0.9)
        shifted = np.where(above, edge + 0.01, edge - 1)
        _, alarm = test.update(state, shifted)
        assert alarm is not None
        delays.append(alarm.at - 100)
    assert np.median(delays) <= limit


def test_one_sample_in_ten_is_noticed_with_fifty_to_calibrate() -> None:
    found = 0
    for seed in range(21):
        rng = np.random.default_rng(seed)
        test = ShiftTest(rng.normal(size=50), false_alarm_every=1e4)
        state, _ = test.update(test.initial_state(), rng.normal(size=200))
        stream = rng.normal(size=1000) + 4 * (rng.random(1000) < 0.1)
        found += test.update(state, stream)[1] is not None
    assert found >= 19


def test_a_slow_drift_adds_up() -> None:
    # Over 20,000 samples by one and a half deviations; no hundred of them differ from the last.
    delays = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        test = ShiftTest(rng.normal(size=200), false_alarm_every=1e6)
        state, alarm = test.update(test.initial_state(), rng.normal(size=1000))
        assert alarm is None
        drift = np.linspace(0, 1.5, 20_000)
        _, alarm = test.update(state, rng.normal(size=20_000) + drift)
        assert alarm is not None
        delays.append(alarm.at - 1000)
    assert np.median(delays) < 8_000


def test_the_onset_is_where_the_shift_began() -> None:
    test = _test(200)
    stream = np.concatenate([np.full(300, -1.0), np.full(50, 9.0)])
    _, alarm = test.update(test.initial_state(), stream)
    assert alarm is not None
    assert alarm.onset == 301
    assert 301 < alarm.at <= 310
    assert alarm.evidence >= test.alarm_at == 1e6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.5, 1.5, 4.0]), min_size=2, max_size=150), st.data())
def test_a_restart_between_any_two_samples_changes_nothing(stream, data) -> None:
    owner = np.arange(60) % 2
    block = data.draw(st.sampled_from([1, 3]))
    watched = data.draw(st.booleans())
    options = {"class_of": owner, "block": block, "prior_changes": watched}
    test = _test(60, budget=50, **options)
    classes = data.draw(
        st.lists(st.integers(0, 3), min_size=len(stream), max_size=len(stream)), label="classes"
    )
    whole, first = test.update(test.initial_state(), stream, classes)
    cut = data.draw(st.integers(1, len(stream) - 1))
    state, before = test.update(test.initial_state(), stream[:cut], classes[:cut])
    # The process dies here: everything is rebuilt from disk.
    state = AlarmState.from_dict(json.loads(json.dumps(state.to_dict())))
    again = _test(60, budget=50, **options)
    state, after = again.update(state, stream[cut:], classes[cut:])
    assert state == whole
    assert (before or after) == first


def test_one_by_one_and_all_at_once_are_the_same_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    test = _test(200, budget=100)
    # Shifted in the middle, so that blocks are cut by alarms.
    stream = rng.normal(size=3000) + np.repeat([0.0, 2.0, 0.0], 1000)
    whole, first = test.update(test.initial_state(), stream)
    state, heard = test.initial_state(), []
    for value in stream:
        state, alarm = test.update(state, [value])
        heard += [] if alarm is None else [alarm]
    assert state == whole
    assert heard[0] == first
    assert len(heard) == whole.alarms > 10


def test_evidence_starts_anew_after_an_alarm_and_all_are_counted() -> None:
    test = _test(200, budget=100)
    state, first = test.update(test.initial_state(), [9.0] * 40)
    assert first is not None
    assert state.alarms > 1
    assert state.seen == 40
    state, again = test.update(state, [9.0] * 10)
    assert again is not None
    assert first.at < again.onset <= again.at <= 50


def test_constant_calibration_scores_notice_what_lies_above_only() -> None:
    test = ShiftTest([1.0] * 80, false_alarm_every=1000)
    assert test.update(test.initial_state(), [1.0] * 2000)[1] is None
    assert test.update(test.initial_state(), [1.1] * 20)[1] is not None


def test_one_calibration_score_keeps_the_budget_by_saying_little() -> None:
    test = ShiftTest([0.0], false_alarm_every=1000)
    assert test.update(test.initial_state(), [1.0] * 20)[1] is None


def test_a_state_of_another_test_is_refused_and_can_be_succeeded() -> None:
    test, other = _test(60), _test(60, seed=1)
    state, _ = test.update(test.initial_state(), [0.0] * 7)
    assert test.accepts(state)
    assert not other.accepts(state)
    with pytest.raises(OodError, match="another calibration"):
        other.update(state, [0.0])
    successor = other.successor(state)
    assert other.update(successor, [0.0])[0].seen == 8
    assert other.evidence(successor) == 0.0


def test_a_state_with_other_bets_starts_anew_and_keeps_its_counts() -> None:
    # As an earlier version wrote it: a bet for each level only.
    test = _test(60)
    state, _ = test.update(test.initial_state(), [0.0] * 7)
    earlier = replace(state, evidence=state.evidence[:18])
    assert not test.accepts(earlier)
    assert test.successor(earlier).seen == 7
    assert test.accepts(test.successor(earlier))


@pytest.mark.parametrize("budget", [0, 1, -5, float("nan"), float("inf"), 1e13])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(OodError, match="false_alarm_every"):
        ShiftTest([1.0, 2.0], false_alarm_every=budget)


@pytest.mark.parametrize("block", [0, -1, 1.5, True])
def test_an_impossible_block_is_refused(block) -> None:
    with pytest.raises(OodError, match="block"):
        ShiftTest([1.0, 2.0], false_alarm_every=100, block=block)


@pytest.mark.parametrize("scores", [[], [np.nan], np.array([np.nan]), [np.inf], [[1.0]], ["a"]])
def test_unusable_scores_are_refused(scores) -> None:
    test = _test()
    with pytest.raises(OodError, match="scores"):
        ShiftTest(scores, false_alarm_every=100)
    with pytest.raises(OodError, match="scores"):
        test.update(test.initial_state(), scores)


@pytest.mark.parametrize(
    "change",
    [
        {"seen": -1},
        {"seen": True},
        {"alarms": 1.5},
        {"test": 3},
        {"evidence": [float("nan")]},
        {"evidence": [-1.0]},
        {"evidence": ["x"]},
        {"evidence": 4},
        {"cusum": [1.0]},
        {"since": None},
        {"since": [99] * 3},
        {"drawn": [101] * 4},
        {"above": [0] * 6},
        {"above": [500] * 6},
        {"drawn": []},
        {"recent": [-1.0]},
        {"extra": 1},
    ],
)
def test_a_damaged_state_is_refused(change) -> None:
    fields = _test().initial_state().to_dict()
    with pytest.raises(OodError, match="alarm state"):
        AlarmState.from_dict(fields | change)
