"""Adapter families: the mathematics of each, written once, and the registry that names them.

The suffix is captured with these functions inside, so the training program and every ONNX graph
compute the same thing. A new family is one class here and a line in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.errors import EncoderError

RANK = "rank"


class AdapterFamily(Protocol):
    """What a family must say about itself.

    Attributes:
        name: The word for it in manifests, bundles and the command line.
        settings: Its fixed numbers, recorded in every encoder package.
    """

    name: str
    settings: Mapping[str, float]

    def shapes(self, dim: int) -> dict[str, tuple[int | str, ...]]:
        """The tensors at one site of `dim` channels; `"rank"` stands for the adapter's rank."""

    def initial(self, dim: int, rank: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Fresh tensors for one site, float32; with them the site computes what it did."""

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The adapted output of a module that maps `x` to `y`, channels last."""


class Bottleneck:
    """A small perceptron beside the module: `y + s (relu(x Wd' + bd) Wu' + bu)`.

    AdaptFormer (Chen et al., 2022), equation 4, without dropout; s = 0.1 as in the paper. The
    up-projection starts at zero, the down-projection as a linear layer does.
    """

    name = "bottleneck"
    settings: Mapping[str, float] = {"scale": 0.1}

    def shapes(self, dim: int) -> dict[str, tuple[int | str, ...]]:
        """Down- and up-projection, each with a bias."""
        return {
            "down.bias": (RANK,),
            "down.weight": (RANK, dim),
            "up.bias": (dim,),
            "up.weight": (dim, RANK),
        }

    def initial(
        self, dim: int, rank: int, rng: np.random.Generator
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Uniform in ±1/sqrt(dim) below, zero above."""
        bound = dim**-0.5
        return {
            "down.bias": np.zeros(rank, np.float32),
            "down.weight": rng.uniform(-bound, bound, (rank, dim)).astype(np.float32),
            "up.bias": np.zeros(dim, np.float32),
            "up.weight": np.zeros((dim, rank), np.float32),
        }

    def apply(self, x: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Adds the perceptron's output to the module's."""
        inner = F.relu(F.linear(x, params["down.weight"], params["down.bias"]))
        update = F.linear(inner, params["up.weight"], params["up.bias"])
        return y + self.settings["scale"] * update


_FAMILIES: dict[str, AdapterFamily] = {family.name: family for family in (Bottleneck(),)}


def adapter_family(name: str) -> AdapterFamily:
    """Finds a family by name.

    Raises:
        EncoderError: There is no such family.
    """
    if name not in _FAMILIES:
        raise EncoderError(f"no adapter family {name!r}; there is {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def tensor_shapes(
    family: AdapterFamily, dims: Mapping[str, int]
) -> dict[str, tuple[int | str, ...]]:
    """Names and shapes of an adapter's tensors over all sites, `"<site>/<param>"`, sorted."""
    shapes = {
        f"{site}/{param}": shape
        for site, dim in dims.items()
        for param, shape in family.shapes(dim).items()
    }
    return dict(sorted(shapes.items()))


def initial_tensors(
    family: AdapterFamily, dims: Mapping[str, int], rank: int, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Fresh tensors for a whole adapter; with them the suffix computes what the base does.

    Args:
        family: The family.
        dims: Channels of every site.
        rank: The adapter's rank.
        seed: The same seed gives the same tensors.
    """
    rng = np.random.default_rng(seed)
    return {
        f"{site}/{param}": value
        for site, dim in sorted(dims.items())
        for param, value in family.initial(dim, rank, rng).items()
    }
