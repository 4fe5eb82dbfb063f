from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import EncoderError
from exporter.families import adapter_family, initial_tensors, padded
from exporter.families.budget import allocate, by_depth, squared_gradients
from exporter.package import Site

LORA = adapter_family("lora")
SITES: dict[str, int | Site] = {f"blocks.{i}.mlp": 8 for i in range(4)}
weights = st.dictionaries(st.sampled_from(sorted(SITES)), st.floats(0, 1e3), min_size=1)


def parameters(ranks: dict[str, int]) -> int:
    chosen = {name: 8 for name, rank in ranks.items() if rank}
    return sum(
        value.size
        for name in chosen
        for value in initial_tensors(LORA, {name: 8}, ranks[name], 0).values()
    )


@given(sensitivity=weights, budget=st.integers(0, 2000))
def test_an_allocation_keeps_to_its_budget(sensitivity: dict[str, float], budget: int) -> None:
    ranks = allocate(sensitivity, budget, LORA, SITES)
    assert ranks.keys() == SITES.keys()
    assert parameters(ranks) <= budget


@given(sensitivity=weights, budget=st.integers(0, 1000), more=st.integers(0, 500))
def test_a_larger_budget_takes_no_rank_away(
    sensitivity: dict[str, float], budget: int, more: int
) -> None:
    small = allocate(sensitivity, budget, LORA, SITES)
    large = allocate(sensitivity, budget + more, LORA, SITES)
    assert all(large[name] >= small[name] for name in SITES)


def test_ranks_are_proportional_to_sensitivity() -> None:
    sensitivity = {"blocks.0.mlp": 1.0, "blocks.1.mlp": 2.0, "blocks.3.mlp": 5.0}
    ranks = allocate(sensitivity, 16 * 16, LORA, SITES)
    assert list(ranks.values()) == [2, 4, 0, 10]


def test_a_bias_is_paid_for_with_a_site_s_first_rank() -> None:
    family = adapter_family("bottleneck")
    assert allocate({"a": 1.0}, 24, family, {"a": 8}) == {"a": 0}
    assert allocate({"a": 1.0}, 25, family, {"a": 8}) == {"a": 1}
    assert allocate({"a": 1.0}, 42, family, {"a": 8}) == {"a": 2}


def test_no_site_gets_more_than_the_largest_rank() -> None:
    assert allocate({"a": 1.0}, 10**6, LORA, {"a": 8}, max_rank=3) == {"a": 3}


def test_deeper_blocks_come_first_by_depth_alone() -> None:
    ranks = allocate(by_depth(SITES), 15 * 16, LORA, SITES)
    assert list(ranks.values()) == [1, 2, 4, 8]
    numbered = by_depth(["blocks.10.mlp", "blocks.9.mlp", "head"])
    assert sorted(numbered, key=numbered.__getitem__) == ["head", "blocks.9.mlp", "blocks.10.mlp"]


def test_sensitivity_is_the_sum_of_squared_gradients_of_a_site() -> None:
    steps = [
        {"a/up": np.array([1.0, 2.0], np.float32), "b/up": np.zeros(2, np.float32)},
        {"a/down": np.array([[3.0]], np.float32)},
    ]
    assert squared_gradients(steps) == {"a": 14.0, "b": 0.0}


def test_an_allocation_can_be_fed_as_one_adapter() -> None:
    ranks = allocate(by_depth(SITES), 300, LORA, SITES)
    own = {
        key: value
        for name, rank in ranks.items()
        if rank
        for key, value in initial_tensors(LORA, {name: 8}, rank, 0).items()
    }
    whole = padded(LORA, SITES, own)
    assert {value.shape for value in whole.values()} == {(max(ranks.values()), 8), (8, 10)}


@pytest.mark.parametrize("name", ["prefix", "ssf"])
def test_a_family_whose_sites_cannot_differ_is_refused(name: str) -> None:
    with pytest.raises(EncoderError, match="cannot differ in rank"):
        allocate({}, 100, adapter_family(name), {"a": Site(8, kind="attention")})


def test_an_unusable_sensitivity_is_named() -> None:
    with pytest.raises(EncoderError, match="'a' has the sensitivity nan"):
        allocate({"a": float("nan")}, 100, LORA, {"a": 8})
