"""What an adapter family is, and the kinds of places in a network that one attaches to.

Every family's file builds on this, and the registry in the package's `__init__` lists them. It
computes nothing and knows no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from exporter.families.affine import Affine, Doubles
from exporter.package import Kind, Site

if TYPE_CHECKING:
    from torch import Tensor

RANK = "rank"

Shapes = dict[str, tuple[int | str, ...]]
Floats = npt.NDArray[np.float32]


class AdapterFamily(Protocol):
    """What a family must say about itself.

    Attributes:
        name: The word for it in manifests, bundles and the command line.
        settings: Its fixed numbers, recorded in every encoder package.
        kinds: The kinds of sites it attaches to, all of those that an encoder has.
        otherwise: The kinds it attaches to in an encoder that has none of `kinds`.
        ranked: Its tensors have an axis of the adapter's rank.
        pads: A rank is a sum of parts, so rows of zeros behind the others change nothing.
        products: Pairs of tensors that act through their matrix product alone, left and right.
        linear_in: Tensors that the change of a module's output is linear in when the others stay;
            with `pads`, ranks put side by side add up what each of them changes. Empty where
            there is no such split, or where what a rank changes depends on its number.
    """

    name: str
    settings: Mapping[str, float]
    kinds: frozenset[Kind]
    otherwise: frozenset[Kind]
    ranked: bool
    pads: bool
    products: tuple[tuple[str, str], ...]
    linear_in: frozenset[str]

    def shapes(self, site: Site) -> Shapes:
        """The tensors at one site; `"rank"` stands for the adapter's rank."""

    def initial(self, site: Site, rank: int, rng: np.random.Generator) -> dict[str, Floats]:
        """Fresh tensors for one site, float32; with them the site computes what it did.

        Tensors without an axis of the rank must do the same when they are all zero, which is
        what a graph takes when it is fed no adapter.
        """

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor], site: Site) -> Tensor:
        """The adapted output of a module that maps `x` to `y`, channels last."""


@runtime_checkable
class LinearFamily(AdapterFamily, Protocol):
    """A family whose adapted module is the module with other weights."""

    def fold(self, weights: Affine, params: Mapping[str, Doubles], site: Site) -> Affine:
        """The weights with which a module alone computes what `apply` makes of its output.

        Args:
            weights: The module's weights.
            params: The adapter's tensors at this site, in double precision.
            site: Where they attach.

        Raises:
            EncoderError: The module cannot take this adapter into its weights.
        """


def uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Floats:
    """Uniform in ±1/sqrt(fan_in), as a linear layer of so many inputs begins."""
    bound = fan_in**-0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def zeros(*shape: int) -> Floats:
    """Zeros, float32."""
    return np.zeros(shape, np.float32)
