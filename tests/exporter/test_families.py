from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import EncoderError
from exporter.families import (
    TRAINING_FREE,
    AdapterFamily,
    adapter_family,
    attached_sites,
    family_names,
    initial_tensors,
    nested,
    padded,
    tensor_shapes,
    truncate,
)
from exporter.families.sparse import places
from exporter.package import Kind, Site
from tests.exporter.conftest import Array

RANKED = [name for name in family_names() if adapter_family(name).ranked]
RANK_FREE = [name for name in family_names() if not adapter_family(name).ranked]
PADDING = [name for name in family_names() if adapter_family(name).pads]


def site_of(family: AdapterFamily, dim: int) -> Site:
    return Site(dim, kind=min(family.kinds), heads=2 if family.name == "prefix" else 1)


def params_of(tensors: dict[str, Array], site: str) -> dict[str, torch.Tensor]:
    start = f"{site}/"
    return {
        k.removeprefix(start): torch.tensor(v) for k, v in tensors.items() if k.startswith(start)
    }


def moved(family: AdapterFamily, site: Site, rank: int) -> dict[str, Array]:
    """An adapter at the site `a` whose every tensor is away from zero."""
    rng = np.random.default_rng(rank)
    fresh = initial_tensors(family, {"a": site}, rank, seed=rank)
    return {
        name: value + rng.normal(scale=0.3, size=value.shape).astype(np.float32)
        for name, value in fresh.items()
    }


def test_the_families_are_listed_and_the_training_free_one_when_asked_for() -> None:
    assert family_names() == (
        "bitfit", "bottleneck", "compacter", "hydra", "ia3", "lora", "prefix", "sparse", "ssf",
    )  # fmt: skip
    assert set(family_names(training_free=True)) == {*family_names(), TRAINING_FREE}


def test_an_unknown_family_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(EncoderError, match=r"'other'; there is bitfit, bottleneck"):
        adapter_family("other")


def test_the_training_free_family_has_no_tensors() -> None:
    with pytest.raises(EncoderError, match="statistics alone"):
        adapter_family("gaussian")


def test_bottleneck_is_the_written_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 6))
    wd, bd, wu, bu = (rng.normal(size=s) for s in ((4, 6), 4, (6, 4), 6))
    params = {"down.weight": wd, "down.bias": bd, "up.weight": wu, "up.bias": bu}
    expected = y + 0.1 * (np.maximum(x @ wd.T + bd, 0) @ wu.T + bu)
    np.testing.assert_allclose(applied("bottleneck", x, y, params), expected, rtol=1e-12)


def test_lora_is_a_change_of_the_weight() -> None:
    rng = np.random.default_rng(0)
    weight, down, up = (rng.normal(size=s) for s in ((5, 6), (2, 6), (5, 2)))
    x = rng.normal(size=(3, 6))
    found = applied("lora", x, x @ weight.T, {"down.weight": down, "up.weight": up})
    np.testing.assert_allclose(found, x @ (weight + up @ down).T, rtol=1e-12)


def test_hydra_s_branches_are_changes_of_the_weight_and_of_what_follows() -> None:
    rng = np.random.default_rng(0)
    weight, pd, sd = rng.normal(size=(6, 6)), *rng.normal(size=(2, 2, 6))
    pu, su = rng.normal(size=(2, 6, 2))
    x = rng.normal(size=(3, 6))
    y = x @ weight.T
    names = ("parallel.down", "parallel.up", "sequential.down", "sequential.up")
    found = applied("hydra", x, y, dict(zip(names, (pd, pu, sd, su), strict=True)))
    np.testing.assert_allclose(found, x @ (weight + pu @ pd).T + y @ (su @ sd).T, rtol=1e-12)


def test_sparse_is_a_change_of_the_weight_at_its_places() -> None:
    rng = np.random.default_rng(0)
    site = Site(6, out_dim=5)
    weight, values, x = (rng.normal(size=s) for s in ((5, 6), (2, 11), (3, 6)))
    change = np.zeros(30)
    change[places(site, 22)] = values.ravel()
    assert np.count_nonzero(change) == 22
    found = applied("sparse", x, x @ weight.T, {"values": values}, site)
    np.testing.assert_allclose(found, x @ (weight.T + change.reshape(6, 5)), rtol=1e-12)


def test_sparse_values_beyond_the_weight_s_entries_add_to_the_same_again() -> None:
    site, x, y = Site(2), np.eye(2), np.zeros((2, 2))
    once = applied("sparse", x, y, {"values": np.ones((1, 4))}, site)
    assert (
        applied("sparse", x, y, {"values": np.ones((3, 4))}, site).tolist() == (3 * once).tolist()
    )


@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), data=st.data())
def test_sparse_places_are_different_and_begin_with_those_of_a_smaller_rank(
    outputs: int, inputs: int, data: st.DataObject
) -> None:
    site = Site(inputs, out_dim=outputs)
    whole = places(site, outputs * inputs)
    assert sorted(whole) == list(range(outputs * inputs))
    count = data.draw(st.integers(0, outputs * inputs))
    assert places(site, count).tolist() == whole[:count].tolist()


