"""Which adapter decides a sample: lazy, self-refined routing, vectorised over a batch.

A pure function over arrays; the serving generation calls it and runs the encoder for it. After
the self-refined retrieval of MOS (Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based
Class-Incremental Learning", 2025, section 4.3): a first guess from the base features names a
bundle, that bundle's adapter looks again, and its answer may name another bundle, until the
answer is stable. Only the adapters named are run, yet the decision is the one that refining
over the outputs of all of them gives.

What differs from the paper: features of two adapters live in two spaces, and comparing a
sample's distance to prototypes across spaces costs accuracy. So the base space, where all
classes share one space and one covariance, says how likely each *bundle* is, and a bundle's
own space says how likely each *label of that bundle* is: P(label) = sum over bundles of
P(bundle | base) P(label | bundle, own). A bundle not visited keeps what the base space says
about its labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Evidence = Callable[[int, IntArray], FloatArray]

_NO_MASS: Final = 1e-300


@dataclass(frozen=True)
class Components:
    """Which label and which bundle each component of the head belongs to.

    Attributes:
        owner: int64 [k], the group (bundle) of each component, ascending; components of one group
            are in the order its evidence comes in.
        label: int64 [k], the index into ``labels``.
        labels: The distinct label names, sorted.
        free: bool [groups], groups without an adapter: there is nothing more to look at.
    """

    owner: IntArray
    label: IntArray
    labels: tuple[str, ...]
    free: NDArray[np.bool_]

    @classmethod
    def of(
        cls, components: Sequence[tuple[int, str]], free: Sequence[bool] | NDArray[np.bool_]
    ) -> Components:
        """Index the components of a Gaussian head."""
        labels = tuple(sorted({label for _, label in components}))
        position = {label: index for index, label in enumerate(labels)}
        return cls(
            owner=np.array([group for group, _ in components], dtype=np.int64),
            label=np.array([position[label] for _, label in components], dtype=np.int64),
            labels=labels,
            free=np.array(free, dtype=np.bool_),
        )

    def only(self, chosen: IntArray) -> Components:
        """Some of the components, all of a group or none, in ascending order."""
        return replace(self, owner=self.owner[chosen], label=self.label[chosen])


@dataclass(frozen=True)
class Route:
    """Where a batch went.

    Attributes:
        probabilities: float64 [n, labels], rows sum to one.
        label: int64 [n], the decision.
        group: int64 [n], the bundle the decision rests on.
        adapter_passes: int64 [n], adapters that were run for each sample.
    """

    probabilities: FloatArray
    label: IntArray
    group: IntArray
    adapter_passes: IntArray


def route(
    first: FloatArray,
    components: Components,
    evidence: Evidence,
    *,
    max_rounds: int,
    settled: NDArray[np.bool_] | None = None,
) -> Route:
    """Refine a first guess until the bundle it names has been looked at.

    Args:
        first: float64 [n, k], the base head's posterior over components; rows sum to one.
        components: What the k columns are.
        evidence: ``evidence(group, rows)`` gives float64 [len(rows), components of group],
            P(label | group) once the group's adapter has looked; called at most once for a group
            and row, and never for a group that is free or that no row's answer names.
        max_rounds: Most adapters to run for one sample; the answer after that stands.
        settled: bool [n], rows whose first guess stands; None for none.

    Returns:
        The decisions; those of a row do not depend on the other rows.
    """
    posterior = first.astype(np.float64, copy=True)
    visited = np.zeros((len(posterior), len(components.free)), dtype=np.bool_)
    passes = np.zeros(len(posterior), dtype=np.int64)
    # Where the mass of a row's component belongs: which of the first rows they are is all the same.
    places = np.arange(len(posterior))[:, None] * len(components.labels) + components.label
    sums, label, group = _decide(posterior, components, places)
    active = np.arange(len(posterior)) if settled is None else np.flatnonzero(~settled)
    while True:
        named = group[active]
        done = visited[active, named] | components.free[named] | (passes[active] >= max_rounds)
        active, named = active[~done], named[~done]
        if not active.size:
            break
        for each in sorted(set(named.tolist())):
            asking = active[named == each]
            own = evidence(each, asking)
            start = int(components.owner.searchsorted(each))
            columns = slice(start, start + own.shape[1])
            posterior[asking, columns] = posterior[asking, columns].sum(axis=1, keepdims=True) * own
            visited[asking, each] = True
            passes[asking] += 1
        sums[active], label[active], group[active] = _decide(
            posterior[active], components, places[: len(active)]
        )
    probabilities = sums / np.maximum(sums.sum(axis=1, keepdims=True), _NO_MASS)
    return Route(probabilities=probabilities, label=label, group=group, adapter_passes=passes)


def _decide(
    posterior: FloatArray, components: Components, places: IntArray
) -> tuple[FloatArray, IntArray, IntArray]:
    """The mass and the likeliest label of each row, and the bundle that contributes most to it."""
    count, labels = len(posterior), len(components.labels)
    # Added up in the order of the components, so that one without mass changes no bit of a sum.
    flat = np.bincount(places.ravel(), weights=posterior.ravel(), minlength=count * labels)
    sums: FloatArray = flat.astype(np.float64, copy=False).reshape(count, labels)
    label = sums.argmax(axis=1)
    of_label = components.label == label[:, None]
    best = np.where(of_label, posterior, -1.0).argmax(axis=1)
    return sums, label, components.owner[best]
