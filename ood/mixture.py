"""The Gaussian mixture head of everything installed: one component, or several, for each label.

Bundles that know the same label either saw the same thing, and then their statistics are one
Gaussian's, or two looks of it (two domains), which one Gaussian would blur together. Hotelling's
test decides. Called by the detector and by the daemon's decisions; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.logits import Discriminant
from ood.pooled import Pooled
from ood.shortlist import CANDIDATES, Shortlist
from ood.statistics import ClassStatistics, GaussianHead, shrunk_covariance
from ood.validation import FloatArray, check_features

# T²/d of two means of one Gaussian is 1 on average, once the covariance's own error is allowed for.
# Measured on PACS at 3, 10, 30 and all samples a class: halves of one class at random 1.0 in the
# median and 2.5 at most; two domains 2.1 to 25 in the median, above 2 nearly always from 10 on.
SAME_LOOK = 2.0
# With up to so many components a shortlist would cost more than it saves.
LOOK_AT_ALL: Final = 2 * CANDIDATES


@dataclass(frozen=True, eq=False)
class Mixture:
    """The head, and which installed entry each of its components stands for.

    Attributes:
        head: The components' Gaussians; columns in the order of `label`.
        labels: The distinct label names, sorted.
        label: int64 [k], the index into `labels` of each component.
        log_prior: float64 [k]; labels are equally likely, and the components of a label as likely
            as their samples were many.
        entries: (group index, label name) of every installed class, in canonical order.
        component: int64 [entries], the component an entry went into.
        share: float64 [entries], its part of that component's samples.
    """

    head: GaussianHead
    labels: tuple[str, ...]
    label: npt.NDArray[np.int64]
    log_prior: FloatArray
    entries: tuple[tuple[int, str], ...]
    component: npt.NDArray[np.int64]
    share: FloatArray

    @classmethod
    def from_statistics(cls, groups: Iterable[ClassStatistics]) -> Mixture:
        """Build the head of the installed groups, in their canonical order.

        Raises:
            OodError: there is no group, or the groups are of different dimensions.
        """
        return cls.of(Pooled(groups))

    @classmethod
    def of(cls, pooled: Pooled) -> Mixture:
        """Build the head of groups that were added up before.

        Raises:
            OodError: there is no group.
        """
        means, counts, scatter = pooled.means, pooled.counts, pooled.scatter
        dim, freedom = len(scatter), pooled.freedom
        entries = tuple(pooled.entries)
        covariance, shrinkage = shrunk_covariance(scatter, freedom=freedom)
        labels = tuple(sorted({label for _, label in entries}))
        position = {label: k for k, label in enumerate(labels)}
        owner = np.array([position[label] for _, label in entries])
        tolerance = SAME_LOOK * _unseen_distance(scatter, covariance, shrinkage, freedom)
        component = _clusters(means, counts, owner, covariance, tolerance)
        kept = int(component.max()) + 1
        totals = np.bincount(component, weights=counts, minlength=kept)
        share = counts / totals[component]
        merged_means = np.zeros((kept, dim))
        np.add.at(merged_means, component, share[:, None] * means)
        # What separates the means that were merged is spread within their component.
        gaps = (means - merged_means[component]) * np.sqrt(counts)[:, None]
        if kept < len(entries):
            covariance, shrinkage = shrunk_covariance(
                scatter + gaps.T @ gaps, freedom=pooled.samples - kept
            )
        label = np.zeros(kept, np.int64)
        label[component] = owner
        prior = totals / np.bincount(label, weights=totals)[label]
        # Of many components the means are most of what is held, and they travel as float32 anyway.
        held = merged_means if kept <= LOOK_AT_ALL else merged_means.astype(np.float32)
        head = GaussianHead([(index, labels[k]) for index, k in enumerate(label)], held, covariance)
        head.shrinkage = shrinkage
        return cls(head, labels, label, np.log(prior), entries, component, share)

    def log_likelihoods(self, features: npt.ArrayLike) -> FloatArray:
        """Return log p(feature, component | label) of every component, float64 [n, k]."""
        result: FloatArray = self.head.log_likelihoods(features) + self.log_prior
        return result

    def evidence(self, features: npt.ArrayLike) -> BaseEvidence:
        """Look at samples once, for whoever classifies them and whoever watches their stream.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return BaseEvidence(self, check_features(features, dim=self.head.dim))

    @cached_property
    def shortlist(self) -> Shortlist | None:
        """Names the components near a sample; None where there are few enough to look at all."""
        return Shortlist(self.head) if len(self.label) > LOOK_AT_ALL else None

    @cached_property
    def discriminant(self) -> Discriminant:
        """Compares all components, where there are few enough for that."""
        return Discriminant(self.head)


