"""`mos`: an adapter a task, one aligned head, and self-refined retrieval of the adapter.

After Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning"
(AAAI 2025): momentum merge with the earlier adapters, classifier alignment by class Gaussians,
retrieval without training, and an ensemble with the first session's adapter. Parts that other
strategies use too are in `refinement` and `heads`.

A task's label is a component of its own, owned by the task's adapter, also when an earlier task
knows the label: more examples of an old class and a class seen in another domain are both another
component, and a label's score is that of its best one. Statistics never mix two adapters' spaces.

Where it differs from the published code: the classes of a task share one covariance (the paper
keeps one a class); only the suffix's sites are adapted; and AdamW trains, because plain gradient
descent at the published 0.03 leaves an adapter of so few steps where it started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.router import Components
from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.heads import (
    FloatArray,
    IntArray,
    LinearHead,
    align,
    label_scores,
    softmax,
)
from edge_agent.strategies.refinement import refine_lazy
from ood.statistics import ClassStatistics, l2_normalise

if TYPE_CHECKING:
    from edge_agent.strategies.engine import Engine

_MOMENTUM: Final = 0.1


@dataclass(frozen=True, eq=False)
class MosTask:
    """What is kept of a task.

    Attributes:
        tensors: Its adapter.
        own: Its classes' statistics in its adapter's space.
        prototypes: float32 [c, d], its classes' means in the first adapter's space, in the order
            of ``own.labels``.
    """

    tensors: Mapping[str, Floats]
    own: ClassStatistics
    prototypes: Floats


@dataclass(frozen=True, eq=False)
class MosMemory:
    """All tasks so far and the head over their components, task by task."""

    tasks: tuple[MosTask, ...]
    head: LinearHead


@dataclass(frozen=True)
class Mos:
    """The published strategy.

    Attributes:
        epochs: Passes over a task's samples.
        batch_size: Samples in a step, as published.
        learning_rate: Of AdamW, along a half cosine.
    """

    epochs: int = 10
    batch_size: int = 48
    learning_rate: float = 0.005

    name = "mos"

    def learn(self, engine: Engine, memory: MosMemory | None, task: Task) -> MosMemory:
        """Train the task's adapter, keep its statistics, align the head anew."""
        earlier = () if memory is None else memory.tasks
        tensors = self._train(engine, earlier, task)
        features = _features(engine, task.hidden, tensors)
        own = ClassStatistics.fit(features, task.labels)
        if earlier:
            first = ClassStatistics.fit(
                _features(engine, task.hidden, earlier[0].tensors), task.labels
            )
        else:
            first = own
        prototypes = l2_normalise(first.means)
        tasks = (*earlier, MosTask(tensors, own, prototypes))
        return MosMemory(tasks, align([each.own for each in tasks], task.seed))

    def predictor(self, engine: Engine, memory: MosMemory) -> MosPredictor:
        """Retrieval over the stored adapters."""
        return MosPredictor(engine, memory)

    def stored_bytes(self, memory: MosMemory) -> int:
        """Adapters, statistics (a covariance a task), prototypes and the head."""
        size = memory.head.nbytes
        for task in memory.tasks:
            size += sum(tensor.nbytes for tensor in task.tensors.values())
            size += sum(array.nbytes for array in task.own.to_arrays().values())
            size += task.prototypes.nbytes
        return size

    def _train(self, engine: Engine, earlier: tuple[MosTask, ...], task: Task) -> dict[str, Floats]:
        # Torch is imported where something is trained.
        from edge_agent.objectives import ContrastiveHead  # noqa: PLC0415
        from edge_agent.trainer_loop import Recipe  # noqa: PLC0415

        mean: dict[str, Floats] = {
            name: np.stack([each.tensors[name] for each in earlier]).mean(axis=0)
            for name in (earlier[0].tensors if earlier else ())
        }
        initial = mean or engine.fresh(task.seed)
        names, targets = np.unique(task.labels, return_inverse=True)
        start = _features(engine, task.hidden, initial)
        head = np.stack([start[targets == k].mean(axis=0) for k in range(len(names))])
        known = [each.own.means for each in earlier]
        means = l2_normalise(np.concatenate(known)) if known else np.empty_like(head[:0])
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=task.seed,
            precision=engine.recipe.precision if engine.recipe else "float32",
        )
        objective = ContrastiveHead(head, means, momentum=_MOMENTUM, earlier=mean)
        return engine.train(task.hidden, targets.astype(np.int64), initial, objective, recipe)


class MosPredictor:
    """First guess, refinement, ensemble.

    Attributes:
        labels: Every label learned so far, sorted.
    """

    def __init__(self, engine: Engine, memory: MosMemory) -> None:
        components = Components.of(
            [(i, label) for i, task in enumerate(memory.tasks) for label in task.own.labels],
            [False] * len(memory.tasks),
        )
        self.labels = components.labels
        self._components = components
        self._engine = engine
        self._memory = memory
        self._prototypes = np.concatenate([task.prototypes for task in memory.tasks])

    def predict(self, hidden: Floats) -> Prediction:
        """Answer by softmax(refined logits) + softmax(first logits x tasks)."""
        tasks, head = self._memory.tasks, self._memory.head
        features = _features(self._engine, hidden, tasks[0].tensors)
        first = self.first_logits(features)

        def evaluate(task: int, rows: IntArray) -> FloatArray:
            if task == 0:
                return head.logits(features[rows])
            return head.logits(_features(self._engine, hidden[rows], tasks[task].tensors))

        refined = refine_lazy(first, evaluate, self._components.owner)
        scores = softmax(refined.logits) + softmax(first * len(tasks))
        # The first adapter has run already, for the first guess.
        extra = refined.visited[:, 1:].sum(axis=1)
        return Prediction(
            label_scores(scores, self._components.label),
            1.0 + self._engine.suffix_share * extra,
        )

    def first_logits(self, features: Floats) -> FloatArray:
        """Cosines to the prototypes in the first adapter's space, float64 [n, components]."""
        cosines: FloatArray = features.astype(np.float64) @ self._prototypes.T.astype(np.float64)
        return cosines


def _features(
    engine: Engine, hidden: NDArray[np.floating[Any]], tensors: Mapping[str, Floats]
) -> Floats:
    return engine.network(hidden, tensors)
