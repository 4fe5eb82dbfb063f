"""MobileNetV2: its weights' names, TensorFlow's padding, its split, its package and the command."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.architectures import attachable_families, build_known, build_mobilenet
from exporter.cli import encoder
from exporter.errors import EncoderError
from exporter.mobilenet import (
    Suffix,
    mobilenet_from_state_dict,
    residual_blocks,
    split_mobilenet,
    tapped_depths,
)
from exporter.package import EncoderPackage, Site
from exporter.parity import parity
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, adapter

SIZE = 33  # odd sides and even ones both occur on the way down: 33, 17, 9, 5, 3, 2
WIDTHS = (3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9)
STRIDE_TWO = {2, 4, 7, 14}
FEATURES = 12


def random_state(seed: int = 1) -> dict[str, Tensor]:
    """A narrow network's weights, large enough for every layer to matter."""
    rng = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"features.0": (4, 3, 3, 3)}
    given = 4
    for index, width in enumerate(WIDTHS, start=1):
        inside = given if index == 1 else 2 * given + 1
        kernels: list[tuple[int, ...]] = [] if index == 1 else [(inside, given, 1, 1)]
        kernels += [(inside, 1, 3, 3), (width, inside, 1, 1)]
        shapes |= {f"features.{index}.body.{i}": kernel for i, kernel in enumerate(kernels)}
        given = width
    shapes["features.18"] = (FEATURES, given, 1, 1)
    state = {"classifier.weight": torch.zeros(5, FEATURES), "classifier.bias": torch.zeros(5)}
    for key, shape in shapes.items():
        fan = shape[1] * shape[2] * shape[3]
        state[f"{key}.conv.weight"] = torch.randn(shape, generator=rng) * (2 / fan) ** 0.5
        state[f"{key}.conv.bias"] = 0.3 * torch.randn(shape[0], generator=rng)
    return state


def random_images(n: int = 3) -> Tensor:
    """Normalised images float32 [n, 3, 33, 33]."""
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def same(maps: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """TensorFlow's 'SAME' as it is defined: windows start so that padding is even, less first."""
    kernel, side = weight.shape[-1], maps.shape[-1]
    outputs = int(np.ceil(side / stride))
    before = max((outputs - 1) * stride + kernel - side, 0) // 2
    canvas = torch.zeros(*maps.shape[:2], side + 2 * kernel, side + 2 * kernel)
    canvas[..., kernel : kernel + side, kernel : kernel + side] = maps
    start, reach = kernel - before, (outputs - 1) * stride + kernel
    window = canvas[..., start : start + reach, start : start + reach]
    groups = 1 if weight.shape[1] == maps.shape[1] else maps.shape[1]
    return F.conv2d(window, weight, bias, stride, groups=groups)


def reference_features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network written out a second time, from its paper's table and its weights."""

    def layer(maps: Tensor, key: str, stride: int = 1) -> Tensor:
        return same(maps, state[f"{key}.conv.weight"], state[f"{key}.conv.bias"], stride)

    maps = layer(images, "features.0", 2).clamp(0, 6)
    for index in range(1, 18):
        stride, inner, start = 2 if index in STRIDE_TWO else 1, maps, f"features.{index}.body"
        filtering = 0
        if index > 1:
            inner, filtering = layer(inner, f"{start}.0").clamp(0, 6), 1
        inner = layer(inner, f"{start}.{filtering}", stride).clamp(0, 6)
        inner = layer(inner, f"{start}.{filtering + 1}")
        maps = maps + inner if stride == 1 and inner.shape == maps.shape else inner
    return layer(maps, "features.18").clamp(0, 6).mean((2, 3))


@pytest.mark.parametrize("size", [32, 33, 48])
def test_computes_what_the_names_mean_at_even_and_odd_sizes(size: int) -> None:
    state, images = random_state(), random_images()
    images = F.interpolate(images, size=(size, size))
    found = mobilenet_from_state_dict(state, size)(images)
    torch.testing.assert_close(found, reference_features(state, images), rtol=1e-4, atol=1e-5)
    assert found.shape == (3, FEATURES)


def test_an_even_side_is_padded_right_and_below_alone() -> None:
    """A pixel in the first corner is the centre of no window of stride 2, but of the first row."""
    net = mobilenet_from_state_dict(random_state(), 8)
    stem = net.features["0"]
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.zero_()
        weight = stem.get_parameter("conv.weight")
        weight[0, 0, 2, 2] = 1.0
        image = torch.arange(64.0).reshape(1, 1, 8, 8).expand(1, 3, 8, 8) / 64
        maps = stem(image)[0, 0]
    torch.testing.assert_close(maps[:3, :3], image[0, 0, 2::2, 2::2])
    assert not maps[3].any()
    assert not maps[:, 3].any()


def test_state_dict_round_trips_under_the_same_names_without_the_classifier() -> None:
    state = {key: value for key, value in random_state().items() if "classifier" not in key}
    saved = mobilenet_from_state_dict(random_state(), SIZE).state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "key",
    ["features.0.conv.weight", "features.1.body.1.conv.weight", "features.5.body.2.conv.bias",
     "features.17.body.0.conv.weight", "features.18.conv.weight"],
)  # fmt: skip
def test_a_missing_weight_is_named(key: str) -> None:
    state = random_state()
    del state[key]
    with pytest.raises(EncoderError, match=key.replace(".", r"\.")):
        mobilenet_from_state_dict(state, SIZE)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("features.3.body.1.conv.weight", (9, 2, 3, 3)),
        ("features.0.conv.weight", (4, 3)),
        ("features.9.body.0.conv.weight", (13, 5, 1, 1)),
        ("features.19.conv.weight", (1, 1, 1, 1)),
    ],
)
def test_an_odd_or_unknown_weight_is_named(key: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=key.replace(".", r"\.")):
        mobilenet_from_state_dict(random_state() | {key: torch.zeros(shape)}, SIZE)


