"""How the weights of the default score's views were chosen. Part of `benchmarks.ood`.

Two things are asked of each choice: on the encoder it is made on, how far its mean AUROC is above
that of the best single rival in the group where that is least; and how well it sees classes of the
known worlds that were left out of the statistics, for which nothing foreign is needed. Boundary and
virtual logit, which see new classes best, always weigh 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.detection import auroc
from benchmarks.worlds import GROUPS, World, Worlds
from ood.combined import CombinedScore, joined, log_shares
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

Floats = npt.NDArray[np.float64]
_GRID: Final = (0.25, 0.5, 0.75, 1.0)
_FOLDS: Final = 5
CHOICES: Final = tuple((one, other, 1.0, 1.0) for one, other in product(_GRID, _GRID))


def measured(worlds: Worlds, best_rivals: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row for each choice of weights.

    Args:
        worlds: all worlds under one encoder.
        best_rivals: the mean AUROC of the best single rival in each group.
    """
    groups: dict[str, list[Floats]] = defaultdict(list)
    left_out = []
    pairs = list(worlds.pairs(GROUPS))
    for name, world in worlds.worlds.items():
        score = _fitted(world, np.ones(len(world.fit.labels), bool), worlds)
        known = score.views(l2_normalise(world.test.features))
        for pair in pairs:
            if pair.known == name:
                foreign = score.views(l2_normalise(pair.features))
                groups[pair.group].append(_aurocs(score, known, foreign))
        left_out.append(_left_out(world, worlds))
    means = {group: np.mean(found, axis=0) for group, found in groups.items()}
    return [
        {
            "weights": list(weights),
            "mean": float(np.mean([means[group][row] for group in GROUPS])),
            "least_margin": float(min(means[g][row] - best_rivals[g] for g in GROUPS)),
            "left_out": float(np.mean(left_out, axis=0)[row]),
        }
        for row, weights in enumerate(CHOICES)
    ]


def _left_out(world: World, worlds: Worlds) -> Floats:
    """Mean AUROC of held-out samples of classes that were not fitted, a fifth of them at a time."""
    names = sorted(set(world.fit.labels))
    found = []
    for fold in range(_FOLDS):
        out = set(names[fold::_FOLDS])
        score = _fitted(world, ~_of(world.fit.labels, out), worlds, out)
        foreign = _of(world.calibration.labels, out)
        views = score.views(l2_normalise(world.calibration.features))
        found.append(_aurocs(score, views[~foreign], views[foreign]))
    result: Floats = np.mean(found, axis=0)
    return result


def _fitted(
    world: World, kept: npt.NDArray[np.bool_], worlds: Worlds, out: set[str] | None = None
) -> CombinedScore:
    rows = l2_normalise(world.fit.features)[kept]
    labels = [label for label, keep in zip(world.fit.labels, kept, strict=True) if keep]
    head = GaussianHead.from_statistics([ClassStatistics.fit(rows, labels)])
    reference = l2_normalise(world.calibration.features)
    reference = reference[~_of(world.calibration.labels, out or set())]
    return CombinedScore(head, reference, parts=worlds.package.manifest.feature_parts)


def _aurocs(score: CombinedScore, known: Floats, foreign: Floats) -> Floats:
    """The AUROC of each choice, float64 [choices]."""
    return np.array(
        [
            auroc(*(joined(views, score.view_scale, shares) for views in (known, foreign)))
            for shares in map(log_shares, CHOICES)
        ]
    )


def _of(labels: Sequence[str], names: set[str]) -> npt.NDArray[np.bool_]:
    return np.array([label in names for label in labels])
