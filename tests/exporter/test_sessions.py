from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from exporter.errors import EncoderError
from exporter.families import adapter_family, initial_tensors
from exporter.package import EncoderPackage
from exporter.sessions import BATCH_ROWS, EncoderSessions, FedAdapter, check_tensors
from exporter.vit import VisionTransformer
from tests.exporter.conftest import Array, adapter


def test_the_two_halves_compute_what_the_network_computes(
    tiny_vit: VisionTransformer, sessions: EncoderSessions, images: Array, hidden: Array
) -> None:
    with torch.no_grad():
        expected = tiny_vit(torch.tensor(images)).numpy()
    np.testing.assert_allclose(own_output(sessions, hidden), unit(expected), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_a_fresh_adapter_of_any_rank_changes_nothing(
    package: EncoderPackage, sessions: EncoderSessions, hidden: Array, rank: int
) -> None:
    sites = package.manifest.sites
    fresh = initial_tensors(adapter_family("bottleneck"), sites, rank, seed=3)
    assert np.array_equal(sessions.suffix(hidden, fresh), sessions.suffix(hidden))


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_one_session_serves_adapters_of_any_rank(
    tiny_vit: VisionTransformer,
    sessions: EncoderSessions,
    images: Array,
    hidden: Array,
    rank: int,
) -> None:
    package = sessions.package
    given = adapter(package, rank)

    def beside(site: str) -> Callable[..., torch.Tensor]:
        def hook(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            t = {k: torch.tensor(given[f"{site}/{k}"]) for k in PARAMS}
            inner = torch.relu(inputs[0] @ t["down.weight"].T + t["down.bias"])
            return output + 0.1 * (inner @ t["up.weight"].T + t["up.bias"])

        return hook

    hooks = [
        tiny_vit.get_submodule(site).register_forward_hook(beside(site)) for site in package.sites
    ]
    try:
        with torch.no_grad():
            expected = tiny_vit(torch.tensor(images)).numpy()
    finally:
        for handle in hooks:
            handle.remove()
    adapted = own_output(sessions, hidden, given)
    np.testing.assert_allclose(adapted, unit(expected), atol=1e-5)
    assert np.abs(adapted - own_output(sessions, hidden)).max() > 1e-2


def own_output(
    sessions: EncoderSessions, hidden: Array, tensors: dict[str, Array] | None = None
) -> Array:
    """The features' first part: what the network itself gives, at unit length."""
    return sessions.suffix(hidden, tensors)[:, : sessions.package.network_dim]


def unit(rows: Array) -> Array:
    """Rows at unit length."""
    scaled: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


PARAMS = ("down.weight", "down.bias", "up.weight", "up.bias")


def test_the_base_model_is_untouched_after_an_adapter_ran(
    sessions: EncoderSessions, hidden: Array, tensors: dict[str, Array]
) -> None:
    before = sessions.suffix(hidden)
    sessions.suffix(hidden, tensors)
    assert np.array_equal(sessions.suffix(hidden), before)


def test_batches_of_any_size_give_every_row_its_own_answer(
    sessions: EncoderSessions, images: Array
) -> None:
    many = np.concatenate([images] * (BATCH_ROWS // len(images) + 2))
    features = sessions.suffix(sessions.prefix(many))
    alone = sessions.suffix(sessions.prefix(images[2:3]))
    assert len(features) == len(many) > BATCH_ROWS
    np.testing.assert_allclose(
        features[2 :: len(images)], alone.repeat(len(features[2 :: len(images)]), 0), atol=1e-5
    )


def test_an_empty_batch_gives_no_features(
    package: EncoderPackage, sessions: EncoderSessions
) -> None:
    none = sessions.prefix(np.empty((0, 3, 16, 16), np.float32))
    assert none.shape == (0, *package.hidden_shape)
    assert sessions.suffix(none).shape == (0, package.feature_dim)


def test_threads_that_share_a_session_get_their_own_adapter(
    package: EncoderPackage, hidden: Array
) -> None:
    sessions = EncoderSessions(package)
    adapters = [None, adapter(package, 2), adapter(package, 8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: sessions.suffix(hidden, adapters[i % 3]), range(30)))
    for i, features in enumerate(found):
        assert np.array_equal(features, sessions.suffix(hidden, adapters[i % 3]))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 3, 8, 8), np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((1, 3, 16, 16), np.float64),
        np.zeros((), np.float32),
    ],
)
def test_images_of_another_shape_or_type_are_refused(
    sessions: EncoderSessions, wrong: Array
) -> None:
    with pytest.raises(EncoderError, match=r"images are .* expected float32 \[n, 3, 16, 16\]"):
        sessions.prefix(wrong)


def test_hidden_values_of_another_encoder_are_refused(sessions: EncoderSessions) -> None:
    with pytest.raises(EncoderError, match="hidden are"):
        sessions.suffix(np.zeros((1, 5, 31), np.float32))


def changed(tensors: dict[str, Array], **changes: Array | None) -> dict[str, Array]:
    everything = {**tensors, **changes}
    return {name: value for name, value in everything.items() if value is not None}


NAME = "blocks.1.mlp/down.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.mlp/down.weight": np.zeros((4, 32), np.float32)}, "none of 'bottleneck'"),
        ({"hidden": np.zeros((1, 5, 32), np.float32)}, "none of 'bottleneck'"),
        ({NAME: None}, "is missing"),
        ({NAME: np.zeros((4, 32))}, "float64, expected float32"),
        ({NAME: np.zeros((4, 31), np.float32)}, r"shape \[4, 31\]"),
        ({NAME: np.zeros((5, 32), np.float32)}, "at rank 4"),
        ({NAME: np.zeros((4, 32, 1), np.float32)}, r"shape \[4, 32, 1\]"),
        ({NAME: np.zeros((), np.float32)}, r"shape \[\]"),
    ],
)
def test_tensors_that_are_no_adapter_of_this_encoder_are_refused(
    sessions: EncoderSessions,
    hidden: Array,
    tensors: dict[str, Array],
    change: dict[str, Array | None],
    message: str,
) -> None:
    with pytest.raises(EncoderError, match=message):
        sessions.suffix(hidden, changed(tensors, **change))


