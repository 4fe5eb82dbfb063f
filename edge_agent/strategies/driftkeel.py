"""`driftkeel`: the default; what the daemon does, on a stream of tasks.

Every task leaves class statistics of the encoder's features at several depths, which decide by a
Gaussian mixture. An adapter is trained too, and kept where it earns its place: on samples that
neither it nor the statistics have seen it must be right where they are wrong significantly more
often than the other way round. Where it is kept, the router lets it look again at the samples that
seem to be its task's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.decision import Decision
from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.engine import Engine
from edge_agent.trials import SIGNIFICANCE, sign_test
from ood.mixture import Mixture
from ood.statistics import ClassStatistics, l2_normalise

_HELD_OUT: Final = 0.2
# With fewer, no adapter could pass the test: five gains without a loss are the least.
_LEAST_HELD_OUT: Final = 20
_MAX_ROUNDS: Final = 4


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a task leaves behind: a bundle without its envelope.

    Attributes:
        base: Statistics in the base space, features of all depths.
        own: Statistics in the adapter's space; None without an adapter.
        tensors: The adapter; empty without one.
        p_value: Of the test it had to pass; 1 when there was nothing to test.
    """

    base: ClassStatistics
    own: ClassStatistics | None
    tensors: dict[str, Floats]
    p_value: float = 1.0


@dataclass(frozen=True, eq=False)
class DriftkeelPredictor:
    """The decision over all lessons."""

    engine: Engine
    decision: Decision
    lessons: tuple[Lesson, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label of every lesson."""
        return self.decision.labels

    def predict(self, hidden: Floats) -> Prediction:
        """Decide by statistics, and by the adapters the router asks."""

        def own_features(group: int, rows: NDArray[np.int64]) -> Floats:
            return _own(self.engine, hidden[rows], self.lessons[group].tensors)

        routed = self.decision.route(self.engine.features(hidden), own_features)
        passes = 1.0 + self.engine.suffix_share * routed.adapter_passes
        return Prediction(routed.probabilities, passes.astype(np.float64))


class Driftkeel:
    """Statistics at several depths, and adapters where they earn their place."""

    name = "driftkeel"

    def learn(
        self, engine: Engine, memory: tuple[Lesson, ...] | None, task: Task
    ) -> tuple[Lesson, ...]:
        """Add a lesson; those before stay as they are."""
        base = engine.features(task.hidden)
        tensors, p_value = self._adapter(engine, base, task)
        own = None
        if tensors:
            own = ClassStatistics.fit(_own(engine, task.hidden, tensors), task.labels)
        lesson = Lesson(ClassStatistics.fit(base, task.labels), own, tensors, p_value)
        return (*(memory or ()), lesson)

    def predictor(self, engine: Engine, memory: tuple[Lesson, ...]) -> DriftkeelPredictor:
        """The mixture of all lessons, and their adapters."""
        return DriftkeelPredictor(engine, _decision(memory), memory)

    def stored_bytes(self, memory: tuple[Lesson, ...]) -> int:
        """The bundles as they travel."""
        return sum(
            array.nbytes
            for lesson in memory
            for part in (lesson.base, lesson.own)
            if part is not None
            for array in part.to_arrays().values()
        ) + sum(value.nbytes for lesson in memory for value in lesson.tensors.values())

    def _adapter(self, engine: Engine, base: Floats, task: Task) -> tuple[dict[str, Floats], float]:
        """Train an adapter on most of the samples and test it on the rest."""
        labels = np.array(task.labels, dtype=object)
        held = _held_out(labels, task.seed)
        if engine.recipe is None or held.sum() < _LEAST_HELD_OUT or len(set(task.labels)) < 2:
            return {}, 1.0
        from edge_agent.objectives import CosineHead  # noqa: PLC0415

        names, targets = np.unique(labels[~held], return_inverse=True)
        network = engine.network(base[~held])
        rows = np.stack([network[targets == k].mean(axis=0) for k in range(len(names))])
        tensors = engine.train(
            task.hidden[~held],
            targets.astype(np.int64),
            engine.fresh(task.seed),
            CosineHead(rows.astype(np.float32)),
        )
        known = ClassStatistics.fit(base[~held], list(labels[~held]))
        own = ClassStatistics.fit(_own(engine, task.hidden[~held], tensors), list(labels[~held]))
        truth = labels[held]
        right = []
        for candidate in (Lesson(known, None, {}), Lesson(known, own, tensors)):
            predictor = DriftkeelPredictor(engine, _decision((candidate,)), (candidate,))
            answers = predictor.predict(task.hidden[held].astype(np.float32))
            guesses = np.array(predictor.labels, dtype=object)[answers.probabilities.argmax(axis=1)]
            right.append(guesses == truth)
        without, with_adapter = right
        p_value = sign_test(
            int((with_adapter & ~without).sum()), int((without & ~with_adapter).sum())
        )
        return (tensors, p_value) if p_value <= SIGNIFICANCE else ({}, p_value)


def _decision(lessons: tuple[Lesson, ...]) -> Decision:
    return Decision(
        Mixture.from_statistics([lesson.base for lesson in lessons]),
        [lesson.own for lesson in lessons],
        max_rounds=_MAX_ROUNDS,
    )


def _own(engine: Engine, hidden: NDArray[np.floating[Any]], tensors: dict[str, Floats]) -> Floats:
    return l2_normalise(engine.features(hidden, tensors)[:, : engine.package.network_dim])


def _held_out(labels: NDArray[np.object_], seed: int) -> NDArray[np.bool_]:
    """A fifth of every class, rounded down."""
    held = np.zeros(len(labels), dtype=np.bool_)
    rng = np.random.default_rng(seed)
    for label in sorted(set(labels)):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: int(len(members) * _HELD_OUT)]] = True
    return held