class BaseEvidence:
    """What a mixture says of a batch: exact, but of many components only those near each sample.

    Components share a covariance, so that all that tells them apart is linear in the sample: their
    log-likelihoods are compared by logits, without the sample's own distance.

    Args:
        mixture: The mixture.
        rows: The samples, checked, float64 [n, d].

    Attributes:
        rows: The samples.
        look: What the mixture's shortlist saw of them; None where all components are looked at.
        logits: float64 [n, m], those of the components that were looked at.
    """

    def __init__(self, mixture: Mixture, rows: FloatArray) -> None:
        self._mixture = mixture
        self.rows = rows
        shortlist = mixture.shortlist
        self.look = None if shortlist is None else shortlist.look(rows)
        self.logits = mixture.discriminant.of_rows(rows) if self.look is None else self.look.logits

    def nearest(self) -> npt.NDArray[np.int64]:
        """The component each sample is nearest to, int64 [n]."""
        place: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        if self.look is None:
            return place
        result: npt.NDArray[np.int64] = self.look.near[np.arange(len(place)), place]
        return result

    def posterior(self, entries: npt.NDArray[np.int64] | None = None) -> FloatArray:
        """P(entry | feature), float64 [n, entries]; over all entries rows sum to one.

        Args:
            entries: The entries wanted; all of them when None.
        """
        mixture = self._mixture
        prior, component, share = mixture.log_prior, mixture.component, mixture.share
        if entries is not None:
            component, share = component[entries], share[entries]
        logs = self.logits + (prior if self.look is None else prior[self.look.near])
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        if self.look is not None:
            listed = weights
            weights = np.zeros((len(listed), len(mixture.label)))
            weights[np.arange(len(listed))[:, None], self.look.near] = listed
        result: FloatArray = weights[:, component] * share
        return result

    def of(self, rows: npt.NDArray[np.int64], components: npt.NDArray[np.int64]) -> FloatArray:
        """The samples' log p(feature, component | label), up to a number of each sample's own.

        Returns:
            float64 [rows, components].
        """
        shortlist = self._mixture.shortlist
        if self.look is None or shortlist is None:
            logits = self.logits[rows][:, components]
        else:
            logits = np.stack(
                [shortlist.logits(self.look.centred[row], components) for row in rows]
            )
        result: FloatArray = logits + self._mixture.log_prior[components]
        return result


def _unseen_distance(
    scatter: FloatArray, covariance: FloatArray, shrinkage: float, freedom: int
) -> float:
    """The mean squared distance, per dimension, of samples the covariance was not computed from.

    Exactly 1 under the true covariance. An estimated one fits its own samples too well; leaving
    each of them out by the Sherman-Morrison identity tells how much larger it is for others.
    """
    if freedom < 1:
        return 1.0
    dim = len(covariance)
    seen = float(np.trace(np.linalg.solve(covariance, scatter / freedom))) / dim
    leverage = (1.0 - shrinkage) * seen * dim / freedom
    return max(seen / max(1.0 - leverage, 0.05), 1e-6)


def _clusters(
    means: FloatArray,
    counts: FloatArray,
    owner: npt.NDArray[np.int64],
    covariance: FloatArray,
    tolerance: float,
) -> npt.NDArray[np.int64]:
    """Which entries are one component: agglomerative, the closest pair of a label first."""
    component = np.arange(len(means))
    repeated = np.flatnonzero(np.bincount(owner) > 1)
    if repeated.size:
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, means.T).T
        for label in repeated:
            members = np.flatnonzero(owner == label)
            for cluster in _agglomerated(white[members], counts[members], tolerance):
                component[members[cluster]] = members[cluster].min()
    _, ordinal = np.unique(component, return_inverse=True)
    return ordinal.astype(np.int64)


def _agglomerated(means: FloatArray, counts: FloatArray, tolerance: float) -> list[list[int]]:
    """Merge the pair of least T²/d while it is within the tolerance (Hotelling, 1931)."""
    clusters = [[index] for index in range(len(means))]
    means, counts = means.copy(), counts.copy()
    while len(clusters) > 1:
        gaps = np.stack([np.square(means - mean).mean(axis=1) for mean in means])
        scaled = gaps * (counts[:, None] * counts) / (counts[:, None] + counts)
        np.fill_diagonal(scaled, np.inf)
        first, second = sorted(divmod(int(scaled.argmin()), len(scaled)))
        if scaled[first, second] > tolerance:
            break
        total = counts[first] + counts[second]
        means[first] = (counts[first] * means[first] + counts[second] * means[second]) / total
        counts[first] = total
        clusters[first] = sorted(clusters[first] + clusters.pop(second))
        means = np.delete(means, second, axis=0)
        counts = np.delete(counts, second)
    return clusters
