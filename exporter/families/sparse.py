"""The family `sparse`: a change of a linear map's weight at few fixed places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exporter.families.affine import Affine, Doubles
from exporter.families.base import RANK, Floats, Shapes, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = (1 + math.sqrt(5)) / 2


class Sparse:
    """Single entries added to a weight: `y + x D`, D zero but at places chosen beforehand.

    Random masking (Xu and Zhang, "Random Masking Finds Winning Tickets for Parameter-Efficient
    Fine-tuning", ICML 2024): entries of a weight that are chosen without looking at it or at data
    train as well as the factors of LoRA, at a larger learning rate. D has nearly full rank where
    their product has a small one.

    Which entries is a function of the site's shape (`places`), so that an adapter is its values
    alone. A rank is `inputs + outputs` of them, what a rank of `lora` has, and the first ranks'
    places are those of a smaller adapter. Once every entry has a value, further ranks add to the
    same again. Ranks are no sum of like parts (each has its own places), so they cannot be put side
    by side; the mean of two adapters needs no more than the mean of their values.
    """

    name = "sparse"
    settings: Mapping[str, float] = {}
    kinds: frozenset[Kind] = frozenset({"query", "value"})
    otherwise: frozenset[Kind] = frozenset({"block"})
    ranked = True
    pads = True
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset()

    def shapes(self, site: Site) -> Shapes:
        """The values, in the order of their places."""
        return {"values": (RANK, site.dim + site.outputs)}

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Zeros."""
        del rng
        return {"values": zeros(rank, site.dim + site.outputs)}

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds the sparse map's output to the module's."""
        import torch  # noqa: PLC0415 - folding needs no torch

        values = params["values"]
        size = site.outputs * site.dim
        # As `places`, in the graph: the rank, and with it how many there are, is dynamic.
        at = torch.arange(values.shape[0] * (site.dim + site.outputs)) * _stride(size) % size
        entries = torch.zeros(size, dtype=values.dtype).scatter_add(0, at, values.flatten())
        return y + x @ entries.reshape(site.dim, site.outputs)

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """Adds the values to the module's weight."""
        values = params["values"].ravel()
        entries = np.zeros(site.outputs * site.dim)
        np.add.at(entries, places(site, len(values)), values)
        return weights.plus(entries.reshape(site.dim, site.outputs).T)


def places(site: Site, count: int) -> npt.NDArray[np.int64]:
    """Where the first values lie in a matrix [inputs, outputs], row by row: int64 [count].

    `k * stride mod size` visits every entry once before it comes back to the first. A stride of
    about `size / golden ratio` spreads any number of first places evenly: every output has its
    share from the first rank on and every input from the second, which chance would not give them.

    The matrix multiplies from the right, which is how graphs have it: it needs no transposing.

    Args:
        site: The weight's site.
        count: How many values there are.

    Example:
        >>> places(Site(3, out_dim=2), 6).tolist()
        [0, 5, 4, 3, 2, 1]
    """
    size = site.outputs * site.dim
    return np.arange(count, dtype=np.int64) * _stride(size) % size


def _stride(size: int) -> int:
    """The first whole number from `size / golden ratio` on that has no factor in common."""
    stride = max(round(size / _GOLDEN), 1)
    while math.gcd(stride, size) != 1:
        stride += 1
    return stride