def test_the_rank_of_an_adapter_is_read_from_its_tensors(
    package: EncoderPackage, tensors: dict[str, Array]
) -> None:
    assert check_tensors(package, "bottleneck", tensors) == 4


def test_an_adapter_that_is_checked_once_computes_what_one_that_is_always_checked_does(
    package: EncoderPackage, sessions: EncoderSessions, hidden: Array, tensors: dict[str, Array]
) -> None:
    fed = FedAdapter(sessions, "bottleneck", tensors)
    assert np.array_equal(fed.run(hidden), sessions.suffix(hidden, tensors))
    with pytest.raises(EncoderError, match="hidden are"):
        fed.run(hidden[0])
    with pytest.raises(EncoderError, match="is missing"):
        FedAdapter(sessions, "bottleneck", changed(tensors, **{NAME: None}))
    with pytest.raises(EncoderError, match="no adapter family 'lora'"):
        FedAdapter(sessions, "lora", tensors)


def test_a_family_the_encoder_was_not_built_for_is_refused(
    sessions: EncoderSessions, hidden: Array
) -> None:
    with pytest.raises(EncoderError, match="no adapter family 'lora'"):
        sessions.suffix(hidden, None, "lora")


def test_a_session_keeps_its_own_copy_of_the_weights(
    package: EncoderPackage, images: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Array] = []
    honest = EncoderPackage.graph_weights

    def watched(package: EncoderPackage, graph: str) -> dict[str, Array]:
        weights = honest(package, graph)
        handed.extend(weights.values())
        return weights

    monkeypatch.setattr(EncoderPackage, "graph_weights", watched)
    sessions = EncoderSessions(package)
    before = sessions.suffix(sessions.prefix(images))
    for value in handed:
        value[...] = np.nan
    assert len(handed) > 20
    assert np.array_equal(sessions.suffix(sessions.prefix(images)), before)
