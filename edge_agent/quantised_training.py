"""Training on the weights that a codec will leave: quantisation-aware training.

The training loop calls `quantise` on the adapter before every step's forward pass. Imports torch;
nothing that serves imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_store import codecs
from adapter_store.codecs import Codec


def quantise(tensors: Mapping[str, torch.Tensor], codec: Codec) -> dict[str, torch.Tensor]:
    """Return the tensors as a reader of the bundle will have them, still trainable.

    Forward it is `adapter_store.codecs.quantised` to the last bit; backward it is the identity
    (the straight-through estimator of Bengio, Léonard and Courville 2013). Call it at each step:
    the steps of the codec follow the weights.

    Args:
        tensors: float32, on the CPU.
        codec: how the adapter will be stored.

    Raises:
        NonFiniteBundleError: a weight is NaN or infinite, or too large for the codec.
    """
    if codec == "fp32":
        return dict(tensors)
    stored = codecs.quantised(
        {name: tensor.detach().numpy() for name, tensor in tensors.items()}, codec
    )
    straight_through: Any = _StraightThrough.apply
    return {name: straight_through(tensor, stored[name]) for name, tensor in tensors.items()}


class _StraightThrough(torch.autograd.Function):
    """Other values forward, the same gradient backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004 - torch's signature
        tensor: torch.Tensor,  # noqa: ARG004
        stored: NDArray[np.float32],
    ) -> torch.Tensor:
        """Give the stored values."""
        return torch.from_numpy(stored)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ARG004
        """Pass the gradient on."""
        return gradients[0], None
