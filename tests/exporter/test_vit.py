"""The Vision Transformer: its weights' names, its split, and its export to ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.errors import EncoderError
from exporter.vit import VisionTransformer, split_vit, vit_from_state_dict


def random_state(
    *, dim: int = 24, depth: int = 3, patch: int = 4, grid: int = 4
) -> dict[str, Tensor]:
    """Random weights under timm's names, large enough for every part to matter."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + grid * grid, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.attn.qkv.weight": (3 * dim, dim),
            f"{block}.attn.qkv.bias": (3 * dim,),
            f"{block}.attn.proj.weight": (dim, dim),
            f"{block}.attn.proj.bias": (dim,),
            f"{block}.mlp.fc1.weight": (2 * dim, dim),
            f"{block}.mlp.fc1.bias": (2 * dim,),
            f"{block}.mlp.fc2.weight": (dim, 2 * dim),
            f"{block}.mlp.fc2.bias": (dim,),
        }
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
    rng = torch.Generator().manual_seed(1)
    return {key: 0.3 * torch.randn(shape, generator=rng) for key, shape in shapes.items()}


def random_vit(depth: int = 3) -> VisionTransformer:
    """A random encoder for 16 px images: patch 4, width 24, 3 heads."""
    return vit_from_state_dict(random_state(depth=depth), image_size=16, heads=3)


