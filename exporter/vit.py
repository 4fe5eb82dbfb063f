"""The project's own Vision Transformer, under timm's parameter names.

Lives here: the network, building it from a state dict, and cutting it into the prefix that
runs once per sample and the suffix where adapters attach. The encoder packages and the ONNX
export call it; it never reads a file and never trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.errors import EncoderError
from exporter.package import Site
from exporter.state import load_exactly, shaped

LAYER_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each to a token."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images: float32 [n, 3, s, s] to [n, (s / patch) ** 2, dim]."""
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class Projected(nn.Module):
    """Stands for a projection that is computed fused with others, so that hooks find it.

    It takes what went into the projection and what came out, and returns the latter.
    """

    def forward(self, tokens: Tensor, projected: Tensor) -> Tensor:
        """Passes on [n, t, dim], which `tokens` were projected to."""
        del tokens
        return projected


class Mix(nn.Module):
    """Multi-head attention between given queries, keys and values; it has no weights."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixes values: query [n, q, dim], key and value [n, t, dim] to [n, q, dim]."""
        query, key, value = (self._by_head(part) for part in (query, key, value))
        # Plain products, not F.scaled_dot_product_attention: training on 65 tokens they were
        # measured 1.8 times faster on a CPU, and they export as they are written.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        mixed = scores.softmax(dim=-1) @ value
        joined: Tensor = mixed.transpose(1, 2).flatten(2)
        return joined

    def _by_head(self, part: Tensor) -> Tensor:
        """Moves the heads before the tokens: [n, t, dim] to [n, heads, t, dim / heads]."""
        n, t, dim = part.shape
        return part.reshape(n, t, self.heads, dim // self.heads).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection.

    `query`, `key` and `value` have no weights: adapters attach there, to the rows of the fused
    projection that are computed.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query, self.key, self.value = Projected(), Projected(), Projected()
        self.mix = Mix(heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attends from every token to every token: [n, t, dim] to [n, t, dim]."""
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        return self._attend(tokens, query, tokens, key, value)

    def forward_cls(self, tokens: Tensor) -> Tensor:
        """Attends from the first token alone: [n, t, dim] to [n, 1, dim].

        It multiplies by rows of the fused weight, so a hook on `qkv` does not run here; those on
        `query`, `key`, `value`, `mix` and `proj` do.
        """
        dim = tokens.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        asking = tokens[:, :1]
        query = F.linear(asking, weight[:dim], bias[:dim])
        key, value = F.linear(tokens, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return self._attend(asking, query, tokens, key, value)

    def _attend(
        self, asking: Tensor, query: Tensor, tokens: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        query = self.query(asking, query)
        key, value = self.key(tokens, key), self.value(tokens, value)
        update: Tensor = self.proj(self.mix(query, key, value))
        return update


class Mlp(nn.Module):
    """The two-layer perceptron of a block, with exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps normalised tokens: [n, t, dim] to the residual's update [n, t, dim]."""
        update: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return update


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Updates every token: [n, t, dim] to [n, t, dim]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        updated: Tensor = tokens + self.mlp(self.norm2(tokens))
        return updated

    def forward_cls(self, tokens: Tensor) -> Tensor:
        """Updates the class token alone: [n, t, dim] to [n, 1, dim]; `mlp` sees t = 1."""
        cls = tokens[:, :1] + self.attn.forward_cls(self.norm1(tokens))
        updated: Tensor = cls + self.mlp(self.norm2(cls))
        return updated


class VisionTransformer(nn.Module):
    """A plain Vision Transformer without a head (Dosovitskiy et al., 2021).

    Args:
        image_size: Side of the square input, in pixels; a multiple of `patch`.
        patch: Side of a patch, in pixels.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads; divides `dim`.
        hidden: Width of the perceptron's hidden layer.

    Example:
        >>> vit = VisionTransformer(image_size=16, patch=8, dim=12, depth=2, heads=3, hidden=24)
        >>> vit(torch.zeros(5, 3, 16, 16)).shape
        torch.Size([5, 12])
    """

    def __init__(
        self, *, image_size: int, patch: int, dim: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        if image_size < patch or image_size % patch:
            raise EncoderError(f"image size {image_size} is not a multiple of the patch {patch}")
        if heads < 1 or dim % heads:
            raise EncoderError(f"{heads} heads do not divide the width {dim}")
        self.image_size, self.patch, self.dim = image_size, patch, dim
        self.depth, self.heads, self.hidden = depth, heads, hidden
        self.patch_embed = PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        # Keyed by index, as in the suffix, so that a site has one name everywhere.
        self.blocks = nn.ModuleDict({str(i): Block(dim, heads, hidden) for i in range(depth)})
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def embed(self, images: Tensor) -> Tensor:
        """Turns images into the first block's input.

        Args:
            images: float32 [n, 3, image_size, image_size], normalised.

        Returns:
            Tokens with positions, the class token first: float32 [n, tokens, dim].
        """
        return _with_positions(self.patch_embed(images), self.cls_token, self.pos_embed)

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        """Returns every block's output, first to last: `depth` tensors [n, tokens, dim]."""
        tokens = self.embed(images)
        states = []
        for block in self.blocks.values():
            tokens = block(tokens)
            states.append(tokens)
        return states

    def forward(self, images: Tensor) -> Tensor:
        """Computes features: images float32 [n, 3, s, s] to the class token [n, dim]."""
        tokens = self.embed(images)
        for block in self.blocks.values():
            tokens = block(tokens)
        features: Tensor = self.norm(tokens)[:, 0]
        return features


class Prefix(nn.Module):
    """The encoder's first blocks: images [n, 3, s, s] to hidden tokens [n, tokens, dim].

    After the tokens come the pooled ones, one for each depth: what the patch tokens are on average
    after that many blocks. The suffix takes them off again and hands them on as features, unless
    base features are the prefix's alone: then the class token comes last, as it is at the cut, and
    those at the end, each part of one length, are base features of length one as they are.
    """

    def __init__(
        self, vit: VisionTransformer, block_count: int, depths: Sequence[int], *, alone: bool
    ) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.alone = alone
        self.patch_embed = copy.deepcopy(vit.patch_embed)
        self.cls_token = nn.Parameter(vit.cls_token.detach().clone())
        self.pos_embed = nn.Parameter(vit.pos_embed.detach().clone())
        self.blocks = _copied_blocks(vit, range(block_count))

    def forward(self, images: Tensor) -> Tensor:
        """Runs the embedding and the first blocks."""
        tokens = _with_positions(self.patch_embed(images), self.cls_token, self.pos_embed)
        pooled = {}
        for done, block in enumerate(self.blocks.values(), start=1):
            tokens = block(tokens)
            pooled[done] = tokens[:, 1:].mean(dim=1, keepdim=True)
        ends = [pooled[depth] for depth in self.depths]
        if self.alone:
            ends.append(tokens[:, :1])
            length = math.sqrt(len(ends))
            ends = [F.normalize(end, dim=-1) / length for end in ends]
        return torch.cat([tokens, *ends], dim=1)


class Suffix(nn.Module):
    """The encoder's last blocks: hidden tokens [n, tokens, dim] to features [n, parts * dim].

    Blocks keep the index they have in the whole encoder. The last one computes the class
    token's row only, which is all the features need. Behind the hidden tokens come `ends` others.
    Features are the class token and then each of those, every part at unit length; where there are
    none, or base features are the prefix's alone, the class token as it is.
    """

    def __init__(self, vit: VisionTransformer, block_count: int, ends: int, *, alone: bool) -> None:
        super().__init__()
        self.ends = ends
        self.alone = alone
        self.blocks = _copied_blocks(vit, range(vit.depth - block_count, vit.depth))
        self.norm = copy.deepcopy(vit.norm)

    def forward(self, hidden: Tensor) -> Tensor:
        """Runs the last blocks and the final norm."""
        count = hidden.shape[1] - self.ends
        tokens, pooled = hidden[:, :count], hidden[:, count:]
        *inner, last = self.blocks.values()
        for block in inner:
            tokens = block(tokens)
        assert isinstance(last, Block)
        output: Tensor = self.norm(last.forward_cls(tokens))
        if self.alone or not self.ends:
            return output[:, 0]
        return F.normalize(torch.cat([output, pooled], dim=1), dim=-1).flatten(1)


def _with_positions(patches: Tensor, cls_token: Tensor, positions: Tensor) -> Tensor:
    cls = cls_token.expand(patches.shape[0], -1, -1)
    return torch.cat([cls, patches], dim=1) + positions


def _copied_blocks(vit: VisionTransformer, indices: Iterable[int]) -> nn.ModuleDict:
    return nn.ModuleDict({str(i): copy.deepcopy(vit.blocks[str(i)]) for i in indices})


def pooled_depths(depth: int, suffix_blocks: int, *, prefix_alone: bool = False) -> tuple[int, ...]:
    """The depths whose patch tokens become features: a third and a half of the encoder.

    Of the pairs of depths tried these gave a Gaussian head the best accuracy over photographs,
    sketches and spectrograms. Base features of the prefix alone are pooled after a quarter, a half
    and at its end instead: as good a head, and camera and weather are told better. Where the
    prefix ends earlier, its end stands in.

    Args:
        depth: Blocks of the whole encoder.
        suffix_blocks: How many of them are the suffix; only the prefix's can be pooled.
        prefix_alone: Whether base features are the prefix's alone.

    Example:
        >>> pooled_depths(12, 4), pooled_depths(12, 4, prefix_alone=True)
        ((4, 6), (3, 6, 8))
    """
    cut = depth - suffix_blocks
    wanted = (depth / 4, depth / 2, cut) if prefix_alone else (depth / 3, depth / 2)
    return tuple(sorted({min(max(round(each), 1), cut) for each in wanted} - {0}))


def split_vit(
    vit: VisionTransformer,
    suffix_blocks: int,
    depths: Sequence[int] = (),
    *,
    prefix_alone: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Cuts an encoder in two; `suffix(prefix(images))` begins with what `vit(images)` gives.

    Both halves are copies: hooks on the suffix leave the whole encoder as it was. A suffix
    module is named as in the whole, `suffix.get_submodule("blocks.9.mlp")`.

    Args:
        vit: The whole encoder.
        suffix_blocks: How many of the last blocks the suffix takes, 1 to `vit.depth`.
        depths: After how many blocks the patch tokens are pooled into further features; all
            within the prefix. Without any, `suffix(prefix(images))` equals `vit(images)`.
        prefix_alone: The prefix's output ends with all base features: the pooled tokens and the
            class token. The suffix then hands on none of them.

    Returns:
        The prefix, images float32 [n, 3, s, s] to hidden [n, tokens + len(depths), dim], and the
        suffix, hidden to features [n, dim * (1 + len(depths))]; where the prefix stands alone,
        one hidden token more, and features [n, dim].

    Raises:
        EncoderError: `suffix_blocks` is outside 1 to `vit.depth`, or a depth outside the prefix.
    """
    if not 1 <= suffix_blocks <= vit.depth:
        raise EncoderError(f"suffix of {suffix_blocks} blocks asked of an encoder of {vit.depth}")
    cut = vit.depth - suffix_blocks
    if outside := [depth for depth in depths if not 1 <= depth <= cut]:
        raise EncoderError(f"depth {outside[0]} is outside the prefix of {cut} blocks")
    ends = len(depths) + int(prefix_alone)
    return (
        Prefix(vit, cut, depths, alone=prefix_alone),
        Suffix(vit, suffix_blocks, ends, alone=prefix_alone),
    )


def vit_sites(vit: VisionTransformer, suffix_blocks: int) -> dict[str, Site]:
    """Every place of the last blocks that an adapter family may attach to, by module name."""
    sites: dict[str, Site] = {}
    for index in range(vit.depth - suffix_blocks, vit.depth):
        block = f"blocks.{index}"
        sites |= {
            f"{block}.norm1": Site(vit.dim, kind="norm"),
            f"{block}.attn.query": Site(vit.dim, kind="query"),
            f"{block}.attn.key": Site(vit.dim, kind="key"),
            f"{block}.attn.value": Site(vit.dim, kind="value"),
            f"{block}.attn.mix": Site(vit.dim, kind="attention", heads=vit.heads),
            f"{block}.attn.proj": Site(vit.dim, kind="linear"),
            f"{block}.norm2": Site(vit.dim, kind="norm"),
            f"{block}.mlp.fc1": Site(vit.dim, kind="linear", out_dim=vit.hidden),
            f"{block}.mlp.act": Site(vit.hidden, kind="activation"),
            f"{block}.mlp": Site(vit.dim),
        }
    return sites


def vit_from_state_dict(
    state: Mapping[str, Tensor], *, image_size: int, heads: int | None = None
) -> VisionTransformer:
    """Builds an encoder from timm-named weights, its sizes read off their shapes.

    Args:
        state: Weights by name, in any float type; a classification `head.*` is ignored.
        image_size: Side of the input, in pixels. The position grid is resized to it, bicubic
            and antialiased, when the weights were made for another size.
        heads: Attention heads; `dim // 64` when absent.

    Returns:
        The encoder in float32 and evaluation mode, holding copies of the weights.

    Raises:
        EncoderError: A weight is missing, unknown or of an unexpected shape; the message
            names it.
    """
    weights = {key: value for key, value in state.items() if not key.startswith("head.")}
    kernel = shaped(weights, "patch_embed.proj.weight", rank=4)
    dim, patch = kernel.shape[0], kernel.shape[-1]
    hidden = shaped(weights, "blocks.0.mlp.fc1.weight", rank=2).shape[0]
    positions = shaped(weights, "pos_embed", rank=3)
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if heads is None:
        heads = max(dim // 64, 1)
    vit = VisionTransformer(
        image_size=image_size, patch=patch, dim=dim, depth=depth, heads=heads, hidden=hidden
    )
    weights["pos_embed"] = _resize_positions(positions.float(), image_size // patch)
    load_exactly(vit, weights)
    return vit.eval()


def _resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Resizes [1, 1 + g * g, dim] to [1, 1 + grid * grid, dim], the class position kept."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if side < 1 or side * side != positions.shape[1] - 1:
        raise EncoderError(
            f"weight 'pos_embed' has {positions.shape[1]} positions, expected a square and one"
        )
    if side == grid:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    image = patches.transpose(1, 2).reshape(1, -1, side, side)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, image.flatten(2).transpose(1, 2)], dim=1)
