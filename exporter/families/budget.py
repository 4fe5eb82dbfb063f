"""Sharing a budget of parameters among an encoder's sites: where ranks do most good.

Whoever plans an adapter calls it, before training; `families.padded` then feeds sites of different
ranks as one adapter. It computes no gradient: those come from a training program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from exporter.errors import EncoderError
from exporter.families import AdapterFamily, attached_sites
from exporter.families.base import RANK, Floats, Shapes
from exporter.package import Site


def squared_gradients(steps: Iterable[Mapping[str, Floats]]) -> dict[str, float]:
    """How sensitive a task's loss is to each site: the sum of its tensors' squared gradients.

    SPT (He et al., 2023), equation 3 accumulated as in algorithm 1, to first order: moving a
    parameter by its gradient lowers the loss by the gradient's square.

    Args:
        steps: The gradient of the loss by tensor name, `"<site>/<param>"`, on batches of samples;
            taken at an adapter's fresh tensors, before training.

    Returns:
        Sensitivity by site.
    """
    totals: dict[str, float] = {}
    for gradients in steps:
        for name, gradient in gradients.items():
            site = name.rsplit("/", 1)[0]
            square = float(np.square(gradient, dtype=np.float64).sum())
            totals[site] = totals.get(site, 0.0) + square
    return totals


def by_depth(names: Iterable[str]) -> dict[str, float]:
    """Sensitivity without data: each deeper block counts twice the one before.

    Args:
        names: Sites; their first number is the block's, names without one come first.

    Example:
        >>> by_depth(["blocks.9.mlp", "blocks.10.mlp"])
        {'blocks.9.mlp': 1.0, 'blocks.10.mlp': 2.0}
    """
    blocks = {name: _block(name) for name in names}
    order = {block: index for index, block in enumerate(sorted(set(blocks.values())))}
    return {name: 2.0 ** order[block] for name, block in blocks.items()}


def allocate(
    sensitivity: Mapping[str, float],
    budget_parameters: int,
    family: AdapterFamily,
    sites: Mapping[str, int | Site],
    *,
    max_rank: int = 64,
) -> dict[str, int]:
    """Gives each site a rank so that all of them together keep to a number of parameters.

    One rank after another goes to the site with the most sensitivity for each parameter it would
    then have in ranks (the method of highest averages): ranks are proportional to sensitivity, a
    larger budget never takes a rank away, and nothing depends on the order of the sites.

    Args:
        sensitivity: By site, as `squared_gradients` or `by_depth` give it; a site that is missing
            gets no rank.
        budget_parameters: Numbers that the adapter may have.
        family: A family with a rank.
        sites: All of the encoder's sites.
        max_rank: No site gets more.

    Returns:
        The rank of every site of the family; 0 is no adapter there.

    Raises:
        EncoderError: The family's sites cannot differ in rank, or a sensitivity is not usable.
    """
    if not family.pads:
        raise EncoderError(f"sites of the family {family.name!r} cannot differ in rank")
    chosen = attached_sites(family, sites)
    weights = {name: float(sensitivity.get(name, 0.0)) for name in chosen}
    for name, weight in weights.items():
        if not np.isfinite(weight) or weight < 0:
            raise EncoderError(f"site {name!r} has the sensitivity {weight}, expected 0 or more")
    costs = {name: _cost(family.shapes(site)) for name, site in chosen.items()}
    ranks = dict.fromkeys(chosen, 0)
    left = budget_parameters
    while True:
        prices = {
            name: costs[name][1] + (costs[name][0] if ranks[name] == 0 else 0)
            for name in chosen
            if weights[name] > 0 and ranks[name] < max_rank
        }
        if not prices:
            return ranks
        # Stopping at the first that does not fit, and not looking for a cheaper one, is what
        # makes a larger budget give every site at least as much.
        best = max(
            sorted(prices), key=lambda name: weights[name] / ((ranks[name] + 1) * costs[name][1])
        )
        if prices[best] > left:
            return ranks
        ranks[best] += 1
        left -= prices[best]


def _cost(shapes: Shapes) -> tuple[int, int]:
    """Parameters of a site that any rank brings along, and those of one rank."""
    fixed, each = 0, 0
    for shape in shapes.values():
        size = math.prod(int(axis) for axis in shape if axis != RANK)
        if RANK in shape:
            each += size
        else:
            fixed += size
    return fixed, each


def _block(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found.group()) if found else -1
