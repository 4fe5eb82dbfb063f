"""What the installed bundles together say of a sample: the evidence the router weighs.

The base space, with features of all depths, says how likely each installed class is; a bundle with
an adapter looks again, in its own space, at the classes it knows. A serving generation and the
`driftkeel` strategy of the benchmark decide through here, so that what is measured is what runs.
NumPy only; running the encoder is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.router import Components, FloatArray, IntArray, Route, route
from ood.mixture import Mixture
from ood.statistics import ClassStatistics, GaussianHead, shrunk_covariance

Floats = NDArray[np.float32]
OwnFeatures = Callable[[int, IntArray], Floats]

# Base and own evidence rest on the same pixels: each at half its weight, or what both see would
# count twice. Accuracy was measured to be flat from 0.2 to 0.7.
_SHARE: Final = 0.5


class Decision:
    """Decides samples by the statistics of the installed bundles; immutable.

    Args:
        mixture: The head in the base space.
        own: For each group its statistics in its adapter's space, in canonical order; None for a
            group without an adapter.
        max_rounds: Most adapters run for one sample.

    Attributes:
        labels: Every label it can answer, sorted.
        adapts: bool [groups], which groups have an adapter.
    """

    def __init__(
        self, mixture: Mixture, own: Sequence[ClassStatistics | None], *, max_rounds: int
    ) -> None:
        self.labels = mixture.labels
        self.adapts = np.array([statistics is not None for statistics in own], dtype=np.bool_)
        self._mixture = mixture
        self._max_rounds = max_rounds
        self._components = Components.of(mixture.entries, ~self.adapts)
        self._columns = [np.flatnonzero(self._components.owner == g) for g in range(len(own))]
        self._heads = own_heads(own)

    def route(
        self,
        features: Floats,
        own_features: OwnFeatures,
        *,
        settled: NDArray[np.bool_] | None = None,
    ) -> Route:
        """Decide a batch.

        Args:
            features: l2-normalised base features of all depths, float32 [n, d].
            own_features: ``own_features(group, rows)`` gives those rows' l2-normalised features
                in the group's own space; called only for groups with an adapter.
            settled: bool [n], samples that the base space alone decides; None for none.
        """
        base = self._mixture.log_likelihoods(features)

        def evidence(group: int, rows: IntArray) -> FloatArray:
            head = self._heads[group]
            assert head is not None  # the router asks only groups that adapt
            own = head.log_likelihoods(own_features(group, rows))
            columns = self._columns[group]
            entries = self._mixture.component[columns]
            shared = base[np.ix_(rows, entries)] + np.log(self._mixture.share[columns])
            return _softmax(_SHARE * own + (1.0 - _SHARE) * shared)

        return route(
            self._mixture.posterior(base),
            self._components,
            evidence,
            max_rounds=self._max_rounds,
            settled=settled,
        )


def own_heads(groups: Sequence[ClassStatistics | None]) -> list[GaussianHead | None]:
    """For each group the head over its own labels, in its own space; None where there is none.

    A bundle learned from few samples cannot estimate a covariance alone: the covariance pooled
    over all adapters' spaces stands in for as many samples as features have dimensions (the mean
    of an inverse-Wishart posterior), and matters less the more samples the bundle has of its own.

    Args:
        groups: Every bundle's statistics in its own space, in canonical order.
    """
    present = [group for group in groups if group is not None]
    if not present:
        return [None] * len(groups)
    scatter = np.sum([group.scatter for group in present], axis=0)
    pooled, _ = shrunk_covariance(scatter, freedom=sum(map(_freedom, present)))
    heads: list[GaussianHead | None] = []
    for group in groups:
        if group is None:
            heads.append(None)
            continue
        prior = group.dim
        covariance, _ = shrunk_covariance(
            group.scatter + prior * pooled, freedom=_freedom(group) + prior
        )
        heads.append(GaussianHead([(0, label) for label in group.labels], group.means, covariance))
    return heads


def _freedom(group: ClassStatistics) -> int:
    return group.samples - len(group.labels)


def _softmax(logits: FloatArray) -> FloatArray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return result