@pytest.mark.parametrize("suffix_blocks", [1, 4, 9, 16])
def test_split_equals_the_whole(suffix_blocks: int) -> None:
    net, images = mobilenet_from_state_dict(random_state(), SIZE), random_images()
    prefix, suffix = split_mobilenet(net, suffix_blocks)
    assert torch.equal(suffix(prefix(images)), net(images))


def test_taps_are_unit_length_parts_behind_the_networks_own() -> None:
    net, images = mobilenet_from_state_dict(random_state(), SIZE), random_images()
    depths = tapped_depths(4)
    prefix, suffix = split_mobilenet(net, 4, depths)
    hidden = prefix(images)
    channels, height, width = net.map_shape(13)
    assert (channels, height, width) == (7, 3, 3)
    assert hidden.shape == (3, channels * height * width + 6 + 7)
    own, earlier, cut = suffix(hidden).split([FEATURES, 6, 7], dim=1)
    torch.testing.assert_close(own, F.normalize(net(images), dim=1))
    maps = hidden[:, : channels * height * width].reshape(3, channels, height, width)
    torch.testing.assert_close(cut, F.normalize(maps.mean((2, 3)), dim=1))
    torch.testing.assert_close(earlier.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("suffix_blocks", [-1, 0, 17])
def test_a_split_outside_the_encoder_is_refused(suffix_blocks: int) -> None:
    with pytest.raises(EncoderError, match="of an encoder of 17"):
        split_mobilenet(mobilenet_from_state_dict(random_state(), SIZE), suffix_blocks)


def test_a_tap_outside_the_prefix_is_refused() -> None:
    with pytest.raises(EncoderError, match="depth 14 is outside"):
        split_mobilenet(mobilenet_from_state_dict(random_state(), SIZE), 4, (14,))


@pytest.mark.parametrize("suffix_blocks", range(1, 17))
def test_default_taps_lie_within_the_prefix(suffix_blocks: int) -> None:
    depths = tapped_depths(suffix_blocks)
    assert depths[-1] == 17 - suffix_blocks
    assert depths[0] >= 1


def test_sites_are_the_suffix_blocks_that_keep_their_shape() -> None:
    """Block 14 halves the side and 17 changes the width, so neither can take an adapter."""
    net = mobilenet_from_state_dict(random_state(), SIZE)
    assert residual_blocks(net, 4) == {"features.15.body": 8, "features.16.body": 8}
    assert not residual_blocks(net, 1)


def test_a_hook_at_a_site_changes_the_suffix_alone() -> None:
    net, images = mobilenet_from_state_dict(random_state(), SIZE), random_images()
    prefix, suffix = split_mobilenet(net, 4)
    before = net(images)

    def doubled(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert inputs[0].shape == output.shape == (3, 8, 2, 2)
        return 2 * output

    suffix.get_submodule("features.15.body").register_forward_hook(doubled)
    assert isinstance(suffix, Suffix)
    assert not torch.allclose(suffix(prefix(images)), before, atol=1e-3)
    assert torch.equal(net(images), before)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> EncoderPackage:
    torch.set_num_threads(1)
    return build_mobilenet(
        random_state(),
        image_size=SIZE,
        suffix_blocks=4,
        name="narrow",
        out=tmp_path_factory.mktemp("cnn") / "narrow",
    )


def test_the_package_says_what_its_features_are_of(cnn: EncoderPackage) -> None:
    assert cnn.sites == ("features.15.body", "features.16.body")
    assert cnn.manifest.feature_parts == (FEATURES, 6, 7)
    assert cnn.network_dim == FEATURES
    assert cnn.hidden_shape == (7 * 3 * 3 + 6 + 7,)


def test_onnx_runtime_computes_the_network(cnn: EncoderPackage) -> None:
    sessions = EncoderSessions(cnn)
    images = random_images(7)
    found = sessions.suffix(sessions.prefix(images.numpy()))
    expected = F.normalize(reference_features(random_state(), images), dim=1)
    np.testing.assert_allclose(found[:, :FEATURES], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_an_adapter_at_the_sites_moves_the_networks_own_part_and_every_form_agrees(
    cnn: EncoderPackage,
) -> None:
    sessions = EncoderSessions(cnn)
    hidden: Array = sessions.prefix(random_images(5).numpy())
    tensors = adapter(cnn, 3)
    moved = sessions.suffix(hidden, tensors) - sessions.suffix(hidden)
    assert np.abs(moved[:, :FEATURES]).max() > 1e-3
    np.testing.assert_allclose(moved[:, FEATURES:], 0, atol=1e-6)
    assert parity(cnn, "bottleneck", tensors, hidden).largest < 1e-4


def test_all_families_are_those_that_attach_to_convolutions() -> None:
    found = set(attachable_families({"features.15.body": Site(8, channel_axis=1)}))
    assert {"bottleneck", "lora", "ssf"} <= found
    assert not {"ia3", "prefix"} & found, "they need attention"


def test_a_suffix_without_a_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="more suffix blocks"):
        build_mobilenet(
            random_state(), image_size=SIZE, suffix_blocks=1, name="n", out=tmp_path / "n"
        )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"conv1.weight": torch.zeros(1)}, "no known network.*conv1"),
        ({}, "found nothing"),
    ],
)
def test_weights_of_an_unknown_network_are_refused(
    state: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=words):
        build_known(state, image_size=32, suffix_blocks=4, name="n", out=tmp_path / "n")