@pytest.mark.parametrize("shape", [(192, 192), (768, 768), (768, 192), (192, 768), (320, 320)])
def test_two_sparse_ranks_reach_every_input_and_output_and_change_no_small_subspace(
    shape: tuple[int, int],
) -> None:
    outputs, inputs = shape
    found = places(Site(inputs, out_dim=outputs), 2 * (outputs + inputs))
    change = np.zeros(outputs * inputs)
    change[found] = np.random.default_rng(0).normal(size=len(found))
    assert set(found // outputs) == set(range(inputs))
    assert set(found % outputs) == set(range(outputs))
    assert np.linalg.matrix_rank(change.reshape(inputs, outputs)) > 0.85 * min(shape)


def test_compacter_s_weights_are_sums_of_kronecker_products() -> None:
    rng = np.random.default_rng(0)
    family, site = adapter_family("compacter"), Site(8)
    params = {
        name: rng.normal(size=[3 if axis == "rank" else int(axis) for axis in shape])
        for name, shape in family.shapes(site).items()
    }

    def weight(way: str) -> Array:
        rule, left, right = (params[f"{way}.{part}"] for part in ("rule", "in", "out"))
        return sum(np.kron(rule[i], np.outer(left[i], right[i])) for i in range(4))  # type: ignore[return-value]

    y = rng.normal(size=(3, 8))
    inner = torch.nn.functional.gelu(torch.tensor(y @ weight("down") + params["down.bias"].ravel()))
    expected = y + inner.numpy() @ weight("up") + params["up.bias"]
    np.testing.assert_allclose(applied("compacter", y, y, params), expected, rtol=1e-10)


def test_prefix_is_concatenation_with_each_part_divided_by_its_weight() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 5, 4))
    pk, pv = rng.normal(size=(2, 3, 4))
    scores = query @ np.concatenate([pk, key]).T / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    share = weights[:, :3].sum(-1, keepdims=True)
    expected = weights[:, :3] @ pv / share + weights[:, 3:] @ value / (1 - share)
    plain = np.exp(query @ key.T / 2)
    mixed = plain / plain.sum(-1, keepdims=True) @ value
    site = Site(4, kind="attention")
    found = applied("prefix", query[None], mixed[None], {"key": pk, "value": pv}, site)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("ssf", {"scale": [0.5, 0.0], "shift": [1.0, 2.0]}, [4.0, 5.0]),
        ("bitfit", {"bias": [1.0, -1.0]}, [3.0, 2.0]),
        ("ia3", {"scale": [0.5, -1.0]}, [3.0, 0.0]),
    ],
)
def test_families_without_a_rank_are_the_written_formulas(
    name: str, params: dict[str, list[float]], expected: list[float]
) -> None:
    y = np.array([2.0, 3.0])
    given_params = {key: np.array(value) for key, value in params.items()}
    assert applied(name, 9 * y, y, given_params).tolist() == expected


def applied(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    params: dict[str, np.ndarray],
    site: Site | None = None,
) -> np.ndarray:
    """A family applied in the precision given."""
    tensors = {key: torch.tensor(value) for key, value in params.items()}
    family = adapter_family(name)
    found = family.apply(torch.tensor(x), torch.tensor(y), tensors, site or Site(x.shape[-1]))
    array: np.ndarray = found.numpy()
    return array


@pytest.mark.parametrize("name", family_names())
@given(
    dims=st.dictionaries(st.sampled_from(["a", "b.mlp", "c.1"]), st.integers(1, 9), min_size=1),
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_fresh_tensors_have_the_declared_shapes_and_are_neutral(
    name: str, dims: dict[str, int], rank: int, seed: int
) -> None:
    family = adapter_family(name)
    sites: dict[str, int | Site] = {n: site_of(family, 2 * dim) for n, dim in dims.items()}
    shapes = tensor_shapes(family, sites)
    fresh = initial_tensors(family, sites, rank, seed)
    assert list(shapes) == sorted(fresh)
    for tensor, shape in shapes.items():
        assert fresh[tensor].shape == tuple(rank if axis == "rank" else axis for axis in shape)
        assert fresh[tensor].dtype == np.float32
    for site, dim in dims.items():
        x = torch.ones(1, 2, 2 * dim)
        found = family.apply(x, x, params_of(fresh, site), site_of(family, 2 * dim))
        assert torch.equal(found, x)


def test_fresh_tensors_depend_on_the_seed_alone() -> None:
    family = adapter_family("bottleneck")
    one = initial_tensors(family, {"a": 4, "b": 4}, 2, seed=5)
    same = initial_tensors(family, {"b": 4, "a": 4}, 2, seed=5)
    other = initial_tensors(family, {"a": 4, "b": 4}, 2, seed=6)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["a/down.weight"], other["a/down.weight"])
    assert not np.array_equal(one["a/down.weight"], one["b/down.weight"])


