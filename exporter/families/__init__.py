"""Adapter families: the mathematics of each, written once, and the registry that names them.

The suffix is captured with these functions inside, so the training program and every ONNX graph
compute the same thing. A new family is one file here and a line in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from exporter.errors import EncoderError
from exporter.families.base import RANK, AdapterFamily, Floats, LinearFamily, Shapes
from exporter.families.bitfit import BitFit
from exporter.families.bottleneck import Bottleneck
from exporter.families.compacter import Compacter
from exporter.families.hydra import Hydra
from exporter.families.ia3 import Ia3
from exporter.families.lora import Lora
from exporter.families.prefix import Prefix
from exporter.families.sparse import Sparse
from exporter.families.ssf import Ssf
from exporter.package import Site

__all__ = [
    "RANK",
    "TRAINING_FREE",
    "AdapterFamily",
    "LinearFamily",
    "adapter_family",
    "attached_sites",
    "family_names",
    "initial_tensors",
    "largest_rank",
    "nested",
    "padded",
    "rank_axes",
    "tensor_shapes",
    "truncate",
]

# Class statistics on the bare encoder's features: no tensors, no graph. A bundle of it says
# `frozen`.
TRAINING_FREE = "gaussian"

_FAMILIES: dict[str, AdapterFamily] = {
    family.name: family
    for family in (
        Bottleneck(), Lora(), Ssf(), Prefix(), Compacter(), Hydra(), BitFit(), Ia3(), Sparse(),
    )
}  # fmt: skip

# An array or a torch tensor: both are cut in the same way.
_Value = TypeVar("_Value", bound=Any)


def family_names(*, training_free: bool = False) -> tuple[str, ...]:
    """The families an encoder can be built for, sorted.

    Args:
        training_free: List `gaussian` too, which has no tensors and needs no graph.
    """
    return tuple(sorted([*_FAMILIES, *([TRAINING_FREE] if training_free else [])]))


def adapter_family(name: str) -> AdapterFamily:
    """Finds a family by name.

    Raises:
        EncoderError: There is no such family, or it has no tensors.
    """
    if name == TRAINING_FREE:
        raise EncoderError(f"the family {name!r} is class statistics alone; it has no tensors")
    if name not in _FAMILIES:
        raise EncoderError(f"no adapter family {name!r}; there is {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def attached_sites(family: AdapterFamily, sites: Mapping[str, int | Site]) -> dict[str, Site]:
    """The sites that a family attaches to, sorted by name.

    Args:
        family: The family.
        sites: An encoder's sites; a number of channels stands for a block's site.

    Raises:
        EncoderError: None of them is of a kind that the family attaches to.
    """
    every = {n: s if isinstance(s, Site) else Site(s) for n, s in sorted(sites.items())}
    for kinds in (family.kinds, family.otherwise):
        if chosen := {name: site for name, site in every.items() if site.kind in kinds}:
            return chosen
    wanted = " or ".join(sorted(family.kinds | family.otherwise))
    found = ", ".join(sorted({site.kind for site in every.values()})) or "none"
    raise EncoderError(
        f"the family {family.name!r} attaches to sites of kind {wanted}; the encoder has {found}"
    )


def tensor_shapes(family: AdapterFamily, sites: Mapping[str, int | Site]) -> Shapes:
    """Names and shapes of an adapter's tensors over its sites, `"<site>/<param>"`, sorted."""
    shapes = {
        f"{name}/{param}": shape
        for name, site in attached_sites(family, sites).items()
        for param, shape in family.shapes(site).items()
    }
    return dict(sorted(shapes.items()))


def initial_tensors(
    family: AdapterFamily, sites: Mapping[str, int | Site], rank: int, seed: int
) -> dict[str, Floats]:
    """Fresh tensors for a whole adapter; with them the suffix computes what the base does.

    Args:
        family: The family.
        sites: All of the encoder's sites; those that the family attaches to are taken.
        rank: The adapter's rank; a family without one ignores it.
        seed: The same seed gives the same tensors.
    """
    rng = np.random.default_rng(seed)
    return {
        f"{name}/{param}": value
        for name, site in attached_sites(family, sites).items()
        for param, value in family.initial(site, rank, rng).items()
    }


