"""A bundle of a merged adapter: measured on every task's own samples before anybody saves it.

Merged tensors alone are no bundle: what classes look like in the merged adapter's space only
samples say. Each task's samples are split; one part gives the statistics, the other says how a
device would answer with all bundles installed and with the merged one alone. `driftkeel merge`
calls it; it reads and writes no file and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import FROZEN, Bundle, bundle_digest, check_compatible, pack, unpack
from edge_agent.decision import GroupsDecision
from edge_agent.errors import TrainingDataError
from edge_agent.fit import Labelled, split
from exporter.errors import EncoderError
from exporter.families import adapter_family, largest_rank
from exporter.merging import Change, Merged
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
from ood.calibration import score_quantiles
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise

_BATCH: Final = 32
_MAX_ROUNDS: Final = 4
_TASK_LENGTH: Final = 200

Floats = NDArray[np.float32]
Names = NDArray[np.object_]
Adapters = Sequence[Mapping[str, Floats]]
Importances = Callable[[], list[Change]]
# Merges adapters: given their family, tensors, numbers of samples and, when called, how much each
# of their numbers matters on their own samples.
Way = Callable[[str, Adapters, Sequence[int], Importances], Merged]


@dataclass(frozen=True)
class Measured:
    """How one task fares.

    Attributes:
        task: Its name.
        samples: Held-out samples it was measured on.
        base: Accuracy with no adapter, all tasks' labels to choose from, 0..1.
        apart: With all bundles installed.
        statistics: With the merged bundle's statistics alone, its adapter changing nothing: what
            of its gain is the samples' and not the adapter's.
        merged: With the merged bundle alone.
    """

    task: str
    samples: int
    base: float
    apart: float
    statistics: float
    merged: float


@dataclass(frozen=True)
class MergedBundle:
    """A merged bundle and what it is worth.

    Attributes:
        data: The bundle, packed.
        tasks: One entry a task, in the order of the bundles.
        kept: The share of the merged products that the rank holds, 0..1.
    """

    data: bytes
    tasks: tuple[Measured, ...]
    kept: float


@dataclass(frozen=True, eq=False)
class _Task:
    """One task's samples, encoded: base features, and whether a sample is held out."""

    hidden: Floats
    base: Floats
    labels: Names
    held: NDArray[np.bool_]


def merge_bundles(
    sessions: EncoderSessions,
    packed: Sequence[bytes],
    samples: Sequence[Labelled],
    way: Way,
    *,
    created_at: float,
    created_by: str,
    holdout: float = 0.3,
) -> MergedBundle:
    """Merges bundles into one and measures it on every task.

    Args:
        sessions: The encoder.
        packed: The bundles, at least two, of one family.
        samples: Each bundle's labelled samples; better ones that it was not trained on, or what
            is measured is too good.
        way: Merges adapters; importances need torch, and are computed when it asks for them.
        created_at: Seconds since the epoch.
        created_by: Who merges.
        holdout: Share of every class that is measured on and not learned from.

    Raises:
        WrongEncoderError: A bundle belongs to another encoder.
        EncoderError: A bundle has no adapter or another family's, or they cannot be merged.
        TrainingDataError: Samples do not belong to their bundle, or are too few.
    """
    bundles = [unpack(data) for data in packed]
    family = _check(sessions, bundles, samples)
    tasks = [_encoded(sessions, each, holdout) for each in samples]
    made = way(
        family,
        [bundle.tensors for bundle in bundles],
        [bundle.manifest.samples for bundle in bundles],
        lambda: _importances(sessions, bundles, tasks),
    )
    base = bundles[0].base
    for bundle in bundles[1:]:
        base = base.merge(bundle.base)
    held = np.concatenate([task.base[task.held] for task in tasks])
    learned = np.concatenate([task.base[~task.held] for task in tasks])
    first = bundles[0].manifest
    manifest = msgspec.structs.replace(
        first,
        rank=largest_rank(adapter_family(family), made.tensors),
        labels=base.labels,
        task=" + ".join(bundle.manifest.task for bundle in bundles)[:_TASK_LENGTH],
        created_at=created_at,
        created_by=created_by,
        parents=tuple(sorted(bundle_digest(data) for data in packed)),
        samples=base.samples,
        metrics={},
        shapes={},
        score_quantiles=tuple(
            score_quantiles(MahalanobisScore.from_statistics([base]).score(held))
        ),
    )
    described = signature(learned, seed=first.encoder)

    def bundle_of(tensors: Mapping[str, Floats]) -> Bundle:
        own = _own_statistics(sessions, tasks, tensors, family)
        return Bundle(manifest, tensors, base, own, described)

    draft = bundle_of(made.tensors)
    # What is measured is what ships: rounded as the codec and the compact form demand.
    alone = unpack(pack(draft))
    nothing = {name: np.zeros_like(value) for name, value in made.tensors.items()}
    neutral = unpack(pack(bundle_of(nothing)))
    measured = tuple(
        Measured(
            task=bundle.manifest.task,
            samples=int(task.held.sum()),
            base=_accuracy(sessions, [replace(b, tensors={}) for b in bundles], task),
            apart=_accuracy(sessions, bundles, task),
            statistics=_accuracy(sessions, [neutral], task),
            merged=_accuracy(sessions, [alone], task),
        )
        for bundle, task in zip(bundles, tasks, strict=True)
    )
    total = sum(task.samples for task in measured)
    metrics = {
        "held_out_samples": float(total),
        "held_out_accuracy": sum(task.merged * task.samples for task in measured) / total,
    }
    data = pack(replace(draft, manifest=msgspec.structs.replace(manifest, metrics=metrics)))
    return MergedBundle(data, measured, made.kept)


