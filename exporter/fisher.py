"""How much every number of an adapter matters to what it predicts: its diagonal Fisher information.

What `merging.by_importance` weighs adapters by. It needs torch and the training program, so only a
process that merges this way imports it; what the features are classified by is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporter.merging import Change, read_back, spelt_out

Program = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def diagonal_fisher(
    program: Program,
    family_name: str,
    change: Change,
    hidden: npt.NDArray[np.float32],
    log_probabilities: Callable[[Tensor], Tensor],
) -> Change:
    """The diagonal of the Fisher information of what an adapter changes.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (2022): the mean over samples
    of E[(∂ log p(y | x) / ∂θ)²], y drawn from the model's own predictive distribution. The
    expectation is summed over all classes instead of drawn, so the result is a function of the set
    of samples alone. Given labels are not used: with them it would be the empirical Fisher
    information, which is no measure of curvature and vanishes on samples that the adapter has
    learned (Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
    Gradient Descent", 2019).

    Factors that act through their product are measured as the product, exactly (`spelt_out`): the
    Fisher information of factors is another for every basis, and they are not what is merged.

    Args:
        program: The suffix as torch differentiates it.
        family_name: The adapter's family.
        change: What the adapter changes, as `merging.changes_of` gives it.
        hidden: Its samples' values from the prefix, float32 [n, ...], n at least 1.
        log_probabilities: Of every class, float32 [b, c], given features [b, d].

    Returns:
        The information by the names of `change`, of the same shapes, 0 or more.
    """
    tensors = {
        name: torch.from_numpy(value).requires_grad_()
        for name, value in spelt_out(family_name, change).items()
    }
    leaves = list(tensors.values())
    totals = [torch.zeros(leaf.shape, dtype=torch.float64) for leaf in leaves]
    for row in range(len(hidden)):
        given = torch.from_numpy(np.ascontiguousarray(hidden[row : row + 1], dtype=np.float32))
        (likely,) = log_probabilities(program(given, tensors))
        shares = likely.detach().exp()
        for label, share in enumerate(shares.tolist()):
            gradients = torch.autograd.grad(
                likely[label], leaves, retain_graph=label + 1 < len(shares), materialize_grads=True
            )
            for total, gradient in zip(totals, gradients, strict=True):
                total.addcmul_(gradient.double(), gradient.double(), value=share)
    means = {name: total.numpy() / len(hidden) for name, total in zip(tensors, totals, strict=True)}
    return read_back(change, means)
