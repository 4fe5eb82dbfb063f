"""The alarm keeps its budget for small calibration sets, reacts fast, and survives a restart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.alarm import CONFIDENCE_SPENT, AlarmState, ShiftTest, exceedance_bound
from ood.errors import OodError


def _test(n: int = 100, budget: float = 1e6, seed: int = 0, **options: object) -> ShiftTest:
    scores = np.random.default_rng(seed).normal(size=n)
    return ShiftTest(scores, false_alarm_every=budget, **options)


@pytest.mark.parametrize(("above", "n"), [(0, 50), (5, 50), (50, 200), (10, 1000)])
def test_the_bound_holds_with_the_promised_confidence(above: int, n: int) -> None:
    rng = np.random.default_rng(above + n)
    risk = 0.05
    # For uniform scores the rate above the threshold is one minus the threshold.
    rates = 1 - np.sort(rng.random((4000, n)), axis=1)[:, n - 1 - above]
    missed = (rates > exceedance_bound(above, n, risk)).mean()
    assert 0.03 < missed < 0.07


@pytest.mark.parametrize("n", [1, 2, 10, 50, 200])
def test_every_bet_is_fair_at_the_bound(n: int) -> None:
    test = _test(n)
    expected = test.rates * test.gains_above + (1 - test.rates) * test.gains_below
    assert np.allclose(expected, 1.0)
    assert (test.gains_above >= 1).all()


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


@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize(("part", "limit"), [(0.8, 25), (0.4, 400)])
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


def test_the_onset_is_where_the_shift_began() -> None:
    test = _test(200)
    stream = np.concatenate([np.full(300, -1.0), np.full(50, 9.0)])
    _, alarm = test.update(test.initial_state(), stream)
    assert alarm is not None
    assert alarm.onset == 301
    assert 301 < alarm.at <= 310
    assert alarm.evidence >= test.alarm_at == pytest.approx(1e6 / (1 - CONFIDENCE_SPENT))


def test_knowing_the_classes_most_changes_of_their_proportions_raise_no_alarm() -> None:
    spread = np.array([1.0, 1.0, 1.0, 1.6])
    alarms = {"plain": 0, "aware": 0, "shifted": 0}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        owner = rng.integers(0, 4, 400)
        calibration = np.abs(rng.normal(size=400)) * spread[owner]
        # Four samples in five, no longer one in four, are of the class that spreads widest.
        stream = np.abs(rng.normal(size=2000)) * np.where(rng.random(2000) < 0.8, 1.6, 1.0)
        plain = ShiftTest(calibration, false_alarm_every=1e6)
        aware = ShiftTest(calibration, false_alarm_every=1e6, class_of=owner)
        assert (aware.rates >= plain.rates).all()
        for name, test, scores in (
            ("plain", plain, stream),
            ("aware", aware, stream),
            ("shifted", aware, stream[:100] + 3),
        ):
            alarms[name] += test.update(test.initial_state(), scores)[1] is not None
    assert alarms["plain"] >= 9
    assert alarms["aware"] <= alarms["plain"] / 2
    assert alarms["shifted"] == 12


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, 0.5, 1.5, 4.0]), min_size=2, max_size=40),
    st.data(),
)
def test_a_restart_between_any_two_samples_changes_nothing(stream, data) -> None:
    test = _test(60, budget=50)
    whole, first = test.update(test.initial_state(), stream)
    cut = data.draw(st.integers(1, len(stream) - 1))
    state, before = test.update(test.initial_state(), stream[:cut])
    # The process dies here: everything is rebuilt from disk.
    state = AlarmState.from_dict(json.loads(json.dumps(state.to_dict())))
    state, after = _test(60, budget=50).update(state, stream[cut:])
    assert state == whole
    assert (before or after) == first


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


@pytest.mark.parametrize("budget", [0, 1, -5, float("nan"), float("inf"), 1e13])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(OodError, match="false_alarm_every"):
        ShiftTest([1.0, 2.0], false_alarm_every=budget)


@pytest.mark.parametrize("scores", [[], [np.nan], [[1.0]]])
def test_unusable_scores_are_refused(scores) -> None:
    test = _test()
    with pytest.raises(OodError):
        ShiftTest(scores, false_alarm_every=100)
    with pytest.raises(OodError):
        test.update(test.initial_state(), scores)
    with pytest.raises(OodError, match="class_of"):
        ShiftTest([1.0, 2.0], false_alarm_every=100, class_of=[1])


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
        {"since": [99] * 20},
        {"extra": 1},
    ],
)
def test_a_damaged_state_is_refused(change) -> None:
    fields = _test().initial_state().to_dict()
    with pytest.raises(OodError, match="alarm state"):
        AlarmState.from_dict(fields | change)
