"""`ridge`: random projection and ridge regression on the frozen network's output.

The training-free core of RanPAC (McDonnell et al., NeurIPS 2023): features pass a fixed random
projection and a ReLU, and one-hot targets are regressed on them. Only sums over samples are kept,
so tasks may arrive in any order. A yardstick: its sums are megabytes, far more than a bundle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.engine import Engine
from ood.projection import gaussian_matrix

_WIDTH: Final = 2048
_PENALTIES: Final = (0.01, 0.1, 1.0, 10.0, 100.0)
_HELD_OUT: Final = 0.2
# Regression scores are no logits; this makes their softmax about as sure as they are right.
_SHARPNESS: Final = 10.0


@dataclass(frozen=True, eq=False)
class Sums:
    """Everything the regression needs of the samples.

    Attributes:
        labels: Label names, sorted.
        gram: float64 [m, m], the sum of h hᵀ over projected features h.
        targets: float64 [m, labels], the sum of h over the samples of each label.
        penalty: The ridge penalty that suited the newest task's held-out samples.
    """

    labels: tuple[str, ...]
    gram: NDArray[np.float64]
    targets: NDArray[np.float64]
    penalty: float


@dataclass(frozen=True, eq=False)
class RidgePredictor:
    """Solved weights."""

    engine: Engine
    labels: tuple[str, ...]
    weights: NDArray[np.float64]

    def predict(self, hidden: Floats) -> Prediction:
        """Answer by the largest regressed target."""
        scores = _SHARPNESS * (_projected(self.engine, hidden) @ self.weights)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return Prediction(odds / odds.sum(axis=1, keepdims=True), np.ones(len(hidden)))


class Ridge:
    """Random-projection ridge regression."""

    name = "ridge"
    trains = False

    def learn(self, engine: Engine, memory: Sums | None, task: Task) -> Sums:
        """Add the task's sums; choose the penalty on a fifth of it, as RanPAC does."""
        rows = _projected(engine, task.hidden)
        names = sorted({*(memory.labels if memory else ()), *task.labels})
        position = {name: index for index, name in enumerate(names)}
        index = np.array([position[label] for label in task.labels])
        one_hot = np.eye(len(names))[index]
        gram = np.zeros((_WIDTH, _WIDTH)) if memory is None else memory.gram
        targets = np.zeros((_WIDTH, len(names)))
        if memory is not None:
            targets[:, [position[name] for name in memory.labels]] = memory.targets
        held = np.random.default_rng(task.seed).random(len(rows)) < _HELD_OUT
        penalty = memory.penalty if memory is not None else 1.0
        if held.any() and not held.all():
            fitted_gram = gram + rows[~held].T @ rows[~held]
            fitted = targets + rows[~held].T @ one_hot[~held]
            errors = [
                np.square(rows[held] @ _solved(fitted_gram, fitted, p) - one_hot[held]).mean()
                for p in _PENALTIES
            ]
            penalty = _PENALTIES[int(np.argmin(errors))]
        return Sums(tuple(names), gram + rows.T @ rows, targets + rows.T @ one_hot, penalty)

    def predictor(self, engine: Engine, memory: Sums) -> RidgePredictor:
        """Solve the regression."""
        weights = _solved(memory.gram, memory.targets, memory.penalty)
        return RidgePredictor(engine, memory.labels, weights)

    def stored_bytes(self, memory: Sums) -> int:
        """The sums in float32, the symmetric one by its triangle."""
        return 4 * (_WIDTH * (_WIDTH + 1) // 2 + memory.targets.size)


@lru_cache(maxsize=1)
def _projection(rows: int, columns: int, digest: str) -> NDArray[np.float64]:
    return gaussian_matrix(rows, columns, seed=digest, purpose="ridge")


def _projected(engine: Engine, hidden: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    features = engine.network(hidden).astype(np.float64)
    matrix = _projection(features.shape[1], _WIDTH, engine.package.digest)
    return np.maximum(features @ matrix, 0.0).astype(np.float64)


def _solved(
    gram: NDArray[np.float64], targets: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), targets).astype(np.float64)
