"""The family `hydra`: one low-rank branch beside a block and one behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.affine import Affine, Doubles
from exporter.families.base import RANK, Floats, Shapes, uniform, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Hydra:
    """A parallel and a sequential low-rank map: `y + x Ap' Bp' + y As' Bs'`.

    Hydra (Kim et al., 2023), equation 7; both branches are linear and of the same rank.
    """

    name = "hydra"
    settings: Mapping[str, float] = {"scale": 1.0}
    kinds: frozenset[Kind] = frozenset({"block"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = True
    pads = True
    products: tuple[tuple[str, str], ...] = (
        ("parallel.up", "parallel.down"),
        ("sequential.up", "sequential.down"),
    )
    linear_in: frozenset[str] = frozenset({"parallel.up", "sequential.up"})

    def shapes(self, site: Site) -> Shapes:
        """Two factors for each branch."""
        return {
            "parallel.down": (RANK, site.dim),
            "parallel.up": (site.outputs, RANK),
            "sequential.down": (RANK, site.outputs),
            "sequential.up": (site.outputs, RANK),
        }

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Uniform in ±1/sqrt(dim) below, zero above."""
        return {
            "parallel.down": uniform(rng, (rank, site.dim), site.dim),
            "parallel.up": zeros(site.outputs, rank),
            "sequential.down": uniform(rng, (rank, site.outputs), site.outputs),
            "sequential.up": zeros(site.outputs, rank),
        }

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds both branches to the module's output."""
        from torch.nn import functional as F  # noqa: N812, PLC0415 - folding needs no torch

        del site
        parallel = F.linear(F.linear(x, params["parallel.down"]), params["parallel.up"])
        sequential = F.linear(F.linear(y, params["sequential.down"]), params["sequential.up"])
        return y + self.settings["scale"] * (parallel + sequential)

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """Mixes the module's outputs by the sequential branch and adds the parallel one's product.

        The latter goes around the module, so only one that is linear itself can take it.
        """
        scale = self.settings["scale"]
        sequential = params["sequential.up"] @ params["sequential.down"]
        parallel = params["parallel.up"] @ params["parallel.down"]
        return weights.mixed(np.eye(site.outputs) + scale * sequential).plus(scale * parallel)
