"""Which of a package's stored weights a site's output depends on linearly.

A module that has weights of its own keeps them under its own name. The places of a transformer
that have none are found by the names that timm gives its weights: a projection of the attention
has rows of the fused one, a perceptron's output is its second map's, and an activation is what
that map's columns multiply. `exporter.fold` reads and writes through here. Names are a convention,
so what was folded is compared with what the adapter computes before it is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.errors import EncoderError
from exporter.families.affine import Affine
from exporter.package import SUFFIX_KEY, Site

Weights = Mapping[str, npt.NDArray[np.generic]]

_FUSED = ("query", "key", "value")


@dataclass(frozen=True)
class Place:
    """Where a site's weights are.

    Attributes:
        weight: Name of the stored weight.
        bias: Name of the stored bias; None where the module has none.
        rows: Its part of both, along the first axis.
        of_input: The weight multiplies what goes into the site.
        by_column: The site's channels are the weight's columns: what multiplies its output.
    """

    weight: str
    bias: str | None
    rows: slice
    of_input: bool
    by_column: bool = False

    def read(self, weights: Weights) -> Affine:
        """The site's weights, in double precision."""
        weight = weights[self.weight].astype(np.float64)[self.rows]
        bias = None if self.bias is None else weights[self.bias].astype(np.float64)[self.rows]
        return Affine(weight.T if self.by_column else weight, bias, self.of_input)

    def written(self, weights: Weights, changed: Affine) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the stored weights with the site's replaced, float32."""
        weight = changed.weight.T if self.by_column else changed.weight
        found = {self.weight: weights[self.weight].astype(np.float32)}
        found[self.weight][self.rows] = weight
        if self.bias is not None and changed.bias is not None:
            found[self.bias] = weights[self.bias].astype(np.float32)
            found[self.bias][self.rows] = changed.bias
        return found


def place(name: str, site: Site, weights: Weights) -> Place:
    """Finds the weights of a site.

    Args:
        name: The site's name.
        site: What it is.
        weights: The suffix's weights by stored name.

    Raises:
        EncoderError: None of the names that are known here is stored.
    """
    own = SUFFIX_KEY + name
    parent, _, last = own.rpartition(".")
    whole = slice(None)
    if f"{own}.weight" in weights:
        of_input = site.kind != "norm"
        return Place(f"{own}.weight", _bias(own, weights), whole, of_input)
    if last in _FUSED and f"{parent}.qkv.weight" in weights:
        at = _FUSED.index(last) * site.outputs
        rows = slice(at, at + site.outputs)
        return Place(f"{parent}.qkv.weight", _bias(f"{parent}.qkv", weights), rows, of_input=True)
    if f"{own}.fc2.weight" in weights:
        second = f"{own}.fc2"
        return Place(f"{second}.weight", _bias(second, weights), whole, of_input=False)
    if site.kind == "activation" and f"{parent}.fc2.weight" in weights:
        return Place(f"{parent}.fc2.weight", None, whole, of_input=False, by_column=True)
    raise EncoderError("it is not known which weights are the module's")


def _bias(module: str, weights: Weights) -> str | None:
    return f"{module}.bias" if f"{module}.bias" in weights else None
