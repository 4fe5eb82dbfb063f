"""What merged adapters change, against the papers' formulas."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import EncoderError
from exporter.families import adapter_family, family_names, initial_tensors
from exporter.merging import (
    adapter_of,
    arithmetic,
    by_importance,
    changes_of,
    dare,
    merged,
    side_by_side,
    ties,
    weighted,
)
from exporter.package import Site
from tests.exporter.conftest import Array

MEAN = partial(weighted, weights=[1.0, 1.0])


def random_adapter(family: str, rank: int, seed: int) -> dict[str, Array]:
    """An adapter at two sites whose every tensor is away from zero."""
    rng = np.random.default_rng(seed)
    kinds = adapter_family(family).kinds
    sites = {name: Site(8, kind=min(kinds), heads=2) for name in ("a", "b")}
    fresh = initial_tensors(adapter_family(family), sites, rank, seed)
    return {n: v + rng.normal(size=v.shape).astype(np.float32) for n, v in fresh.items()}


def change(**values: list[float]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in values.items()}


def test_lora_is_merged_by_its_product_and_not_by_its_factors() -> None:
    one, two = (random_adapter("lora", 2, seed) for seed in (0, 1))
    found = merged("lora", [one, two], MEAN, rank=4)
    for site in "ab":
        up, down = f"{site}/up.weight", f"{site}/down.weight"
        expected = (one[up] @ one[down] + two[up] @ two[down]) / 2
        np.testing.assert_allclose(found.tensors[up] @ found.tensors[down], expected, atol=1e-5)
        assert found.tensors[up].shape == (8, 4)
    assert found.kept == pytest.approx(1.0)


def test_a_product_is_brought_back_to_a_rank_by_its_largest_singular_values() -> None:
    one, two = (random_adapter("lora", 3, seed) for seed in (0, 1))
    found = merged("lora", [one, two], MEAN, rank=2)
    whole = held = 0.0
    for site in "ab":
        up, down = f"{site}/up.weight", f"{site}/down.weight"
        product = (one[up] @ one[down] + two[up] @ two[down]) / 2
        sizes = np.linalg.svd(product, compute_uv=False)
        error = np.linalg.norm(product - found.tensors[up] @ found.tensors[down])
        assert error == pytest.approx(np.sqrt(np.sum(sizes[2:] ** 2)), rel=1e-4)
        whole, held = whole + np.sum(sizes**2), held + np.sum(sizes[:2] ** 2)
    assert found.kept == pytest.approx(held / whole, rel=1e-4)
    assert found.kept < 1


@pytest.mark.parametrize("family", family_names())
@pytest.mark.parametrize("seed", [0, 1])
def test_an_adapter_merged_with_itself_is_itself(family: str, seed: int) -> None:
    one = random_adapter(family, 2, seed)
    found = merged(family, [one, one], MEAN).tensors
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in one.items()
    }
    again, before = changes_of(family, found), changes_of(family, one)
    for name, value in before.items():
        np.testing.assert_allclose(again[name], value, atol=1e-5)


@pytest.mark.parametrize("family", ["bottleneck", "hydra", "lora"])
def test_side_by_side_adds_up_what_the_adapters_do(family: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(rng.normal(size=(3, 8)).astype(np.float32)) for _ in range(2))
    adapters = [random_adapter(family, rank, rank) for rank in (2, 3)]
    whole = side_by_side(family, adapters, [1.0, 3.0])

    def applied(tensors: dict[str, Array]) -> np.ndarray:
        params = {k[2:]: torch.tensor(v) for k, v in tensors.items() if k.startswith("a/")}
        found: np.ndarray = (adapter_family(family).apply(x, y, params, Site(8)) - y).numpy()
        return found

    expected = 0.25 * applied(adapters[0]) + 0.75 * applied(adapters[1])
    np.testing.assert_allclose(applied(whole), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["ssf", "prefix", "compacter", "sparse"])
def test_families_whose_ranks_are_no_sum_are_not_put_side_by_side(family: str) -> None:
    with pytest.raises(EncoderError, match=f"'{family}' cannot be put side by side"):
        side_by_side(family, [random_adapter(family, 2, seed) for seed in (0, 1)], [1, 1])


def test_sparse_adapters_of_any_ranks_are_merged_exactly_by_their_values() -> None:
    x, y = torch.randn(3, 8), torch.zeros(3, 8)
    adapters = [random_adapter("sparse", rank, rank) for rank in (1, 3)]

    def applied(tensors: dict[str, Array]) -> np.ndarray:
        params = {"values": torch.tensor(tensors["a/values"])}
        found: np.ndarray = adapter_family("sparse").apply(x, y, params, Site(8)).numpy()
        return found

    found = merged("sparse", adapters, MEAN)
    expected = (applied(adapters[0]) + applied(adapters[1])) / 2
    np.testing.assert_allclose(applied(found.tensors), expected, atol=1e-5)
    assert found.kept == 1


def test_weights_are_shares_of_their_sum() -> None:
    changes = [change(a=[1.0, 0.0]), change(a=[0.0, 4.0])]
    assert weighted(changes, [3, 1])["a"].tolist() == [0.75, 1.0]
    assert arithmetic(changes, 0.5)["a"].tolist() == [0.5, 2.0]


def test_ties_trims_elects_a_sign_and_averages_what_agrees() -> None:
    """Yadav et al., figure 1: a small entry goes, and the sign with more mass wins."""
    changes = [
        change(a=[4.0, -3.0, 0.1], b=[0.2]),
        change(a=[2.0, 5.0, 0.0], b=[0.3]),
        change(a=[-1.0, 1.0, 0.1], b=[-0.1]),
    ]
    found = ties(changes, keep=0.5, scale=1.0)
    assert found["a"].tolist() == [3.0, 3.0, 0.0]
    assert found["b"].tolist() == [0.0]
    assert ties(changes, keep=0.5, scale=2.0)["a"].tolist() == [6.0, 6.0, 0.0]


@given(seed=st.integers(0, 99), drop=st.floats(0, 0.9))
def test_dare_keeps_the_expectation_and_is_what_its_seed_says(seed: int, drop: float) -> None:
    big = change(a=np.ones(20_000).tolist())
    once, again = (dare([big], drop, np.random.default_rng(seed))[0]["a"] for _ in range(2))
    assert np.array_equal(once, again)
    assert set(np.unique(once)) <= {0.0, 1 / (1 - drop)}
    assert once.mean() == pytest.approx(1.0, abs=6 * np.sqrt(drop / (1 - drop) / 20_000) + 1e-9)


def test_importance_decides_entry_by_entry_and_averages_where_there_is_none() -> None:
    changes = [change(a=[1.0, 2.0, 6.0]), change(a=[3.0, 4.0, 8.0])]
    importances = [change(a=[1.0, 0.0, 0.0]), change(a=[3.0, 5.0, 0.0])]
    assert by_importance(changes, importances)["a"].tolist() == [2.5, 4.0, 7.0]


@pytest.mark.parametrize(
    ("importance", "message"),
    [({}, "is missing"), ({"a": [-1.0]}, "not usable"), ({"a": [1.0, 2.0]}, "another shape")],
)
def test_an_importance_that_is_not_usable_is_refused(
    importance: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        by_importance([change(a=[1.0])] * 2, [change(a=[1.0]), change(**importance)])


def test_adapters_of_different_ranks_are_padded() -> None:
    one, two = random_adapter("bottleneck", 2, 0), random_adapter("bottleneck", 3, 1)
    found = merged("bottleneck", [one, two], MEAN).tensors["a/down.weight"]
    expected = two["a/down.weight"] / 2
    expected[:2] += one["a/down.weight"] / 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(EncoderError, match="'prefix' to merge cannot differ in rank; found 2, 3"):
        merged("prefix", [random_adapter("prefix", rank, 0) for rank in (2, 3)], MEAN)


def test_a_rank_that_no_product_gives_is_refused_and_a_smaller_one_is_cut() -> None:
    pair = [random_adapter("bottleneck", 3, seed) for seed in (0, 1)]
    assert merged("bottleneck", pair, MEAN, rank=2).tensors["a/down.weight"].shape == (2, 8)
    with pytest.raises(EncoderError, match="'bottleneck' has the rank 3"):
        merged("bottleneck", pair, MEAN, rank=4)
    with pytest.raises(EncoderError, match="'ssf' has the rank 1"):
        merged("ssf", [random_adapter("ssf", 1, seed) for seed in (0, 1)], MEAN, rank=2)


def test_a_rank_beyond_the_product_s_is_filled_with_zeros() -> None:
    one = random_adapter("lora", 2, 0)
    tensors = adapter_of("lora", changes_of("lora", one), 12).tensors
    assert tensors["a/up.weight"].shape == (8, 12)
    assert not tensors["a/up.weight"][:, 8:].any()


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (partial(weighted, weights=[1.0]), "expected 2 numbers"),
        (partial(weighted, weights=[0.0, 0.0]), "not all 0"),
        (partial(weighted, weights=[-1.0, 2.0]), "0 or more"),
        (partial(ties, keep=0.0, scale=1.0), "share to keep is 0"),
        (partial(dare, drop=1.0, rng=np.random.default_rng(0)), "share to drop is 1"),
    ],
)
def test_settings_outside_their_range_are_refused(way: partial, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(EncoderError, match=message):
        merged("lora", [random_adapter("lora", 2, seed) for seed in (0, 1)], way)


def test_adapters_that_are_not_alike_are_refused() -> None:
    whole = random_adapter("bottleneck", 2, 0)
    part = dict(list(whole.items())[1:])
    with pytest.raises(EncoderError, match="is not in all of the adapters"):
        merged("bottleneck", [whole, part], MEAN)
    with pytest.raises(EncoderError, match="at least two adapters; found 1"):
        merged("bottleneck", [whole], MEAN)
