"""The measures of continual learning, as its literature defines them; all accuracies in percent.

The worker fills in what it counted and timed; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Matrix = list[list[float | None]]


def accuracy_matrix(correct: Sequence[Sequence[int] | None], sizes: Sequence[int]) -> Matrix:
    """Accuracy a[t][j] after task t on the test samples of task j, in percent; None for j > t.

    Args:
        correct: For each task t the right answers on the tests of tasks 0 to t; None for a task
            after which nothing was asked.
        sizes: Test samples of each task.
    """
    return [
        [
            100.0 * row[j] / sizes[j] if row is not None and j < len(row) else None
            for j in range(len(sizes))
        ]
        for row in correct
    ]


def seen_accuracies(matrix: Matrix, sizes: Sequence[int]) -> list[float | None]:
    """Accuracy after each task on all test samples of the tasks so far, in percent.

    Example:
        >>> seen_accuracies([[80.0, None], [60.0, 90.0]], [100, 200])
        [80.0, 80.0]
    """
    accuracies: list[float | None] = []
    for t, row in enumerate(matrix):
        known = [value for value in row[: t + 1] if value is not None]
        weights = np.asarray(sizes[: t + 1], dtype=np.float64)
        told = float(np.dot(known, weights) / weights.sum()) if len(known) == t + 1 else None
        accuracies.append(told)
    return accuracies


def last(matrix: Matrix, sizes: Sequence[int]) -> float:
    """Accuracy on all test samples after the last task, in percent."""
    value = seen_accuracies(matrix, sizes)[-1]
    assert value is not None, "the last task is always tested"
    return value


def average(matrix: Matrix, sizes: Sequence[int]) -> float | None:
    """Mean over tasks of the accuracy on everything seen; None if it was not asked after each."""
    known = [value for value in seen_accuracies(matrix, sizes) if value is not None]
    return float(np.mean(known)) if len(known) == len(matrix) else None


def forgetting(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of max over t of a[t][j] - a[T][j], in points (as PILOT).

    Example:
        >>> forgetting([[80.0, None, None], [70.0, 90.0, None], [60.0, 91.0, 50.0]])
        10.0
    """
    drops = []
    for j in range(len(matrix) - 1):
        column = [row[j] for row in matrix[j:]]
        known = [value for value in column if value is not None]
        if len(known) < len(column):
            return None
        drops.append(max(known) - known[-1])
    return float(np.mean(drops)) if drops else 0.0


def task_spread(matrix: Matrix) -> float:
    """Standard deviation over tasks of the accuracy after the last one, in points."""
    return float(np.std([value for value in matrix[-1] if value is not None]))
