"""`ear`: hyperdimensional routing, adapters found by zero-shot search, grown as tasks differ.

After "Efficient model adaptation for continual learning at the edge" (EAR, 2023), which has no
public code. A task's signature decides whether the nearest adapter is reused, a copy of it trained
further, or a new one added; what is trained is chosen without training. A sample goes to the task
of its nearest class hypervector and is decided there. Only learning needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import StrategyError
from edge_agent.search.candidates import (
    Budget,
    Candidate,
    active,
    extended,
    first_tensors,
    parameters,
    propose,
)
from edge_agent.search.growth import decide
from edge_agent.strategies.base import Floats, Prediction, Task
from edge_agent.strategies.engine import Engine
from ood.hyperdimensional import Bundles, ClassHypervectors
from ood.signature import SIZE_BYTES, Signature, signature

if TYPE_CHECKING:
    from torch import Tensor

    from edge_agent.trainer_loop import Objective

# What every adapter may consist of, as a multiple of the engine's plain choice at all sites.
_BUDGET_FACTOR: Final = 1.0
_CANDIDATES: Final = 8
_SEARCH_SAMPLES: Final = 64
# Fewer samples than this in a class, and an adapter learns them by heart: the task is kept as
# class hypervectors alone.
_MIN_PER_CLASS: Final = 5
# Cosines need a scale for the softmax to be decisive; the one the adapters are trained with.
_SCALE: Final = 16.0


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter.

    Attributes:
        candidate: What was searched and found.
        tensors: At all sites of the family; those not the candidate's are as they began.
    """

    candidate: Candidate
    tensors: Mapping[str, Floats]


@dataclass(frozen=True, eq=False)
class Group:
    """What is kept of the tasks that share an adapter.

    Attributes:
        adapter: None where there was too little to train one.
        base: The classes by the bare encoder's features of all depths, as the paper bundles them.
        own: The classes in the adapter's space; the same as `base` without an adapter.
        signature: Of the task the group began with.
    """

    adapter: Adapter | None
    base: Bundles
    own: Bundles
    signature: Signature


@dataclass(frozen=True, eq=False)
class Memory:
    """All groups in the order they were begun."""

    groups: tuple[Group, ...]


