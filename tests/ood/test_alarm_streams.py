"""The alarm on streams of scenes, and on streams whose class proportions change."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ood.alarm import ShiftTest
from ood.errors import OodError
from ood.proportions import Proportions, upper_bound

_SCENE = 10


def _scenes(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Each score comes ten times, a little changed: frames of a scene."""
    scenes = np.repeat(rng.normal(size=samples // _SCENE), _SCENE)
    return scenes + rng.normal(scale=0.01, size=len(scenes))


def test_a_stream_of_scenes_keeps_the_budget_with_a_block_and_not_without() -> None:
    budget, runs = 200, 60
    rng = np.random.default_rng(0)
    lengths: dict[int, list[int]] = {1: [], _SCENE: []}
    for _ in range(runs):
        calibration, stream = rng.normal(size=100), _scenes(rng, 10 * budget)
        for block, found in lengths.items():
            test = ShiftTest(calibration, false_alarm_every=budget, block=block)
            _, alarm = test.update(test.initial_state(), stream)
            found.append(alarm.at if alarm else 10 * budget)
    low = np.mean(lengths[_SCENE]) - 1.645 * np.std(lengths[_SCENE]) / np.sqrt(runs)
    assert low >= budget
    assert np.mean(lengths[1]) < budget


def test_a_shift_among_scenes_is_noticed_within_a_few_of_them() -> None:
    rng = np.random.default_rng(0)
    test = ShiftTest(rng.normal(size=100), false_alarm_every=10_000, block=_SCENE)
    state, alarm = test.update(test.initial_state(), _scenes(rng, 1000))
    assert alarm is None
    _, alarm = test.update(state, _scenes(rng, 1000) + 5)
    assert alarm is not None
    assert alarm.at - 1000 <= 6 * _SCENE
    assert abs(alarm.onset - 1000) <= _SCENE


def test_samples_that_do_not_count_are_counted_as_seen() -> None:
    test = ShiftTest(np.arange(50.0), false_alarm_every=1000, block=4)
    state = test.initial_state()
    for batch in (3, 1, 2):
        state, _ = test.update(state, [10.0] * batch)
    assert state.seen == 6
    assert state.drawn == (51 + 2,)


def _mixed(rng: np.random.Generator, weights: list[float], samples: int) -> np.ndarray:
    return rng.choice(len(weights), samples, p=weights)


def test_a_change_of_proportions_alarms_where_it_is_asked_for_only() -> None:
    rng = np.random.default_rng(0)
    owner = _mixed(rng, [0.25] * 4, 400)
    calibration = rng.normal(size=400)
    alarms = {}
    for watched in (False, True):
        test = ShiftTest(calibration, false_alarm_every=1e6, class_of=owner, prior_changes=watched)
        classes = _mixed(rng, [0.25] * 4, 2000)
        state, alarm = test.update(test.initial_state(), rng.normal(size=2000), classes)
        assert alarm is None
        more_of_one = _mixed(rng, [0.1, 0.1, 0.7, 0.1], 500)
        _, alarms[watched] = test.update(state, rng.normal(size=500), more_of_one)
    assert alarms[False] is None
    assert alarms[True] is not None
    assert alarms[True].at - 2000 <= 100
    assert abs(alarms[True].onset - 2000) <= 30


def test_watched_proportions_keep_the_budget() -> None:
    budget, runs, weights = 100, 80, [0.5, 0.3, 0.15, 0.05]
    rng = np.random.default_rng(1)
    lengths = []
    for _ in range(runs):
        test = ShiftTest(
            rng.normal(size=50),
            false_alarm_every=budget,
            class_of=_mixed(rng, weights, 50),
            prior_changes=True,
        )
        stream = rng.normal(size=1000), _mixed(rng, weights, 1000)
        _, alarm = test.update(test.initial_state(), *stream)
        lengths.append(alarm.at if alarm else 1000)
    assert np.mean(lengths) - 1.645 * np.std(lengths) / np.sqrt(runs) >= budget


def test_watching_proportions_needs_classes() -> None:
    with pytest.raises(OodError, match="class_of"):
        ShiftTest([1.0, 2.0], false_alarm_every=100, prior_changes=True)


def test_bets_on_proportions_are_no_better_than_fair_within_the_bounds() -> None:
    known = Proportions.fit(np.repeat([0, 1, 2], [60, 30, 10]))
    rng = np.random.default_rng(0)
    recent = list(known.start)
    for _ in range(200):
        fair = sum(
            rate * weight / bound
            for rate, weight, bound in zip([0.6, 0.3, 0.1, 0.0], recent, known.rates, strict=True)
        )
        assert fair <= 1
        known.odds_of_one(int(rng.integers(0, 4)), recent)
        assert sum(recent) == pytest.approx(1)


@pytest.mark.parametrize(("count", "n"), [(0, 50), (5, 50), (50, 200), (10, 1000)])
def test_the_bound_of_a_rate_holds_with_the_promised_confidence(count: int, n: int) -> None:
    bound = upper_bound(count, n, 0.05)
    drawn = np.random.default_rng(count + n).binomial(n, bound, size=4000)
    assert 0.03 < (drawn <= count).mean() < 0.07
    assert upper_bound(n, n, 0.05) == 1


def test_the_state_of_many_classes_stays_small() -> None:
    owner = np.repeat(np.arange(500), 20)
    test = ShiftTest(
        np.random.default_rng(0).normal(size=10_000),
        false_alarm_every=1e6,
        class_of=owner,
        prior_changes=True,
    )
    stream = np.random.default_rng(1).normal(size=5000)
    state, _ = test.update(test.initial_state(), stream, np.arange(5000) % 600)
    assert len(json.dumps(state.to_dict())) <= 32 * 1024
