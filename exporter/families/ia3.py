"""The family `ia3`: keys, values and hidden activations scaled by learned vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.affine import Affine, Doubles
from exporter.families.base import Floats, Shapes, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class Ia3:
    """A learned vector that multiplies the module's output: `(1 + s) y`.

    (IA)³ (Liu et al., 2022), section 3.3: on keys, values and the perceptron's hidden activation.
    The vector is stored as its difference from one.
    """

    name = "ia3"
    settings: Mapping[str, float] = {}
    kinds: frozenset[Kind] = frozenset({"key", "value", "activation"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = False
    pads = False
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset({"scale"})

    def shapes(self, site: Site) -> Shapes:
        """The vector, less one."""
        return {"scale": (site.outputs,)}

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Zeros."""
        del rank, rng
        return {"scale": zeros(site.outputs)}

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Scales."""
        del x, site
        return y * (1 + params["scale"])

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """Scales the module's weights."""
        del site
        return weights.scaled(1 + params["scale"])
