"""The family `bitfit`: biases, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.affine import Affine, Doubles
from exporter.families.base import Floats, Shapes, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor


class BitFit:
    """A change of every bias: `y + b`.

    BitFit (Ben Zaken et al., 2022), section 3. The key projection's bias is left out: it adds the
    same to all scores of a query, which the softmax cancels.
    """

    name = "bitfit"
    settings: Mapping[str, float] = {}
    kinds: frozenset[Kind] = frozenset({"block", "linear", "norm", "query", "value"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = False
    pads = False
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset({"bias"})

    def shapes(self, site: Site) -> Shapes:
        """The bias's change."""
        return {"bias": (site.outputs,)}

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Zeros."""
        del rank, rng
        return {"bias": zeros(site.outputs)}

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds the bias."""
        del x, site
        return y + params["bias"]

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """Shifts the module's bias."""
        del site
        return weights.shifted(params["bias"])