def test_a_family_takes_the_sites_of_its_kinds() -> None:
    kinds: tuple[Kind, ...] = ("block", "query", "key", "value", "attention", "activation")
    sites: dict[str, int | Site] = {kind: Site(4, kind=kind) for kind in kinds}
    assert list(attached_sites(adapter_family("bottleneck"), sites)) == ["block"]
    assert list(attached_sites(adapter_family("lora"), sites)) == ["query", "value"]
    assert list(attached_sites(adapter_family("lora"), {"block": 4})) == ["block"]
    assert list(attached_sites(adapter_family("sparse"), sites)) == ["query", "value"]
    assert list(attached_sites(adapter_family("sparse"), {"block": 4})) == ["block"]
    assert list(attached_sites(adapter_family("ia3"), sites)) == ["activation", "key", "value"]
    assert list(attached_sites(adapter_family("prefix"), sites)) == ["attention"]


@pytest.mark.parametrize("name", ["prefix", "ia3"])
def test_a_family_without_a_site_is_refused_with_the_kinds_there_are(name: str) -> None:
    with pytest.raises(EncoderError, match=rf"{name}.*attaches to sites of kind .*has block"):
        attached_sites(adapter_family(name), {"0": 4})


@pytest.mark.parametrize("name", RANKED)
@given(first=st.integers(1, 6), second=st.integers(1, 6))
def test_truncating_twice_is_truncating_once(name: str, first: int, second: int) -> None:
    family = adapter_family(name)
    site = site_of(family, 8)
    whole = moved(family, site, 6)
    once = truncate(family, whole, min(first, second))
    twice = truncate(family, truncate(family, whole, first), second)
    assert once.keys() == twice.keys() == whole.keys()
    assert all(np.array_equal(once[key], twice[key]) for key in once)
    x = torch.ones(1, 3, 8)
    found = family.apply(x, x, params_of(once, "a"), site)
    assert found.shape == x.shape
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("name", RANKED)
def test_truncating_to_no_rank_is_refused(name: str) -> None:
    family = adapter_family(name)
    with pytest.raises(EncoderError, match="at least 1"):
        truncate(family, moved(family, site_of(family, 8), 2), 0)


@pytest.mark.parametrize("name", RANK_FREE)
def test_a_family_without_a_rank_is_not_truncated_and_is_trained_whole(name: str) -> None:
    family = adapter_family(name)
    tensors = moved(family, site_of(family, 8), 1)
    with pytest.raises(EncoderError, match="has no rank"):
        truncate(family, tensors, 1)
    assert nested(family, tensors, 4, np.random.default_rng(0)).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["bottleneck", "lora", "sparse"])
def test_every_rank_of_an_adapter_trained_nested_is_better_than_the_one_below(name: str) -> None:
    torch.manual_seed(0)
    rank, dim = 6, 12
    family = adapter_family(name)
    site = site_of(family, dim)
    # A target whose directions differ in weight, so that each rank has something of its own.
    left, right = (torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(2))
    change = left * (2.0 ** -torch.arange(dim)) @ right
    x = torch.randn(256, dim)
    target = x @ change.T
    fresh = initial_tensors(family, {"a": site}, rank, seed=0)
    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in fresh.items()}
    optimiser = torch.optim.Adam(tensors.values(), lr=0.03)
    rng = np.random.default_rng(0)

    def error(given_tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        params = {k.removeprefix("a/"): v for k, v in given_tensors.items()}
        found = family.apply(x, torch.zeros_like(x), params, site)
        return torch.nn.functional.mse_loss(found, target)

    for _ in range(600):
        optimiser.zero_grad()
        torch.autograd.backward(error(nested(family, tensors, rank, rng)))
        optimiser.step()
    errors = [error(truncate(family, tensors, r)).item() for r in range(1, rank + 1)]
    for wider, narrower in zip(errors[1:], errors, strict=False):
        assert wider <= narrower * 1.05
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize("name", PADDING)
def test_sites_of_different_ranks_are_fed_as_one_with_zeros_behind(name: str) -> None:
    family = adapter_family(name)
    site = site_of(family, 8)
    sites: dict[str, int | Site] = {"a": site, "b": site, "c": site}
    narrow = moved(family, site, 2)
    wide = {key.replace("a/", "b/"): value for key, value in moved(family, site, 5).items()}
    whole = padded(family, sites, narrow | wide)
    for key, shape in tensor_shapes(family, sites).items():
        assert whole[key].shape == tuple(5 if axis == "rank" else axis for axis in shape)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for at, own in (("a", narrow), ("b", wide)):
        expected = family.apply(x, y, params_of(own, at), site)
        torch.testing.assert_close(family.apply(x, y, params_of(whole, at), site), expected)
    assert torch.equal(family.apply(x, y, params_of(whole, "c"), site), y)


def test_sites_of_a_family_whose_zeros_are_not_neutral_cannot_differ_in_rank() -> None:
    family = adapter_family("prefix")
    site = site_of(family, 8)
    with pytest.raises(EncoderError, match="cannot differ in rank"):
        padded(family, {"a": site}, moved(family, site, 2))


def test_padding_refuses_tensors_of_another_adapter() -> None:
    with pytest.raises(EncoderError, match=r"'other/up\.bias' is none of"):
        padded(adapter_family("bottleneck"), {"a": 4}, {"other/up.bias": np.zeros(4, np.float32)})
