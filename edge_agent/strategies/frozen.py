"""`frozen`: no adapter at all; a Gaussian head from class statistics of the network's output.

The yardstick of the others: it cannot forget, costs one pass, and needs no training. A task's
statistics merge exactly into what is known, so the order of the tasks does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.engine import Engine
from ood.statistics import ClassStatistics, GaussianHead


@dataclass(frozen=True)
class HeadPredictor:
    """A Gaussian head over features that one encoder pass gives."""

    head: GaussianHead
    features: Callable[[Floats], Floats]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the head."""
        return self.head.labels

    def predict(self, hidden: Floats) -> Prediction:
        """Answer by the class whose Gaussian explains the features best."""
        likelihoods = self.head.log_likelihoods(self.features(hidden))
        return Prediction(self.head.label_probabilities(likelihoods), np.ones(len(hidden)))


class Frozen:
    """The shared-covariance Gaussian head on the frozen network's own output."""

    name = "frozen"
    trains = False

    def learn(self, engine: Engine, memory: ClassStatistics | None, task: Task) -> ClassStatistics:
        """Merge the task's statistics into what is known."""
        features = engine.network(task.hidden)
        fresh = ClassStatistics.fit(features, task.labels)
        return fresh if memory is None else memory.merge(fresh)

    def predictor(self, engine: Engine, memory: ClassStatistics) -> HeadPredictor:
        """The head of all classes."""
        return HeadPredictor(GaussianHead.from_statistics([memory]), engine.network)

    def stored_bytes(self, memory: ClassStatistics) -> int:
        """The statistics as they travel."""
        return sum(array.nbytes for array in memory.to_arrays().values())
