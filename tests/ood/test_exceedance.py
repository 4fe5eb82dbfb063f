"""The law of exceedances is exact for any calibration set, and ties only make it careful."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.alarm import ShiftTest
from ood.errors import OodError
from ood.exceedance import LEVELS, OWN_GROUP, Exceedance


def _odds(known: Exceedance, scores: np.ndarray) -> np.ndarray:
    """The odds of a stream of one group [samples, levels]."""
    above, drawn = list(known.above), list(known.drawn)
    return np.array([known.odds_of_one(score, 0, above, drawn) for score in scores.tolist()])


@pytest.mark.parametrize("n", [5, 50, 200])
def test_bets_are_fair_over_calibration_sets_even_late_in_a_stream(n: int) -> None:
    # With one fixed rate, the odds of sets that mislead would grow and grow.
    rng = np.random.default_rng(n)
    wealth = np.zeros((2000, LEVELS))
    for row in wealth:
        known = Exceedance.fit(rng.normal(size=n), None)
        row[:] = np.prod(1 + 0.07 * (_odds(known, rng.normal(size=60)) - 1), axis=0)
    error = wealth.std(axis=0) / np.sqrt(len(wealth))
    assert (np.abs(wealth.mean(axis=0) - 1) < 4 * error).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.lists(st.integers(0, 8), min_size=1, max_size=40),
    st.integers(0, 2**32 - 1),
)
def test_ties_never_give_more_than_breaking_them_at_random(calibration, stream, seed) -> None:
    rng = np.random.default_rng(seed)
    tied = Exceedance.fit(np.array(calibration, float), None)
    # Adding less than a step breaks ties at random and changes no other order.
    broken = Exceedance.fit(np.array(calibration) + rng.random(len(calibration)) * 0.9, None)
    values = np.array(stream, float)
    other = _odds(broken, values + rng.random(len(stream)) * 0.9)
    assert (_odds(tied, values) <= other).all()


def test_classes_with_enough_samples_have_levels_of_their_own_and_the_others_share() -> None:
    owner = np.repeat([0, 1, 2, 3], [OWN_GROUP, 3 * OWN_GROUP, OWN_GROUP - 1, 1])
    known = Exceedance.fit(np.arange(len(owner), dtype=float), owner)
    assert known.groups(np.array([0, 1, 2, 3, 9])).tolist() == [1, 2, 0, 0, 0]
    assert known.drawn == (OWN_GROUP + 1, OWN_GROUP + 1, 3 * OWN_GROUP + 1)
    assert np.isinf(known.most[LEVELS:]).all()


def test_a_pool_too_small_is_joined_by_the_smallest_class() -> None:
    owner = np.repeat([0, 1, 2], [50, 30, 2])
    known = Exceedance.fit(np.arange(82, dtype=float), owner)
    assert known.groups(np.array([0, 1, 2])).tolist() == [1, 0, 0]
    assert known.drawn == (33, 51)


def test_a_class_without_calibration_samples_is_held_to_the_whole_set() -> None:
    owner = np.repeat([0, 1], [30, 30])
    known = Exceedance.fit(np.arange(60, dtype=float), owner)
    assert known.groups(np.array([7])).tolist() == [0]
    assert known.levels[0][-1] == 59
    assert known.drawn[0] == 61


def _alarms(spread: np.ndarray, weights: list[float], *, aware: bool, shift: float = 0.0) -> int:
    found = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        owner = rng.integers(0, 4, 400)
        calibration = np.abs(rng.normal(size=400)) * spread[owner]
        test = ShiftTest(
            calibration, false_alarm_every=1e6, class_of=owner if aware else np.zeros(400, int)
        )
        classes = rng.choice(4, 2000, p=weights)
        stream = np.abs(rng.normal(size=2000)) * spread[classes] + shift
        _, alarm = test.update(test.initial_state(), stream, classes if aware else classes * 0)
        found += alarm is not None
    return found


def test_a_change_of_proportions_alone_raises_no_alarm() -> None:
    spread = np.array([1.0, 1.0, 1.0, 1.8])
    # Four samples in five, no longer one in four, are of the class that spreads widest.
    weights = [0.2 / 3] * 3 + [0.8]
    assert _alarms(spread, weights, aware=False) >= 7
    assert _alarms(spread, weights, aware=True) == 0
    assert _alarms(spread, weights, aware=True, shift=1.0) == 12


def test_a_shift_of_many_classes_with_few_samples_each_is_noticed_soon() -> None:
    # 12 of 200 calibration samples a class, and scores that differ by class more than they shift.
    delays = []
    for seed in range(11):
        rng = np.random.default_rng(seed)
        owner = np.arange(200) % 16
        test = ShiftTest(rng.normal(size=200) + owner, false_alarm_every=1e4, class_of=owner)
        classes = rng.integers(0, 16, 800)
        stream = rng.normal(size=800) + classes + 1.5 * (np.arange(800) >= 200)
        _, alarm = test.update(test.initial_state(), stream, classes)
        assert alarm is not None
        delays.append(alarm.at - 200)
    assert 0 < np.median(delays) <= 25


@pytest.mark.parametrize("classes", [[1], [-1, 0], [0.5, 1.0], [[0], [1]]])
def test_classes_that_do_not_fit_are_refused(classes) -> None:
    with pytest.raises(OodError, match="class_of"):
        ShiftTest([1.0, 2.0], false_alarm_every=100, class_of=classes)
    test = ShiftTest([1.0, 2.0], false_alarm_every=100, class_of=[0, 0])
    with pytest.raises(OodError, match="class_of"):
        test.update(test.initial_state(), [1.0, 2.0], classes)
    with pytest.raises(OodError, match="class_of"):
        test.update(test.initial_state(), [1.0, 2.0])
