"""`driftkeel`: the default; what the daemon does, on a stream of tasks.

Every task leaves a bundle, packed as it travels. Samples whose labels are likely wrong are left
out. Class statistics of the encoder's features at several depths decide by a Gaussian mixture. An
adapter is trained too, and kept where it earns its place on samples that neither it nor the
statistics have seen; then the router lets it look again at the samples that seem to be its task's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import FROZEN, Bundle, Manifest, pack, unpack
from adapter_store.codecs import Codec
from edge_agent.cleaning import trusted_labels
from edge_agent.decision import GroupsDecision
from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.engine import Engine
from edge_agent.trials import Answers, earns_its_place
from ood.calibration import score_quantiles
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics

CODEC: Final[Codec] = "int8"
_HELD_OUT: Final = 0.2
# With fewer, no adapter could pass the test: five gains without a loss are the least.
_LEAST_HELD_OUT: Final = 20
_MAX_ROUNDS: Final = 4

Names = NDArray[np.object_]
Memory = tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class DriftkeelPredictor:
    """The decision over all bundles."""

    engine: Engine
    decision: GroupsDecision
    adapters: tuple[dict[str, Floats], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label of every bundle."""
        return self.decision.labels

    def predict(self, hidden: Floats) -> Prediction:
        """Decide by statistics, and by the adapters the router asks."""

        def own_features(group: int, rows: NDArray[np.int64]) -> Floats:
            return self.engine.network(hidden[rows], self.adapters[group])

        routed = self.decision.route(self.engine.features(hidden), own_features)
        passes = self.engine.base_passes + self.engine.suffix_share * routed.adapter_passes
        return Prediction(routed.probabilities, passes.astype(np.float64))


class Driftkeel:
    """Statistics at several depths, and adapters where they earn their place."""

    name = "driftkeel"

    def learn(self, engine: Engine, memory: Memory | None, task: Task) -> Memory:
        """Add a bundle; those before stay as they are."""
        base = engine.features(task.hidden)
        trusted = trusted_labels(base, task.labels)
        base, hidden = base[trusted], task.hidden[trusted]
        labels = np.array(task.labels, dtype=object)[trusted]
        tensors = self._adapter(engine, base, hidden, labels, task.seed)
        statistics = ClassStatistics.fit(base, list(labels))
        own = statistics
        if tensors:
            own = ClassStatistics.fit(engine.network(hidden, tensors), list(labels))
        manifest = Manifest(
            encoder=engine.package.digest,
            family=engine.family if tensors else FROZEN,
            rank=engine.rank if tensors else 0,
            sites=engine.package.sites if tensors else (),
            labels=statistics.labels,
            task=f"task {task.number}",
            created_at=0.0,
            created_by=self.name,
            samples=statistics.samples,
            score_quantiles=tuple(
                score_quantiles(MahalanobisScore.from_statistics([statistics]).score(base))
            ),
            codec=CODEC,
        )
        described = signature(base, seed=engine.package.digest)
        return (*(memory or ()), pack(Bundle(manifest, tensors, statistics, own, described)))

    def predictor(self, engine: Engine, memory: Memory) -> DriftkeelPredictor:
        """The mixture of all bundles, and their adapters, as they are read back."""
        bundles = [unpack(data) for data in memory]
        decision = _decision(
            [bundle.base for bundle in bundles],
            [None if bundle.manifest.family == FROZEN else bundle.own for bundle in bundles],
        )
        return DriftkeelPredictor(engine, decision, tuple(dict(b.tensors) for b in bundles))

    def stored_bytes(self, memory: Memory) -> int:
        """The bundles as they travel."""
        return sum(map(len, memory))

    def _adapter(
        self,
        engine: Engine,
        base: Floats,
        hidden: NDArray[np.floating[Any]],
        labels: Names,
        seed: int,
    ) -> dict[str, Floats]:
        """Train an adapter on most of the samples; nothing when the rest do not speak for it."""
        held = _held_out(labels, seed)
        if engine.recipe is None or held.sum() < _LEAST_HELD_OUT or len(set(labels)) < 2:
            return {}
        from edge_agent.objectives import CosineHead  # noqa: PLC0415

        names, targets = np.unique(labels[~held], return_inverse=True)
        network = engine.network(hidden[~held])
        rows = np.stack([network[targets == k].mean(axis=0) for k in range(len(names))])
        tensors = engine.train(
            hidden[~held],
            targets.astype(np.int64),
            engine.fresh(seed),
            CosineHead(rows.astype(np.float32)),
        )
        known = ClassStatistics.fit(base[~held], list(labels[~held]))
        own = ClassStatistics.fit(engine.network(hidden[~held], tensors), list(labels[~held]))
        answers = Answers(
            truth=list(labels[held]),
            current=_answers(engine, known, None, {}, hidden[held]),
            candidate=_answers(engine, known, own, tensors, hidden[held]),
        )
        return tensors if earns_its_place(answers).accepted else {}


def _decision(base: list[ClassStatistics], own: list[ClassStatistics | None]) -> GroupsDecision:
    return GroupsDecision(base, own, max_rounds=_MAX_ROUNDS)


def _answers(
    engine: Engine,
    base: ClassStatistics,
    own: ClassStatistics | None,
    tensors: dict[str, Floats],
    hidden: NDArray[np.floating[Any]],
) -> list[str]:
    predictor = DriftkeelPredictor(engine, _decision([base], [own]), (tensors,))
    answers = predictor.predict(hidden.astype(np.float32))
    return [predictor.labels[k] for k in answers.probabilities.argmax(axis=1)]


def _held_out(labels: Names, seed: int) -> NDArray[np.bool_]:
    """A fifth of every class, rounded down."""
    held = np.zeros(len(labels), dtype=np.bool_)
    rng = np.random.default_rng(seed)
    for label in sorted(set(labels)):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: int(len(members) * _HELD_OUT)]] = True
    return held
