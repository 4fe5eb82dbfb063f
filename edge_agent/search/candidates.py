"""What can be searched: adapters by family, sites and rank, their size and their first tensors.

The ranking and the strategies call it; nothing here runs the encoder. Torch comes in only with the
families' initial tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.package import EncoderPackage

Floats = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Candidate:
    """One adapter that could be trained.

    Attributes:
        family: The adapter family.
        sites: Where it acts, sorted; everywhere else the encoder stays as it is.
        rank: Its rank.
    """

    family: str
    sites: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class Budget:
    """What an adapter may cost.

    Attributes:
        max_parameters: Numbers it may consist of.
        max_latency_ms: Time one sample's adapted suffix may take, as the caller measures it.
    """

    max_parameters: int
    max_latency_ms: float = math.inf


def family_sites(package: EncoderPackage, family: str) -> tuple[str, ...]:
    """The sites a family attaches to in an encoder, first to last."""
    names = {name.rsplit("/", 1)[0] for name in package.family(family).tensors}
    return tuple(sorted(names, key=_in_numeric_order))


def propose(
    package: EncoderPackage, families: Sequence[str], rank: int, limit: int
) -> list[Candidate]:
    """A small spread of candidates: all sites and the last half, at and around a rank.

    Args:
        package: The encoder.
        families: The families to consider.
        rank: The rank to vary around.
        limit: How many at most; families take turns, the plain choice of each comes first.
    """
    turns: list[list[Candidate]] = []
    for family in families:
        every = family_sites(package, family)
        last = every[len(every) // 2 :]
        shapes = package.family(family).tensors.values()
        ranked = any("rank" in shape for shape in shapes)
        ranks = (rank, max(rank // 2, 1), rank * 2) if ranked else (rank,)
        mine = [Candidate(family, sites, r) for r in ranks for sites in (every, last)]
        turns.append(list(dict.fromkeys(mine)))
    longest = max((len(turn) for turn in turns), default=0)
    order = [turn[k] for k in range(longest) for turn in turns if k < len(turn)]
    return order[:limit]


def parameters(package: EncoderPackage, candidate: Candidate) -> int:
    """How many numbers a candidate consists of, at its own sites."""
    return sum(
        math.prod(candidate.rank if axis == "rank" else int(axis) for axis in shape)
        for name, shape in package.family(candidate.family).tensors.items()
        if name.rsplit("/", 1)[0] in candidate.sites
    )


def active(candidate: Candidate, name: str) -> bool:
    """Whether a tensor belongs to one of the candidate's sites."""
    return name.rsplit("/", 1)[0] in candidate.sites


def first_tensors(package: EncoderPackage, candidate: Candidate, seed: int) -> dict[str, Floats]:
    """A candidate's tensors before training, at all sites of its family.

    With them the suffix computes what the base does. At sites that are not the candidate's they
    are zero, or, in a family where zeros are not neutral, initial values that follow from the seed.
    """
    from exporter.families import adapter_family, initial_tensors  # noqa: PLC0415

    family = adapter_family(candidate.family)
    fresh = initial_tensors(family, package.manifest.sites, candidate.rank, seed)
    neutral = family.pads or not family.ranked
    return {
        name: np.zeros_like(value) if neutral and not active(candidate, name) else value
        for name, value in fresh.items()
    }


def extended(
    package: EncoderPackage,
    candidate: Candidate,
    tensors: Mapping[str, Floats],
    seed: int,
) -> dict[str, Floats]:
    """Trained tensors with fresh parts behind them up to a candidate's rank.

    Args:
        package: The encoder.
        candidate: What to grow into: the same family and sites, a rank no lower.
        tensors: A trained adapter.
        seed: Seed of the fresh parts.

    Returns:
        Tensors with which the suffix computes what it does with those given, in families whose
        rank is a sum of parts.
    """
    whole = first_tensors(package, candidate, seed)
    for name, value in tensors.items():
        whole[name][tuple(slice(size) for size in value.shape)] = value
    return whole


def _in_numeric_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