class Ear:
    """Hyperdimensional classes over a growing set of searched adapters."""

    name = "ear"

    def __init__(self) -> None:
        # Engines for families other than the caller's, so that each program is loaded once.
        self._engines: dict[tuple[int, str], Engine] = {}

    def learn(self, engine: Engine, memory: Memory | None, task: Task) -> Memory:
        """Decide growth, search, train, and bundle the task's classes in both spaces.

        Raises:
            StrategyError: The engine has no recipe to train with.
        """
        if engine.recipe is None:
            raise StrategyError("ear trains adapters; give the engine a recipe")
        groups = () if memory is None else memory.groups
        base = engine.features(task.hidden)
        network = engine.network(task.hidden)
        found = signature(network, seed=engine.package.digest)
        growth = decide(found, [group.signature for group in groups])
        bundles = Bundles.fit(base, task.labels)
        if growth.action == "reuse":
            assert growth.nearest is not None
            group = groups[growth.nearest]
            own = _own_bundles(engine, group.adapter, task, bundles)
            merged = replace(group, base=group.base.merge(bundles), own=group.own.merge(own))
            at = growth.nearest
            return Memory((*groups[:at], merged, *groups[at + 1 :]))
        adapter = None
        classes = len(bundles.labels)
        if classes > 1 and len(task.labels) >= _MIN_PER_CLASS * classes:
            nearest = None
            if growth.action == "extend" and growth.nearest is not None:
                nearest = groups[growth.nearest].adapter
            means = Bundles.fit(network, task.labels).means.astype(np.float32)
            adapter = self._adapter(engine, task, bundles.labels, means, nearest)
        own = _own_bundles(engine, adapter, task, bundles)
        return Memory((*groups, Group(adapter, bundles, own, found)))

    def predictor(self, engine: Engine, memory: Memory) -> EarPredictor:
        """The router over all classes and a classifier for each adapter."""
        return EarPredictor(engine, memory)

    def stored_bytes(self, memory: Memory) -> int:
        """Adapters at their own sites in float32, bundles and signatures.

        Tensors at other sites are zeros or follow from the seed, so nobody would write them.
        """
        total = 0
        for group in memory.groups:
            total += group.base.size_bytes + SIZE_BYTES
            if group.adapter is not None:
                total += group.own.size_bytes + sum(
                    value.nbytes
                    for name, value in group.adapter.tensors.items()
                    if active(group.adapter.candidate, name)
                )
        return total

    def engine_for(self, engine: Engine, family: str) -> Engine:
        """The engine, or one like it that trains another family."""
        if family == engine.family:
            return engine
        key = (id(engine), family)
        if key not in self._engines:
            self._engines[key] = Engine(
                engine.package,
                recipe=engine.recipe,
                family=family,
                rank=engine.rank,
                threads=engine.threads,
            )
        return self._engines[key]

    def _adapter(
        self,
        engine: Engine,
        task: Task,
        labels: tuple[str, ...],
        means: Floats,
        nearest: Adapter | None,
    ) -> Adapter:
        """Search what to train, train it, and keep other sites as they were."""
        from edge_agent.objectives import CosineHead  # noqa: PLC0415

        names = {label: k for k, label in enumerate(labels)}
        targets = np.array([names[label] for label in task.labels], dtype=np.int64)
        candidate = self._search(engine, task, targets, means, nearest)
        if nearest is None:
            initial = first_tensors(engine.package, candidate, task.seed)
        else:
            initial = extended(engine.package, candidate, nearest.tensors, task.seed)
        chosen = self.engine_for(engine, candidate.family)
        assert engine.recipe is not None
        objective = AtSites(CosineHead(means), initial, candidate)
        recipe = replace(engine.recipe, seed=task.seed)
        tensors = chosen.train(task.hidden, targets, initial, objective, recipe)
        return Adapter(candidate, tensors)

    def _search(
        self,
        engine: Engine,
        task: Task,
        targets: NDArray[np.int64],
        means: Floats,
        nearest: Adapter | None,
    ) -> Candidate:
        import torch  # noqa: PLC0415

        from edge_agent.search.proxies import Minibatch  # noqa: PLC0415
        from edge_agent.search.ranking import rank_candidates  # noqa: PLC0415

        torch.set_num_threads(engine.threads)
        plain = propose(engine.package, (engine.family,), engine.rank, 1)[0]
        budget = Budget(int(_BUDGET_FACTOR * parameters(engine.package, plain)))
        candidates = candidates_for(engine, nearest)
        rows = np.random.default_rng(task.seed).permutation(len(targets))[:_SEARCH_SAMPLES]
        batch = Minibatch(
            np.ascontiguousarray(task.hidden[rows], dtype=np.float32),
            targets[rows],
            means,
        )
        ranked = rank_candidates(
            engine.package,
            lambda family: self.engine_for(engine, family).program,
            batch,
            candidates,
            budget=budget,
            seed=task.seed,
        )
        return ranked[0].candidate if ranked else candidates[0]


def candidates_for(engine: Engine, nearest: Adapter | None) -> list[Candidate]:
    """What may be trained: a spread over the families, or the nearest adapter at its rank and up.

    A family whose rank is no sum of parts cannot grow; it is only trained further.
    """
    if nearest is None:
        others = [name for name in engine.package.families if name != engine.family]
        return propose(engine.package, (engine.family, *others), engine.rank, _CANDIDATES)
    from exporter.families import adapter_family  # noqa: PLC0415

    same = nearest.candidate
    grows = adapter_family(same.family).pads
    return [same, replace(same, rank=same.rank * 2)] if grows else [same]


