"""`lae`: an online adapter that learns, an offline one that follows slowly, and the surer of both.

After Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning"
(ICCV 2023). One pair of adapters serves all tasks, whatever their family and encoder: memory and
cost of an answer (two passes) do not grow with the tasks. Where the paper adapts a transformer's
blocks 0-4, here are the suffix's sites: the prefix is shared and cannot be adapted.

Where it differs: a head row is the class statistics' linear discriminant plus what training
changed in it, instead of a row trained from random numbers, because rows trained with old classes
masked do not rank old and new classes alike. What was learned of a class is kept; the discriminant
follows the statistics of all. That takes counts, means and one scatter beside the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.heads import LinearHead, discriminant, softmax
from ood.statistics import ClassStatistics, shrunk_covariance

if TYPE_CHECKING:
    from edge_agent.strategies.engine import Engine

_DECAY: Final = 0.9999
_FROZEN_EPOCHS: Final = 3


@dataclass(frozen=True, eq=False)
class LaeMemory:
    """What is kept.

    Attributes:
        online: The adapter that learns.
        offline: Its slow average.
        statistics: All classes', each in the online adapter's space of the time it was learned.
        learned: What training added to the discriminant's rows and biases, in the order of
            ``statistics.labels``.
    """

    online: Mapping[str, Floats]
    offline: Mapping[str, Floats]
    statistics: ClassStatistics
    learned: LinearHead

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label learned so far, sorted."""
        return self.statistics.labels


@dataclass(frozen=True)
class Lae:
    """The published strategy.

    Attributes:
        epochs: Passes over a task's samples.
        batch_size: Samples in a step.
        learning_rate: Of AdamW, along a half cosine.
    """

    epochs: int = 5
    batch_size: int = 48
    learning_rate: float = 2e-3

    name = "lae"

    def learn(self, engine: Engine, memory: LaeMemory | None, task: Task) -> LaeMemory:
        """Train the online adapter on the task's classes; the offline one follows."""
        # Torch is imported where something is trained.
        from edge_agent.objectives import AveragedLocalHead  # noqa: PLC0415
        from edge_agent.trainer_loop import Recipe  # noqa: PLC0415

        initial = engine.fresh(task.seed) if memory is None else dict(memory.online)
        fitted = ClassStatistics.fit(_features(engine, task.hidden, initial), task.labels)
        statistics = fitted if memory is None else memory.statistics.merge(fitted)
        learned = _carried(statistics, memory)
        head = _head(statistics, learned)
        present = np.array([statistics.labels.index(label) for label in fitted.labels])
        targets = np.searchsorted(fitted.labels, task.labels).astype(np.int64)
        objective = AveragedLocalHead(
            head.rows[present],
            head.bias[present],
            {} if memory is None else memory.offline,
            decay=_DECAY,
            frozen_epochs=0 if memory is None else _FROZEN_EPOCHS,
        )
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=task.seed,
            precision=engine.recipe.precision if engine.recipe else "float32",
        )
        online = engine.train(task.hidden, targets, initial, objective, recipe)
        rows, bias = objective.head()
        learned.rows[present] += rows - head.rows[present]
        learned.bias[present] += bias - head.bias[present]
        # What is remembered of the task lies in the space its adapter ended with.
        fitted = ClassStatistics.fit(_features(engine, task.hidden, online), task.labels)
        statistics = fitted if memory is None else memory.statistics.merge(fitted)
        # The first task's average is the adapter itself; it would stay near the start otherwise.
        offline = online if memory is None else objective.offline()
        return LaeMemory(online, offline, statistics, learned)

    def predictor(self, engine: Engine, memory: LaeMemory) -> LaePredictor:
        """Both adapters under one head."""
        return LaePredictor(engine, memory)

    def stored_bytes(self, memory: LaeMemory) -> int:
        """Two adapters, the statistics and the head."""
        adapters = (*memory.online.values(), *memory.offline.values())
        arrays = memory.statistics.to_arrays().values()
        return memory.learned.nbytes + sum(array.nbytes for array in (*adapters, *arrays))


@dataclass(frozen=True, eq=False)
class LaePredictor:
    """The element-wise maximum of both adapters' softmaxes."""

    engine: Engine
    memory: LaeMemory

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label learned so far, sorted."""
        return self.memory.labels

    def predict(self, hidden: Floats) -> Prediction:
        """Answer by the label either adapter is surest of; two passes of the suffix."""
        head = _head(self.memory.statistics, self.memory.learned)
        online, offline = (
            softmax(head.logits(_features(self.engine, hidden, tensors)))
            for tensors in (self.memory.online, self.memory.offline)
        )
        surest = np.maximum(online, offline)
        return Prediction(
            surest / surest.sum(axis=1, keepdims=True),
            np.full(len(hidden), 1.0 + self.engine.suffix_share),
        )


def _carried(statistics: ClassStatistics, memory: LaeMemory | None) -> LinearHead:
    """What was learned of the old classes, zeros for new ones."""
    classes = len(statistics.labels)
    learned = LinearHead(
        np.zeros((classes, statistics.dim), np.float32), np.zeros(classes, np.float32)
    )
    if memory is not None:
        old = np.array([statistics.labels.index(label) for label in memory.labels])
        learned.rows[old], learned.bias[old] = memory.learned.rows, memory.learned.bias
    return learned


def _head(statistics: ClassStatistics, learned: LinearHead) -> LinearHead:
    """The discriminant of all classes and what was learned on top of it."""
    freedom = statistics.samples - len(statistics.labels)
    covariance, _ = shrunk_covariance(statistics.scatter, freedom=freedom)
    start = discriminant(statistics.means, covariance)
    return LinearHead(start.rows + learned.rows, start.bias + learned.bias)


def _features(
    engine: Engine, hidden: NDArray[np.floating[Any]], tensors: Mapping[str, Floats]
) -> Floats:
    return engine.network(engine.features(hidden, tensors))
