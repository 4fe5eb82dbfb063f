"""`joint`: all data of all tasks at once, the upper bound the others are held against.

For the benchmark only: it keeps every sample's activations, which no other strategy may. It trains
one adapter on everything when it is asked to predict, so its cost is that of the last training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import StrategyError
from edge_agent.strategies.base import Floats, Task
from edge_agent.strategies.engine import Engine
from edge_agent.strategies.frozen import HeadPredictor
from ood.statistics import ClassStatistics, GaussianHead

_EPOCHS: Final = 12


@dataclass(frozen=True, eq=False)
class Everything:
    """All samples so far, and the adapter trained on them once it was needed."""

    hidden: tuple[NDArray[np.floating[Any]], ...]
    labels: tuple[str, ...]
    seed: int


class Joint:
    """One adapter and one Gaussian head on the samples of all tasks together.

    Attributes:
        final_only: Asked for a prediction after the last task only; training anew after every
            task would say little more and take several times as long.
    """

    name = "joint"
    final_only = True

    def learn(self, engine: Engine, memory: Everything | None, task: Task) -> Everything:
        """Keep the task's samples."""
        del engine
        before = memory or Everything((), (), task.seed)
        return replace(
            before, hidden=(*before.hidden, task.hidden), labels=before.labels + task.labels
        )

    def predictor(self, engine: Engine, memory: Everything) -> HeadPredictor:
        """Train on everything and fit the head in the adapter's space."""
        from edge_agent.objectives import CosineHead  # noqa: PLC0415

        if engine.recipe is None:
            raise StrategyError("joint trains an adapter; give the engine a recipe")
        hidden = np.concatenate(memory.hidden)
        names, targets = np.unique(np.array(memory.labels, dtype=object), return_inverse=True)
        base = engine.network(hidden)
        rows = np.stack([base[targets == k].mean(axis=0) for k in range(len(names))])
        tensors = engine.train(
            hidden,
            targets.astype(np.int64),
            engine.fresh(memory.seed),
            CosineHead(rows.astype(np.float32)),
            replace(engine.recipe, epochs=_EPOCHS, seed=memory.seed),
        )

        def features(rows: Floats) -> Floats:
            return engine.adapted(rows, tensors)

        statistics = ClassStatistics.fit(features(hidden), memory.labels)
        return HeadPredictor(GaussianHead.from_statistics([statistics]), features)

    def stored_bytes(self, memory: Everything) -> int:
        """Every sample's activations."""
        return sum(part.nbytes for part in memory.hidden)