def test_heads_are_refused_for_a_network_without_attention(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="3 heads"):
        build_known(
            random_state(), image_size=SIZE, suffix_blocks=4, name="n", out=tmp_path / "n", heads=3
        )


def test_the_command_finds_out_which_network_the_weights_are_of(tmp_path: Path) -> None:
    save_file(random_state(), tmp_path / "narrow.safetensors")
    arguments = ["build", "--weights", tmp_path / "narrow.safetensors", "--image-size", SIZE]
    arguments += ["--out", tmp_path / "out", "--dtype", "float16"]
    result = CliRunner().invoke(encoder, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    package = EncoderPackage.load(tmp_path / "out")
    assert package.sites == ("features.15.body", "features.16.body")
    assert package.name == "narrow"


def test_the_published_weights_load_and_give_finite_features() -> None:
    folder = os.environ.get("DRIFTKEEL_DATA")
    path = Path(folder or ".") / "encoders" / "mobilenet_v2_1.0_224.safetensors"
    if not folder or not path.is_file():
        pytest.skip("set DRIFTKEEL_DATA to a folder with encoders/mobilenet_v2_1.0_224.safetensors")
    net = mobilenet_from_state_dict(load_file(path), 64)
    with torch.no_grad():
        features = net(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert features.shape == (2, 1280)
    assert bool(torch.isfinite(features).all())
    assert float(features.std()) > 0
