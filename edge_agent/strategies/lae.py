"""`lae`: an online adapter that learns, an offline one that follows slowly, and the surer of both.

After Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning"
(ICCV 2023). One pair of adapters serves all tasks, whatever their family and encoder: memory and
cost of an answer (two passes) do not grow with the tasks. Where the paper adapts a transformer's
blocks 0-4, here are the suffix's sites: the prefix is shared and cannot be adapted.

Where it differs: the head that an adapter is trained with knows the task's classes only, and is
thrown away. Answers come from class statistics, kept in the space of each adapter. Rows trained
with old classes masked do not rank old and new classes alike, and rows of an old class look into a
space that the adapter has left; statistics can be carried over into the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.heads import carry_over
from ood.statistics import ClassStatistics, GaussianHead

if TYPE_CHECKING:
    from edge_agent.strategies.engine import Engine

_DECAY: Final = 0.9999
_FROZEN_EPOCHS: Final = 3


@dataclass(frozen=True, eq=False)
class LaeSide:
    """One of the two adapters.

    Attributes:
        tensors: The adapter.
        statistics: All classes', in its space as it is now.
    """

    tensors: Mapping[str, Floats]
    statistics: ClassStatistics


@dataclass(frozen=True, eq=False)
class LaeMemory:
    """What is kept: the adapter that learns, and its slow average."""

    online: LaeSide
    offline: LaeSide


@dataclass(frozen=True)
class Lae:
    """The published strategy.

    Attributes:
        epochs: Passes over a task's samples.
        batch_size: Samples in a step.
        learning_rate: Of AdamW, along a half cosine.
    """

    epochs: int = 10
    batch_size: int = 48
    learning_rate: float = 3e-3

    name = "lae"

    def learn(self, engine: Engine, memory: LaeMemory | None, task: Task) -> LaeMemory:
        """Train the online adapter on the task's classes; the offline one follows."""
        # Torch is imported where something is trained.
        from edge_agent.objectives import AveragedHead  # noqa: PLC0415
        from edge_agent.trainer_loop import Recipe  # noqa: PLC0415

        initial = engine.fresh(task.seed) if memory is None else dict(memory.online.tensors)
        before = _features(engine, task.hidden, initial)
        names, targets = np.unique(np.array(task.labels, dtype=object), return_inverse=True)
        objective = AveragedHead(
            np.stack([before[targets == k].mean(axis=0) for k in range(len(names))]),
            {} if memory is None else memory.offline.tensors,
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
        trained = engine.train(task.hidden, targets.astype(np.int64), initial, objective, recipe)
        if memory is None:
            # The first task's average is the adapter itself: it would stay near the start.
            side = _moved_on(engine, None, trained, task, before)
            return LaeMemory(side, side)
        return LaeMemory(
            _moved_on(engine, memory.online, trained, task, before),
            _moved_on(engine, memory.offline, objective.offline(), task),
        )

    def predictor(self, engine: Engine, memory: LaeMemory) -> LaePredictor:
        """Both adapters, each with the head of its statistics."""
        heads = [
            GaussianHead.from_statistics([side.statistics])
            for side in (memory.online, memory.offline)
        ]
        return LaePredictor(engine, memory, (heads[0], heads[1]))

    def stored_bytes(self, memory: LaeMemory) -> int:
        """Two adapters and the statistics of each."""
        return sum(
            array.nbytes
            for side in (memory.online, memory.offline)
            for array in (*side.tensors.values(), *side.statistics.to_arrays().values())
        )


@dataclass(frozen=True, eq=False)
class LaePredictor:
    """The element-wise maximum of both adapters' softmaxes."""

    engine: Engine
    memory: LaeMemory
    heads: tuple[GaussianHead, GaussianHead]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label learned so far, sorted."""
        return self.heads[0].labels

    def predict(self, hidden: Floats) -> Prediction:
        """Answer by the label either adapter is surest of; two passes of the suffix."""
        sides = (self.memory.online, self.memory.offline)
        online, offline = (
            head.label_probabilities(
                head.log_likelihoods(_features(self.engine, hidden, side.tensors))
            )
            for head, side in zip(self.heads, sides, strict=True)
        )
        surest = np.maximum(online, offline)
        return Prediction(
            surest / surest.sum(axis=1, keepdims=True),
            np.full(len(hidden), 1.0 + self.engine.suffix_share),
        )


def _moved_on(
    engine: Engine,
    side: LaeSide | None,
    tensors: Mapping[str, Floats],
    task: Task,
    before: Floats | None = None,
) -> LaeSide:
    """An adapter after a task, with the statistics of all classes in its space.

    Args:
        engine: Runs the suffix.
        side: The adapter before the task and its classes; None when there were none.
        tensors: The adapter after it.
        task: The samples, which show where the old classes have gone.
        before: Their features before the task, where they are known already.
    """
    after = _features(engine, task.hidden, tensors)
    fitted = ClassStatistics.fit(after, task.labels)
    if side is None:
        return LaeSide(tensors, fitted)
    if before is None:
        before = _features(engine, task.hidden, side.tensors)
    return LaeSide(tensors, carry_over(side.statistics, before, after).merge(fitted))


def _features(
    engine: Engine, hidden: NDArray[np.floating[Any]], tensors: Mapping[str, Floats]
) -> Floats:
    return engine.network(hidden, tensors)
