"""How much the numbers of each bundle's adapter matter on its own task, for Fisher merging.

Says what is classified and how: `exporter.fisher` does the rest. It needs torch, so `merged`
imports it only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapter_store.bundle import Bundle
from edge_agent.objectives import CosineHead
from exporter.fisher import diagonal_fisher
from exporter.merging import Change, aligned
from exporter.package import EncoderPackage
from exporter.programs import load_training_program

_MOST_SAMPLES: Final = 1024  # each costs a pass backwards for every class


def importances(
    package: EncoderPackage,
    bundles: Sequence[Bundle],
    hidden: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.object_]],
) -> list[Change]:
    """The diagonal Fisher information of each bundle's adapter on samples of its task.

    The likelihood is that of what adapters are trained for: a cosine head over the bundle's own
    classes, here with their means as rows, since the trained head is not part of a bundle. Labels
    only spread the samples over the classes where there are more than 1,024.

    Args:
        package: The encoder.
        bundles: Bundles of one family.
        hidden: For each, its samples' values from the prefix, float32 [n, ...].
        labels: For each, its samples' labels [n].

    Returns:
        For each, by the names and of the shapes that `merging.aligned` gives the changes.
    """
    family = bundles[0].manifest.family
    program = load_training_program(package, family)
    found = []
    changes = aligned(family, [bundle.tensors for bundle in bundles])
    for bundle, change, rows, names in zip(bundles, changes, hidden, labels, strict=True):
        head = CosineHead(bundle.own.means.astype(np.float32))

        def likely(features: Tensor, head: CosineHead = head) -> Tensor:
            return torch.log_softmax(head.logits(features), dim=1)

        chosen = rows[_spread(names)]
        found.append(diagonal_fisher(program, family, change, chosen, likely))
    return found


def _spread(names: NDArray[np.object_]) -> NDArray[np.intp]:
    """All rows, or as many as are used at most, every class with its share."""
    rows = np.argsort(names.astype(str), kind="stable")
    count = min(len(rows), _MOST_SAMPLES)
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.intp)]