class EarPredictor:
    """Routes by class hypervectors of the bare encoder; decides in the adapter's space.

    P(label) = Σ P(task) P(label | task): both factors are softmaxes of cosines, the second of base
    and own cosines together in the task a sample was routed to, and of base cosines elsewhere, for
    whose adapters nothing was computed.

    Attributes:
        labels: Every label learned so far, sorted.
    """

    def __init__(self, engine: Engine, memory: Memory) -> None:
        self._engine = engine
        self._groups = memory.groups
        seed = engine.package.digest
        self._router = ClassHypervectors(
            np.vstack([group.base.means for group in memory.groups]), seed
        )
        self._own = [
            None if group.adapter is None else ClassHypervectors(group.own.means, seed)
            for group in memory.groups
        ]
        components = [label for group in memory.groups for label in group.base.labels]
        self.labels: tuple[str, ...] = tuple(sorted(set(components)))
        column = {label: k for k, label in enumerate(self.labels)}
        self._columns = np.array([column[label] for label in components])
        ends = np.cumsum([len(group.base.labels) for group in memory.groups])
        self._slices = [
            slice(int(end) - len(group.base.labels), int(end))
            for end, group in zip(ends, memory.groups, strict=True)
        ]
        self._owner = np.repeat(
            np.arange(len(memory.groups)), [len(group.base.labels) for group in memory.groups]
        )

    def predict(self, hidden: Floats) -> Prediction:
        """Answer samples; a routed one costs its adapter's suffix beyond the bare pass."""
        engine = self._engine
        cosines = self._router.cosines(engine.features(hidden))
        shares = _softmax(_SCALE * cosines)
        routed = self._owner[cosines.argmax(axis=1)]
        passes = np.ones(len(hidden))
        for at in np.unique(routed):
            group, own = self._groups[at], self._own[at]
            if group.adapter is None or own is None:
                continue
            rows, columns = np.flatnonzero(routed == at), self._slices[at]
            adapted = engine.network(
                hidden[rows], group.adapter.tensors, group.adapter.candidate.family
            )
            mass = shares[rows, columns].sum(axis=1, keepdims=True)
            both = cosines[rows, columns] + own.cosines(adapted)
            shares[rows, columns] = mass * _softmax(_SCALE * both)
            passes[rows] += engine.suffix_share
        probabilities = np.zeros((len(hidden), len(self.labels)))
        np.add.at(probabilities.T, self._columns, shares.T)
        return Prediction(probabilities / probabilities.sum(axis=1, keepdims=True), passes)


class AtSites:
    """An objective that holds an adapter's tensors at other sites where they began."""

    def __init__(
        self, inner: Objective, initial: Mapping[str, Floats], candidate: Candidate
    ) -> None:
        self._inner = inner
        self._fixed = {n: v.copy() for n, v in initial.items() if not active(candidate, n)}

    def parameters(self) -> dict[str, Tensor]:
        """What the inner objective trains."""
        return self._inner.parameters()

    def buffers(self) -> dict[str, Tensor]:
        """The inner objective's."""
        return self._inner.buffers()

    def loss(self, features: Tensor, classes: Tensor) -> Tensor:
        """The inner objective's."""
        return self._inner.loss(features, classes)

    def correct(self, features: Tensor, classes: Tensor) -> int:
        """The inner objective's."""
        return self._inner.correct(features, classes)

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """What the inner one does; then the other sites go back to where they began."""
        import torch  # noqa: PLC0415

        self._inner.after_step(tensors)
        for name, value in self._fixed.items():
            tensors[name].copy_(torch.from_numpy(value))

    def adapter_frozen(self, epoch: int) -> bool:
        """As the inner objective says."""
        return self._inner.adapter_frozen(epoch)


def _own_bundles(engine: Engine, adapter: Adapter | None, task: Task, base: Bundles) -> Bundles:
    if adapter is None:
        return base
    features = engine.network(task.hidden, adapter.tensors, adapter.candidate.family)
    return Bundles.fit(features, task.labels)


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return result