def truncate(family: AdapterFamily, tensors: Mapping[str, _Value], rank: int) -> dict[str, _Value]:
    """Keeps the first ranks of an adapter; one trained with `nested` stays good (DyLoRA).

    Args:
        family: The adapter's family; one without a rank is refused.
        tensors: The adapter, as arrays or as torch tensors, which keep their gradients. Sites
            may differ in rank; one that has less is left as it is.
        rank: How many ranks to keep, at least 1.

    Raises:
        EncoderError: The family has no rank, or `rank` is below 1.
    """
    if rank < 1:
        raise EncoderError(f"cannot keep {rank} ranks of an adapter; keep at least 1")
    if not family.ranked:
        raise EncoderError(f"the family {family.name!r} has no rank")
    axes = rank_axes(family)
    return {
        name: value[tuple(slice(rank) if a in axes[_param(name)] else slice(None)
                          for a in range(len(value.shape)))]
        for name, value in tensors.items()
    }  # fmt: skip


def nested(
    family: AdapterFamily, tensors: Mapping[str, _Value], rank: int, rng: np.random.Generator
) -> dict[str, _Value]:
    """One training step's share of an adapter: its first b ranks, b uniform in 1 to `rank`.

    DyLoRA (Valipour et al., 2023), algorithm 1, with all parts of the b ranks updated: the first
    ranks take part in most steps, so they come to hold what matters most, and `truncate` can
    leave the others out. Families without a rank are trained whole.
    """
    if not family.ranked:
        return dict(tensors)
    return truncate(family, tensors, int(rng.integers(1, rank, endpoint=True)))


def largest_rank(family: AdapterFamily, tensors: Mapping[str, _Value]) -> int:
    """The rank of an adapter, the largest of its sites'; 1 in a family without a rank."""
    axes = rank_axes(family)
    ranks = [v.shape[a] for name, v in tensors.items() for a in axes.get(_param(name), ())]
    return int(max(ranks, default=1))


def padded(
    family: AdapterFamily, sites: Mapping[str, int | Site], tensors: Mapping[str, Floats]
) -> dict[str, Floats]:
    """Gives all sites one rank, as graphs and programs expect it: zeros behind a site's own.

    Args:
        family: The family; its ranks must be parts of a sum.
        sites: All of the encoder's sites.
        tensors: An adapter whose sites may have ranks of their own. A site without tensors has
            rank 0: it stays as the base model has it.

    Returns:
        Tensors at every site of the family with which the suffix computes the same.

    Raises:
        EncoderError: Zeros are not neutral in this family, or the tensors are not of its sites.
    """
    shapes = tensor_shapes(family, sites)
    if not family.pads:
        raise EncoderError(f"sites of the family {family.name!r} cannot differ in rank")
    if unknown := sorted(set(tensors) - set(shapes)):
        raise EncoderError(f"adapter tensor {unknown[0]!r} is none of {family.name!r} here")
    rank = largest_rank(family, tensors)
    whole: dict[str, Floats] = {}
    for name, shape in shapes.items():
        whole[name] = np.zeros([rank if axis == RANK else int(axis) for axis in shape], np.float32)
        if name in tensors:
            whole[name][tuple(slice(n) for n in tensors[name].shape)] = tensors[name]
    return whole


def _param(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def rank_axes(family: AdapterFamily) -> dict[str, tuple[int, ...]]:
    """The axes of each of a site's tensors that are the rank's; they do not depend on the site."""
    shapes = family.shapes(Site(4, heads=1)).items()
    return {key: tuple(a for a, n in enumerate(shape) if n == RANK) for key, shape in shapes}
