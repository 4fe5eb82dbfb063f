"""The family `compacter`: a perceptron whose weights are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.families.base import RANK, Floats, Shapes, uniform, zeros
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = 4


class Compacter:
    """A perceptron behind the module: `y + gelu(y Wd + bd) Wu + bu`, its weights hypercomplex.

    Compacter (Karimi Mahabadi et al., 2021), equations 4 and 5: `W = sum_i A_i ⊗ (s_i t_i')` with
    n rules A_i of n x n and factors of rank one. The hidden layer is `n * rank` wide, so any rank
    fits; n is 4, or what of 4 and the width has in common. Unlike in the paper every site has its
    own rules.
    """

    name = "compacter"
    settings: Mapping[str, float] = {"parts": float(_PARTS)}
    kinds: frozenset[Kind] = frozenset({"block"})
    otherwise: frozenset[Kind] = frozenset()
    ranked = True
    pads = True
    products: tuple[tuple[str, str], ...] = ()
    linear_in: frozenset[str] = frozenset()

    def shapes(self, site: Site) -> Shapes:
        """Rules and both factors of each projection, and a bias of each."""
        n = int(np.gcd(_PARTS, site.outputs))
        return {
            "down.bias": (n, RANK),
            "down.in": (n, site.outputs // n),
            "down.out": (n, RANK),
            "down.rule": (n, n, n),
            "up.bias": (site.outputs,),
            "up.in": (n, RANK),
            "up.out": (n, site.outputs // n),
            "up.rule": (n, n, n),
        }

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Uniform everywhere but for the last factor and the biases, which are zero."""
        n = int(np.gcd(_PARTS, site.outputs))
        width = site.outputs // n
        return {
            "down.bias": zeros(n, rank),
            "down.in": uniform(rng, (n, width), width),
            "down.out": uniform(rng, (n, rank), 1),
            "down.rule": uniform(rng, (n, n, n), n),
            "up.bias": zeros(site.outputs),
            "up.in": uniform(rng, (n, rank), rank),
            "up.out": zeros(n, width),
            "up.rule": uniform(rng, (n, n, n), n),
        }

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """Adds the perceptron's output to the module's, which is also its input."""
        from torch.nn import functional as F  # noqa: N812, PLC0415 - folding needs no torch

        del x, site
        down = _kronecker(params["down.rule"], params["down.in"], params["down.out"])
        inner = F.gelu(y @ down + params["down.bias"].flatten())
        up = _kronecker(params["up.rule"], params["up.in"], params["up.out"])
        return y + (inner @ up + params["up.bias"])


def _kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`sum_i rule_i ⊗ (left_i right_i')`: [i, n, n], [i, p] and [i, q] to [n * p, n * q]."""
    product = rule[:, :, None, :, None] * (left[:, :, None] * right[:, None, :])[:, None, :, None]
    return product.sum(0).flatten(0, 1).flatten(1)
