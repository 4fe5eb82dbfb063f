from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import EncoderError
from exporter.families import adapter_family, initial_tensors, tensor_shapes

BOTTLENECK = adapter_family("bottleneck")


def test_an_unknown_family_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(EncoderError, match=r"'lora'; there is bottleneck"):
        adapter_family("lora")


def test_bottleneck_is_the_written_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 6))
    wd, bd = rng.normal(size=(4, 6)), rng.normal(size=4)
    wu, bu = rng.normal(size=(6, 4)), rng.normal(size=6)
    params = {"down.weight": wd, "down.bias": bd, "up.weight": wu, "up.bias": bu}
    expected = y + 0.1 * (np.maximum(x @ wd.T + bd, 0) @ wu.T + bu)
    found = BOTTLENECK.apply(
        torch.tensor(x), torch.tensor(y), {k: torch.tensor(v) for k, v in params.items()}
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@given(
    dims=st.dictionaries(st.sampled_from(["a", "b.mlp", "c.1"]), st.integers(1, 9), min_size=1),
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_fresh_tensors_have_the_declared_shapes_and_are_neutral(
    dims: dict[str, int], rank: int, seed: int
) -> None:
    shapes = tensor_shapes(BOTTLENECK, dims)
    fresh = initial_tensors(BOTTLENECK, dims, rank, seed)
    assert list(shapes) == sorted(fresh)
    for name, shape in shapes.items():
        assert fresh[name].shape == tuple(rank if axis == "rank" else axis for axis in shape)
        assert fresh[name].dtype == np.float32
    for site, dim in dims.items():
        params = {
            k.removeprefix(f"{site}/"): torch.tensor(v)
            for k, v in fresh.items()
            if k.startswith(f"{site}/")
        }
        x = torch.ones(2, dim)
        assert torch.equal(BOTTLENECK.apply(x, x, params), x)


def test_fresh_tensors_depend_on_the_seed_alone() -> None:
    one = initial_tensors(BOTTLENECK, {"a": 4, "b": 4}, 2, seed=5)
    same = initial_tensors(BOTTLENECK, {"b": 4, "a": 4}, 2, seed=5)
    other = initial_tensors(BOTTLENECK, {"a": 4, "b": 4}, 2, seed=6)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["a/down.weight"], other["a/down.weight"])
    assert not np.array_equal(one["a/down.weight"], one["b/down.weight"])
