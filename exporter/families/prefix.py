"""The family `prefix`: learned keys and values that every query attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.base import RANK, Floats, Shapes, uniform, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Prefix:
    """Keys and values before the sample's own: `y + softmax(q Pk' / sqrt(d)) Pv`, by head.

    Prefix-tuning (Li and Liang, 2021) puts Pk and Pv before the keys and values, which is
    `(1 - l) Attn(q, K, V) + l Attn(q, Pk, Pv)` (He et al., 2022, equation 7), l being the weight
    that falls on the prefix. Each part is divided by its weight, as LAE does (Gao et al., 2023),
    so that values of zero change nothing, which they could not before the softmax. The rank is
    the prefix's length; of length one, its key has no influence.
    """

    name = "prefix"
    settings: Mapping[str, float] = {}
    kinds: frozenset[Kind] = frozenset({"attention"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = True
    pads = False
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset()

    def shapes(self, site: Site) -> Shapes:
        """Keys and values of all heads together."""
        return {"key": (RANK, site.dim), "value": (RANK, site.dim)}

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Keys of the size that projected tokens have, values of zero."""
        return {"key": uniform(rng, (rank, site.dim), 1), "value": zeros(rank, site.dim)}

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds what the queries `x` [n, t, dim] find in the prefix to the mixed values `y`."""
        width = site.dim // site.heads
        query, key, value = (
            part.reshape(*part.shape[:-1], site.heads, width).transpose(-3, -2)
            for part in (x, params["key"], params["value"])
        )
        scores = (query * width**-0.5) @ key.transpose(-2, -1)
        found: Tensor = (scores.softmax(dim=-1) @ value).transpose(-3, -2).flatten(-2)
        return y + found
