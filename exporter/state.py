"""Checking a state dict against the network that is to hold it.

The networks built from weights alone call this. It names the weight at fault and never guesses
what was meant; it reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from exporter.errors import EncoderError


def shaped(weights: Mapping[str, Tensor], key: str, *, rank: int) -> Tensor:
    """Finds a weight that sizes are read off.

    Raises:
        EncoderError: It is missing, empty, or has another number of axes than `rank`.
    """
    if key not in weights:
        raise EncoderError(f"weight {key!r} is missing")
    value = weights[key]
    if value.ndim != rank or 0 in value.shape:
        raise EncoderError(f"weight {key!r} has shape {list(value.shape)}, expected {rank} axes")
    return value


def load_exactly(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a network in float32; every one must have its place and be there.

    Raises:
        EncoderError: A weight is missing, unknown or of an unexpected shape.
    """
    expected = network.state_dict()
    for key in expected:
        if key not in weights:
            raise EncoderError(f"weight {key!r} is missing")
    for key, value in weights.items():
        if key not in expected:
            raise EncoderError(f"weight {key!r} is none of this encoder's")
        if value.shape != expected[key].shape:
            found, wanted = list(value.shape), list(expected[key].shape)
            raise EncoderError(f"weight {key!r} has shape {found}, expected {wanted}")
    network.load_state_dict({key: value.float() for key, value in weights.items()})
