"""The family `bottleneck`: a small perceptron beside a block (AdaptFormer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.base import RANK, Floats, Shapes, uniform, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Bottleneck:
    """A small perceptron beside the module: `y + s (relu(x Wd' + bd) Wu' + bu)`.

    AdaptFormer (Chen et al., 2022), equation 4, without dropout; s = 0.1 as in the paper. The
    up-projection starts at zero, the down-projection as a linear layer does.
    """

    name = "bottleneck"
    settings: Mapping[str, float] = {"scale": 0.1}
    kinds: frozenset[Kind] = frozenset({"block"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = True
    pads = True
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset({"up.bias", "up.weight"})

    def shapes(self, site: Site) -> Shapes:
        """Down- and up-projection, each with a bias."""
        return {
            "down.bias": (RANK,),
            "down.weight": (RANK, site.dim),
            "up.bias": (site.dim,),
            "up.weight": (site.dim, RANK),
        }

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Uniform in ±1/sqrt(dim) below, zero above."""
        return {
            "down.bias": zeros(rank),
            "down.weight": uniform(rng, (rank, site.dim), site.dim),
            "up.bias": zeros(site.dim),
            "up.weight": zeros(site.dim, rank),
        }

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds the perceptron's output to the module's."""
        from torch.nn import functional as F  # noqa: N812, PLC0415 - folding needs no torch

        del site
        inner = F.relu(F.linear(x, params["down.weight"], params["down.bias"]))
        update = F.linear(inner, params["up.weight"], params["up.bias"])
        return y + self.settings["scale"] * update
