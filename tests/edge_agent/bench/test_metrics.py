"""The measures, on matrices small enough to work out by hand."""

import pytest

from edge_agent.bench import metrics

CORRECT = [[80], [60, 180], [40, 190, 50]]
SIZES = [100, 200, 100]


def test_the_matrix_has_nothing_for_tasks_not_learned_yet() -> None:
    matrix = metrics.accuracy_matrix(CORRECT, SIZES)
    assert matrix == [[80.0, None, None], [60.0, 90.0, None], [40.0, 95.0, 50.0]]


def test_last_and_average_weigh_every_test_sample_the_same() -> None:
    matrix = metrics.accuracy_matrix(CORRECT, SIZES)
    assert metrics.last(matrix, SIZES) == pytest.approx(70.0)
    assert metrics.average(matrix, SIZES) == pytest.approx((80 + 80 + 70) / 3)


def test_forgetting_counts_from_each_tasks_best_and_leaves_the_last_out() -> None:
    matrix = metrics.accuracy_matrix(CORRECT, SIZES)
    assert metrics.forgetting(matrix) == pytest.approx((40 + 0) / 2)
    assert metrics.forgetting([[75.0]]) == 0.0


def test_what_was_asked_at_the_end_only_has_no_average_and_no_forgetting() -> None:
    matrix = metrics.accuracy_matrix([None, None, [40, 190, 50]], SIZES)
    assert metrics.last(matrix, SIZES) == pytest.approx(70.0)
    assert metrics.average(matrix, SIZES) is None
    assert metrics.forgetting(matrix) is None
    assert metrics.task_spread(matrix) == pytest.approx(23.92, abs=0.01)