def _check(
    sessions: EncoderSessions, bundles: Sequence[Bundle], samples: Sequence[Labelled]
) -> str:
    """The family of all bundles; refuses bundles and samples that do not belong together."""
    if len(bundles) < 2 or len(bundles) != len(samples):
        raise TrainingDataError(
            f"found {len(bundles)} bundles and {len(samples)} sets of samples; "
            "give at least two bundles and the samples of each"
        )
    family = bundles[0].manifest.family
    for bundle, given in zip(bundles, samples, strict=True):
        manifest = bundle.manifest
        check_compatible(bundle, sessions.package.interface())
        if manifest.family == FROZEN:
            raise EncoderError(f"the bundle {manifest.task!r} has no adapter to merge")
        if manifest.family != family:
            raise EncoderError(
                f"the bundle {manifest.task!r} is of the family {manifest.family!r}, the first of "
                f"{family!r}; adapters of one family can be merged"
            )
        if odd := sorted(set(manifest.labels) ^ set(given.labels)):
            where = "its samples" if odd[0] in manifest.labels else "it"
            raise TrainingDataError(
                f"the bundle {manifest.task!r} and its samples differ: {where} have no class "
                f"{odd[0]!r}"
            )
    return family


def _encoded(sessions: EncoderSessions, samples: Labelled, holdout: float) -> _Task:
    hidden = np.concatenate(
        [
            sessions.prefix(prepare(samples.images[at : at + _BATCH], sessions.package))
            for at in range(0, len(samples.images), _BATCH)
        ]
    )
    return _Task(
        hidden=hidden,
        base=sessions.base_features(hidden),
        labels=np.array(samples.labels, dtype=object),
        held=split(samples.labels, holdout=holdout, seed=0),
    )


def _importances(
    sessions: EncoderSessions, bundles: Sequence[Bundle], tasks: Sequence[_Task]
) -> list[Change]:
    """How much each adapter's numbers matter on its task's samples that are not held out."""
    from edge_agent.importance import importances  # noqa: PLC0415 - torch, for one way of merging

    return importances(
        sessions.package,
        bundles,
        [task.hidden[~task.held] for task in tasks],
        [task.labels[~task.held] for task in tasks],
    )


def _own(
    sessions: EncoderSessions,
    hidden: Floats,
    tensors: Mapping[str, Floats],
    family: str,
    width: int,
) -> Floats:
    """The first features with an adapter, normalised: float32 [n, width]."""
    return l2_normalise(sessions.suffix(hidden, tensors, family)[:, :width])


def _own_statistics(
    sessions: EncoderSessions, tasks: Sequence[_Task], tensors: Mapping[str, Floats], family: str
) -> ClassStatistics:
    """Class statistics of all tasks' samples that are not held out, in an adapter's space."""
    width = sessions.package.network_dim
    own = [_own(sessions, task.hidden[~task.held], tensors, family, width) for task in tasks]
    names = np.concatenate([task.labels[~task.held] for task in tasks])
    return ClassStatistics.fit(np.concatenate(own), list(names))


def _accuracy(sessions: EncoderSessions, bundles: Sequence[Bundle], task: _Task) -> float:
    """The share of a task's held-out samples that a device with these bundles gets right."""
    decision = GroupsDecision(
        [bundle.base for bundle in bundles],
        [bundle.own if bundle.tensors else None for bundle in bundles],
        max_rounds=_MAX_ROUNDS,
    )
    hidden = task.hidden[task.held]

    def own_features(group: int, rows: NDArray[np.int64]) -> Floats:
        bundle = bundles[group]
        family = bundle.manifest.family
        return _own(sessions, hidden[rows], bundle.tensors, family, bundle.own.dim)

    found = decision.route(task.base[task.held], own_features).label
    answers = np.array(decision.labels, dtype=object)[found]
    return float(np.mean(answers == task.labels[task.held]))
