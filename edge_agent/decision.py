"""What the installed bundles together say of a sample: the evidence the router weighs.

The base space, with features of all depths, says how likely each installed class is; a bundle with
an adapter looks again, in its own space, at the classes it knows. A serving generation and the
`driftkeel` strategy of the benchmark decide through here, so that what is measured is what runs.
NumPy only; running the encoder is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.router import Components, FloatArray, IntArray, Route, route
from ood.mixture import BaseEvidence, Mixture
from ood.pooled import Pooled
from ood.statistics import ClassStatistics, GaussianHead, shrunk_covariance

Floats = NDArray[np.float32]
OwnFeatures = Callable[[int, IntArray], Floats]
Look = Callable[[int, IntArray], FloatArray | None]

# Base and own evidence rest on the same pixels: each at half its weight, or what both see would
# count twice. Accuracy was measured to be flat from 0.2 to 0.7.
_SHARE: Final = 0.5


class OwnHeads:
    """Heads over a bundle's own labels, each in its own adapter's space.

    A bundle learned from few samples cannot estimate a covariance alone: the covariance pooled
    over all adapters' spaces stands in for as many samples as features have dimensions (the mean
    of an inverse-Wishart posterior), and matters less the more samples the bundle has of its own.

    Args:
        pooled: The statistics of all bundles with an adapter, each in its own space, added in
            canonical order.
    """

    def __init__(self, pooled: Pooled) -> None:
        self._prior, _ = shrunk_covariance(pooled.scatter, freedom=pooled.freedom)

    def head(self, group: ClassStatistics) -> GaussianHead:
        """The head of one of those bundles, by its statistics in its own space."""
        covariance, _ = shrunk_covariance(
            group.scatter + group.dim * self._prior,
            freedom=group.samples - len(group.labels) + group.dim,
        )
        return GaussianHead([(0, label) for label in group.labels], group.means, covariance)


class Decision:
    """Decides samples by what the base space and the adapters that are asked say; immutable.

    Args:
        mixture: The head in the base space.
        adapts: For each group whether it has an adapter.
        max_rounds: Most adapters run for one sample.

    Attributes:
        labels: Every label it can answer, sorted.
        adapts: bool [groups], which groups have an adapter.
    """

    def __init__(self, mixture: Mixture, adapts: Sequence[bool], *, max_rounds: int) -> None:
        self.labels = mixture.labels
        self.adapts = np.array(adapts, dtype=np.bool_)
        self._mixture = mixture
        self._max_rounds = max_rounds
        self._components = Components.of(mixture.entries, ~self.adapts)
        self._log_share = np.log(mixture.share)
        edges = self._components.owner.searchsorted(np.arange(len(self.adapts) + 1)).tolist()
        self._entries = [slice(first, after) for first, after in pairwise(edges)]

    def route(
        self, base: BaseEvidence, look: Look, *, settled: NDArray[np.bool_] | None = None
    ) -> Route:
        """Decide a batch.

        Args:
            base: What the mixture says of the n samples.
            look: ``look(group, rows)`` gives the log-likelihoods of the group's labels in its own
                space, up to a number of each row's own, float64 [len(rows), labels], or None where
                its adapter cannot be had: then the base space decides among them. Called only for
                groups with an adapter.
            settled: bool [n], samples that the base space alone decides; None for none.
        """
        every = self._components

        def evidence(group: int, rows: IntArray) -> FloatArray:
            entries = self._entries[group]
            shared = base.of(rows, self._mixture.component[entries]) + self._log_share[entries]
            own = look(group, rows)
            return _softmax(shared if own is None else _SHARE * own + (1.0 - _SHARE) * shared)

        entries = self._likely(base)
        return route(
            base.posterior(entries),
            every if entries is None else every.only(entries),
            evidence,
            max_rounds=self._max_rounds,
            settled=settled,
        )

    def _likely(self, base: BaseEvidence) -> IntArray | None:
        """The entries of every group that may be named; None where that can be any."""
        if base.look is None:
            return None
        owner = self._components.owner
        near = np.zeros(len(self._mixture.label), dtype=np.bool_)
        near[base.look.near] = True
        groups = np.zeros(len(self.adapts), dtype=np.bool_)
        groups[owner[near[self._mixture.component]]] = True
        return np.flatnonzero(groups[owner])


class GroupsDecision:
    """Decides by groups whose statistics are all in memory: a strategy's, or a single bundle's.

    Args:
        base: Each group's statistics of base features, in canonical order.
        own: Each group's statistics in its adapter's space; None for one without an adapter.
        max_rounds: Most adapters run for one sample.

    Attributes:
        labels: Every label it can answer, sorted.
    """

    def __init__(
        self,
        base: Iterable[ClassStatistics],
        own: Sequence[ClassStatistics | None],
        *,
        max_rounds: int,
    ) -> None:
        made = OwnHeads(Pooled(group for group in own if group is not None))
        self._heads = [None if group is None else made.head(group) for group in own]
        self._mixture = Mixture.from_statistics(base)
        adapts = [head is not None for head in self._heads]
        self._decision = Decision(self._mixture, adapts, max_rounds=max_rounds)
        self.labels = self._decision.labels

    def route(self, features: Floats, own_features: OwnFeatures) -> Route:
        """Decide a batch.

        Args:
            features: l2-normalised base features of all depths, float32 [n, d].
            own_features: ``own_features(group, rows)`` gives those rows' l2-normalised features
                in the group's own space; called only for groups with an adapter.
        """

        def look(group: int, rows: IntArray) -> FloatArray | None:
            head = self._heads[group]
            return None if head is None else head.log_likelihoods(own_features(group, rows))

        return self._decision.route(self._mixture.evidence(features), look)


def _softmax(logits: FloatArray) -> FloatArray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return result
