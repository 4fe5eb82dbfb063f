"""The family `ssf`: every operation's output scaled and shifted, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.affine import Affine, Doubles
from exporter.families.base import Floats, Shapes, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Ssf:
    """A scale and a shift of the module's output: `(1 + s) y + b`.

    SSF (Lian et al., 2022), equation 5, after every operation but the key projection: its scale
    does what the query's does, and its shift cancels in the softmax. The scale is stored as its
    difference from one.
    """

    name = "ssf"
    settings: Mapping[str, float] = {}
    kinds: frozenset[Kind] = frozenset({"block", "linear", "norm", "query", "value"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = False
    pads = False
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset({"scale", "shift"})

    def shapes(self, site: Site) -> Shapes:
        """A scale, less one, and a shift."""
        return {"scale": (site.outputs,), "shift": (site.outputs,)}

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Zeros."""
        del rank, rng
        return {"scale": zeros(site.outputs), "shift": zeros(site.outputs)}

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Scales and shifts."""
        del x, site
        return y * (1 + params["scale"]) + params["shift"]

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """Scales the module's weights and shifts its bias."""
        del site
        return weights.scaled(1 + params["scale"]).shifted(params["shift"])
