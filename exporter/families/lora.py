"""The family `lora`: a low-rank change of a linear map's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.affine import Affine, Doubles
from exporter.families.base import RANK, Floats, Shapes, uniform, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Lora:
    """A low-rank matrix added to a weight: `y + x A' B'`.

    LoRA (Hu et al., 2022), equation 3, on the query and value projections of the attention, which
    the paper found best at a given size (table 5). A network without attention takes it beside
    its blocks. The paper's factor alpha / r is 1 here, so that leaving ranks out scales nothing.
    """

    name = "lora"
    settings: Mapping[str, float] = {"scale": 1.0}
    kinds: frozenset[Kind] = frozenset({"query", "value"})
    otherwise: frozenset[Kind] = frozenset({"block"})
    ranked = True
    pads = True
    products: tuple[tuple[str, str], ...] = (("up.weight", "down.weight"),)
    linear_in: frozenset[str] = frozenset({"up.weight"})

    def shapes(self, site: Site) -> Shapes:
        """The two factors, without a bias."""
        return {"down.weight": (RANK, site.dim), "up.weight": (site.outputs, RANK)}

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Uniform in ±1/sqrt(dim) below, zero above."""
        return {
            "down.weight": uniform(rng, (rank, site.dim), site.dim),
            "up.weight": zeros(site.outputs, rank),
        }

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds the low-rank map's output to the module's."""
        from torch.nn import functional as F  # noqa: N812, PLC0415 - folding needs no torch

        del site
        update = F.linear(F.linear(x, params["down.weight"]), params["up.weight"])
        return y + self.settings["scale"] * update

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """Adds the product of the factors to the module's weight."""
        del site
        update = params["up.weight"] @ params["down.weight"]
        return weights.plus(self.settings["scale"] * update)