def random_images(n: int = 5) -> Tensor:
    """Normalised images float32 [n, 3, 16, 16]."""
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def reference_features(
    state: dict[str, Tensor], images: Tensor, *, depth: int, heads: int
) -> Tensor:
    """The network written out a second time, with torch's own attention and exact GELU."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, [x.shape[-1]], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x], 1) + state["pos_embed"]
    n, t, dim = x.shape
    for i in range(depth):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(n, t, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, dim)
        x = x + linear(mixed, f"blocks.{i}.attn.proj")
        inner = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(inner, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_computes_what_timm_names_mean() -> None:
    """The features equal those of an independent reading of the same weights."""
    state, images = random_state(), random_images()
    expected = reference_features(state, images, depth=3, heads=3)
    found = vit_from_state_dict(state, image_size=16, heads=3)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_state_dict_round_trips_under_the_same_names() -> None:
    """What is loaded is what is saved, name by name."""
    state = random_state()
    saved = vit_from_state_dict(state, image_size=16, heads=3).state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


def test_sizes_are_read_off_the_weights() -> None:
    """Width, depth, patch, hidden width and the default number of heads need no argument."""
    vit = vit_from_state_dict(random_state(dim=128, depth=2), image_size=16)
    assert (vit.dim, vit.depth, vit.patch, vit.hidden, vit.heads) == (128, 2, 4, 256, 2)


def test_float16_weights_become_float32() -> None:
    """A file stored in half precision computes in single precision."""
    half = {key: value.half() for key, value in random_state().items()}
    vit = vit_from_state_dict(half, image_size=16, heads=3)
    assert all(value.dtype == torch.float32 for value in vit.state_dict().values())


def test_a_head_is_ignored() -> None:
    """A classifier saved beside the encoder changes nothing."""
    state = random_state()
    with_head = state | {"head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}
    images = random_images()
    plain = vit_from_state_dict(state, image_size=16, heads=3)(images)
    assert torch.equal(vit_from_state_dict(with_head, image_size=16, heads=3)(images), plain)


def test_positions_are_resized_for_another_image_size() -> None:
    """A smooth position grid keeps its values and the class position when it grows."""
    state = random_state()
    ramp = torch.arange(4.0)[None, :, None].expand(4, 4, 24).reshape(1, 16, 24)
    state["pos_embed"][:, 1:] = ramp
    vit = vit_from_state_dict(state, image_size=32, heads=3)
    assert torch.equal(vit.pos_embed[:, :1], state["pos_embed"][:, :1])
    row = vit.pos_embed[0, 1:9, 0]
    torch.testing.assert_close(row[2:6], torch.tensor([0.75, 1.25, 1.75, 2.25]), rtol=0, atol=0.05)
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


@pytest.mark.parametrize(
    "key",
    ["patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight",
     "blocks.1.attn.qkv.bias", "norm.weight"],
)  # fmt: skip
def test_a_missing_weight_is_named(key: str) -> None:
    """Whatever is missing, the message says which."""
    state = random_state()
    del state[key]
    with pytest.raises(EncoderError, match=key.replace(".", r"\.")):
        vit_from_state_dict(state, image_size=16, heads=3)


def test_an_unknown_weight_is_named() -> None:
    """A weight this network has no place for is refused, not dropped."""
    with pytest.raises(EncoderError, match=r"blocks\.0\.ls1\.gamma"):
        vit_from_state_dict(
            random_state() | {"blocks.0.ls1.gamma": torch.ones(24)}, image_size=16, heads=3
        )


def test_a_gap_in_the_blocks_is_named() -> None:
    """Blocks must be numbered without a gap."""
    state = {k.replace("blocks.1.", "blocks.7."): v for k, v in random_state(depth=2).items()}
    with pytest.raises(EncoderError, match=r"blocks\.1\.norm1\.weight"):
        vit_from_state_dict(state, image_size=16, heads=3)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("blocks.2.attn.qkv.weight", (24, 24)),
        ("patch_embed.proj.weight", (24, 1, 4, 4)),
        ("patch_embed.proj.weight", (24, 48)),
        ("pos_embed", (1, 16, 24)),
        ("pos_embed", (1, 17, 12)),
    ],
)
def test_an_odd_shape_is_named(key: str, shape: tuple[int, ...]) -> None:
    """A weight of the wrong shape is refused with its name."""
    with pytest.raises(EncoderError, match=key.replace(".", r"\.")):
        vit_from_state_dict(random_state() | {key: torch.zeros(shape)}, image_size=16, heads=3)


def test_sizes_that_do_not_divide_are_refused() -> None:
    """The image must hold whole patches, and the heads must share the width."""
    with pytest.raises(EncoderError, match="multiple of the patch"):
        vit_from_state_dict(random_state(), image_size=18, heads=3)
    with pytest.raises(EncoderError, match="do not divide"):
        vit_from_state_dict(random_state(), image_size=16, heads=5)


@pytest.mark.parametrize("suffix_blocks", [1, 2, 3])
def test_split_equals_the_whole(suffix_blocks: int) -> None:
    """Prefix and suffix compute the whole encoder's features wherever it is cut."""
    vit, images = random_vit(), random_images()
    prefix, suffix = split_vit(vit, suffix_blocks)
    hidden = prefix(images)
    assert hidden.shape == (5, 17, 24)
    torch.testing.assert_close(suffix(hidden), vit(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix_blocks", [0, 4, -1])
def test_a_split_outside_the_encoder_is_refused(suffix_blocks: int) -> None:
    """A suffix has at least one block and at most all of them."""
    with pytest.raises(EncoderError, match="of an encoder of 3"):
        split_vit(random_vit(), suffix_blocks)


def test_a_hook_at_a_site_changes_the_features_of_the_suffix_alone() -> None:
    """Sites keep their index, see normalised tokens, and leave the whole encoder as it was."""
    vit, images = random_vit(), random_images()
    prefix, suffix = split_vit(vit, 2)
    before = vit(images)
    seen: dict[str, Tensor] = {}

    def adapt(site: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[site] = inputs[0]
            return 2 * output

        suffix.get_submodule(site).register_forward_hook(hook)

    adapt("blocks.1.mlp")
    adapt("blocks.2.mlp")
    assert not torch.allclose(suffix(prefix(images)), before, atol=1e-3)
    assert seen["blocks.1.mlp"].shape == (5, 17, 24)
    assert seen["blocks.2.mlp"].shape == (5, 1, 24)
    assert torch.equal(vit(images), before)


def test_both_halves_export_to_onnx_with_a_dynamic_batch(tmp_path: Path) -> None:
    """One export serves batches of 1 and 7, and ONNX Runtime agrees with torch."""
    vit = random_vit()
    given: Tensor = random_images(2)
    for half in split_vit(vit, 2):
        program = torch.export.export(half, (given,), dynamic_shapes=({0: torch.export.Dim("n")},))
        onnx_program = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False)
        assert onnx_program is not None
        path = tmp_path / f"{type(half).__name__}.onnx"
        onnx_program.save(path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for n in (1, 7):
            batch = torch.randn(n, *given.shape[1:], generator=torch.Generator().manual_seed(n))
            (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            expected = half(batch).detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        given = half(given).detach()
