"""Training sees the weights a reader will have, and its gradients reach the weights it keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapter_store.codecs import CODECS, quantised
from edge_agent.quantised_training import quantise


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "site/down": torch.randn(4, 24, generator=generator, requires_grad=True),
        "site/up": torch.randn(24, 4, generator=generator, requires_grad=True),
        "site/bias": torch.randn(24, generator=generator, requires_grad=True),
    }


@pytest.mark.parametrize("codec", CODECS)
def test_forward_is_what_a_reader_has_and_backward_the_identity(codec) -> None:
    tensors = weights()
    result = quantise(tensors, codec)
    expected = quantised({name: x.detach().numpy() for name, x in tensors.items()}, codec)
    sum((x * x).sum() for x in result.values()).backward()
    for name, tensor in tensors.items():
        assert result[name].detach().numpy().tobytes() == expected[name].tobytes()
        assert np.allclose(tensor.grad.numpy(), 2 * expected[name])


def test_training_through_one_bit_beats_rounding_afterwards() -> None:
    rng = np.random.default_rng(0)
    # Inputs that vary together: what rounding does to one weight others can make good.
    mixed = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 24)) / 3
    inputs = torch.from_numpy((mixed + rng.normal(0, 0.1, size=mixed.shape)).astype(np.float32))
    target = inputs @ torch.from_numpy(rng.normal(size=(24, 4)).astype(np.float32))

    def fitted(codec: str | None) -> float:
        up = weights()["site/up"].detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([up], lr=0.05)
        for step in range(200):
            optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
            used = up if codec is None else quantise({"up": up}, codec)["up"]
            loss = torch.square(inputs @ used - target).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        stored = torch.from_numpy(quantised({"up": up.detach().numpy()}, "int1")["up"])
        return float(torch.square(inputs @ stored - target).mean())

    assert fitted("int1") < fitted(None)
