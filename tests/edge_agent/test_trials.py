"""The tests a candidate must pass before it is installed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.trials import (
    Answers,
    balanced_calibration,
    does_not_hurt,
    earns_its_place,
    sign_test,
    try_out,
    validate,
)

NOTHING = Answers((), (), ())


def answers(truth: str, current: str, candidate: str) -> Answers:
    return Answers(tuple(truth), tuple(current), tuple(candidate))


KEPT = answers("a" * 40, "a" * 40, "a" * 39 + "b")
FORGOTTEN = answers("a" * 40, "a" * 40, "a" * 30 + "b" * 10)
NEW_CLASSES = answers("c" * 20, "a" * 20, "c" * 15 + "a" * 5)


def test_classes_the_running_generation_cannot_know_count_as_gains() -> None:
    verdict = validate(NEW_CLASSES, KEPT)
    assert verdict.accepted
    assert "0.00 -> 0.75 on 20" in verdict.reason


def test_an_improvement_that_could_be_chance_is_not_enough() -> None:
    verdict = validate(answers("a" * 20, "a" * 16 + "b" * 4, "a" * 17 + "b" * 3), KEPT)
    assert not verdict.accepted


def test_forgetting_what_was_known_is_refused_however_good_the_rest_is() -> None:
    verdict = validate(NEW_CLASSES, FORGOTTEN)
    assert not verdict.accepted
    assert verdict.reason.startswith("forgets")
    assert not try_out(0.95, 40, NEW_CLASSES, FORGOTTEN).accepted


def test_a_trial_without_labels_goes_by_the_fit() -> None:
    assert try_out(0.9, 40, NOTHING, NOTHING).accepted
    assert not try_out(0.3, 40, NOTHING, NOTHING).accepted


def test_a_trial_with_labels_must_answer_them_better() -> None:
    assert try_out(0.9, 40, NEW_CLASSES, KEPT).accepted
    same = answers("a" * 20, "a" * 20, "a" * 20)
    assert not try_out(0.9, 40, same, KEPT).accepted


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_a_tail_of_a_fair_coin(gains: int, losses: int) -> None:
    p_value = sign_test(gains, losses)
    assert 0.0 < p_value <= 1.0
    mirrored = sign_test(losses, gains)
    assert p_value + mirrored >= 1.0
    assert (p_value <= mirrored) == (gains >= losses)


@given(st.integers(1, 700), st.integers(0, 700))
def test_calibration_is_balanced_and_bounded(old: int, new: int) -> None:
    features = balanced_calibration(np.zeros((old, 2)), np.ones((new, 2)))
    ones = int(features.sum()) // 2
    zeros = len(features) - ones
    assert len(features) <= 512
    assert ones == min(new, 256)
    assert zeros == min(old, max(ones, 64))
    assert features.dtype == np.float16


def test_a_change_without_labels_may_answer_neither_the_few_labels_nor_what_was_known_worse() -> (
    None
):
    better, worse = answers("ab", "xb", "ab"), answers("ab", "ab", "xb")
    assert does_not_hurt(NOTHING, NOTHING).accepted
    assert does_not_hurt(better, KEPT).accepted
    assert "answers worse" in does_not_hurt(worse, KEPT).reason
    assert "forgets" in does_not_hurt(better, FORGOTTEN).reason


@pytest.mark.parametrize("count", [0, 19])
def test_too_few_earlier_samples_do_not_stand_in_the_way(count: int) -> None:
    before = Answers(("a",) * count, ("a",) * count, ("b",) * count)
    assert validate(NEW_CLASSES, before).accepted


@pytest.mark.parametrize(("gains", "losses", "kept"), [(4, 0, False), (5, 0, True), (9, 4, False)])
def test_an_adapter_must_be_significantly_better_than_the_statistics(
    gains: int, losses: int, kept: bool
) -> None:
    alone = "b" * gains + "a" * losses + "a" * 20
    adapted = "a" * gains + "b" * losses + "a" * 20
    verdict = earns_its_place(answers("a" * len(alone), alone, adapted))
    assert verdict.accepted is kept
    assert verdict.metrics["adapter_p_value"] == sign_test(gains, losses)
    assert (verdict.metrics["adapter_gains"], verdict.metrics["adapter_losses"]) == (gains, losses)
