"""The project's own MobileNetV2, of any width, with batch norm folded into its convolutions.

Lives here: the network, building it from a state dict, and cutting it into the prefix that
runs once per sample and the suffix where adapters attach. The builders of encoder packages call
it; it never reads a file and never trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.errors import EncoderError
from exporter.state import load_exactly, shaped

# Sandler et al. (2018), table 2: how often each stage's block is repeated, and the stride of its
# first one. Widths are read off the weights; strides leave no trace in them.
_STAGES: Final = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
_STRIDES: Final = tuple(
    stride if first else 1
    for repeats, stride in _STAGES
    for first in (True, *(False for _ in range(repeats - 1)))
)
DEPTH: Final = len(_STRIDES)
_STEM_STRIDE: Final = 2
_HEAD: Final = str(DEPTH + 1)


class Convolution(nn.Module):
    """A convolution with a bias, padded as TensorFlow's 'SAME', and ReLU6 unless it is linear."""

    def __init__(
        self, given: int, width: int, *, kernel: int, stride: int = 1, groups: int = 1, linear: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, width, kernel, stride, groups=groups)
        self.linear = linear

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [n, given, h, w] to [n, width, ceil(h / stride), ceil(w / stride)]."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        top, bottom = _same_padding(maps.shape[2], kernel, stride)
        left, right = _same_padding(maps.shape[3], kernel, stride)
        if top or bottom or left or right:
            maps = F.pad(maps, (left, right, top, bottom))
        output: Tensor = self.conv(maps)
        return output if self.linear else F.relu6(output)


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: expand, filter each channel, project; added to its input if it can.

    Args:
        given: Channels of the input.
        expanded: Channels inside; where it equals `given` and `expands` is false, nothing expands.
        width: Channels of the output.
        stride: Of the filter.
        expands: Whether there is an expanding convolution.
    """

    def __init__(
        self, given: int, expanded: int, width: int, *, stride: int, expands: bool
    ) -> None:
        super().__init__()
        self.width = width
        self.residual = stride == 1 and given == width
        expand = [Convolution(given, expanded, kernel=1, linear=False)] if expands else []
        self.body = nn.Sequential(
            *expand,
            Convolution(expanded, expanded, kernel=3, stride=stride, groups=expanded, linear=False),
            Convolution(expanded, width, kernel=1, linear=True),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [n, given, h, w] to [n, width, ceil(h / stride), ceil(w / stride)]."""
        update: Tensor = self.body(maps)
        return maps + update if self.residual else update


class MobileNetV2(nn.Module):
    """MobileNetV2 without its classifier (Sandler et al., 2018, table 2).

    Args:
        image_size: Side of the square input, in pixels.
        stem: Channels of the first convolution.
        blocks: For each of the 17 blocks the channels inside and of its output; the channels
            inside are None for a block that does not expand.
        features: Channels of the last convolution: the width of the features.
    """

    def __init__(
        self,
        *,
        image_size: int,
        stem: int,
        blocks: Sequence[tuple[int | None, int]],
        features: int,
    ) -> None:
        super().__init__()
        if image_size < 1 or len(blocks) != DEPTH:
            raise EncoderError(
                f"a MobileNetV2 of {len(blocks)} blocks for {image_size} px was asked for, "
                f"expected {DEPTH} blocks and at least 1 px"
            )
        self.image_size, self.dim = image_size, features
        widths = [stem, *(width for _, width in blocks)]
        self.features = nn.ModuleDict(
            {"0": Convolution(3, stem, kernel=3, stride=_STEM_STRIDE, linear=False)}
        )
        for index, (given, width) in enumerate(pairwise(widths), start=1):
            inside = blocks[index - 1][0]
            self.features[str(index)] = InvertedResidual(
                given,
                given if inside is None else inside,
                width,
                stride=_STRIDES[index - 1],
                expands=inside is not None,
            )
        self.features[_HEAD] = Convolution(widths[-1], features, kernel=1, linear=False)

    def block(self, index: int) -> InvertedResidual:
        """The block of that number, 1 to 17."""
        block = self.features[str(index)]
        assert isinstance(block, InvertedResidual)
        return block

    def map_shape(self, blocks: int) -> tuple[int, int, int]:
        """Channels, height and width after the stem and that many blocks, 1 to 17."""
        side = -(-self.image_size // _STEM_STRIDE)
        for stride in _STRIDES[:blocks]:
            side = -(-side // stride)
        return self.block(blocks).width, side, side

    def forward(self, images: Tensor) -> Tensor:
        """Computes features: images float32 [n, 3, s, s], normalised, to their means [n, dim]."""
        maps = images
        for layer in self.features.values():
            maps = layer(maps)
        return maps.mean(dim=(2, 3))


class Prefix(nn.Module):
    """The encoder's first blocks: images [n, 3, s, s] to hidden [n, c * h * w + taps].

    The last block's maps are flattened; after them come the taps, the mean over space of the maps
    at each depth. The suffix takes them off again and hands them on as features, unless base
    features are the prefix's alone: then the taps, each of one length, are those, of length one.
    """

    def __init__(
        self, net: MobileNetV2, blocks: int, depths: Sequence[int], *, alone: bool
    ) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.alone = alone
        self.features = _copied(net, range(blocks + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Runs the stem and the first blocks."""
        maps, taps = images, {}
        length = math.sqrt(len(self.depths)) if self.alone else 1.0
        for done, layer in enumerate(self.features.values()):
            maps = layer(maps)
            if done in self.depths:
                tap = maps.mean(dim=(2, 3))
                taps[done] = F.normalize(tap, dim=1) / length if self.alone else tap
        return torch.cat([maps.flatten(1), *(taps[depth] for depth in self.depths)], dim=1)


class Suffix(nn.Module):
    """The encoder's last blocks: hidden [n, c * h * w + taps] to features [n, dim + taps].

    Layers keep the index they have in the whole encoder. With taps behind the maps, features are
    the network's own and then each tap, every part at unit length; without, or where base features
    are the prefix's alone, the network's own as they are.
    """

    def __init__(self, net: MobileNetV2, blocks: int, taps: Sequence[int], *, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        first = DEPTH + 1 - blocks
        self.shape = net.map_shape(first - 1)
        self.taps = list(taps)
        self.features = _copied(net, range(first, DEPTH + 2))

    def forward(self, hidden: Tensor) -> Tensor:
        """Runs the last blocks, the last convolution and the mean over space."""
        sizes = [math.prod(self.shape), *self.taps]
        maps, *taps = torch.split(hidden, sizes, dim=1)
        maps = maps.reshape(-1, *self.shape)
        for layer in self.features.values():
            maps = layer(maps)
        output = maps.mean(dim=(2, 3))
        if self.alone or not taps:
            return output
        return torch.cat([F.normalize(part, dim=1) for part in (output, *taps)], dim=1)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after an axis; an odd one goes after it, as TensorFlow's 'SAME' has it."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _copied(net: MobileNetV2, indices: Iterable[int]) -> nn.ModuleDict:
    return nn.ModuleDict({str(i): copy.deepcopy(net.features[str(i)]) for i in indices})


def tapped_depths(suffix_blocks: int) -> tuple[int, ...]:
    """The depths whose pooled maps become features: the prefix's end, and its last stage's start.

    On photographs a Gaussian head gained 3 to 4 points by the first and one more by the second,
    which did better than shallower ones.

    Args:
        suffix_blocks: How many of the 17 blocks are the suffix; only the prefix's can be tapped.

    Example:
        >>> tapped_depths(4)
        (10, 13)
    """
    cut = DEPTH - suffix_blocks
    ends = accumulate(repeats for repeats, _ in _STAGES)
    return tuple(sorted({max((end for end in ends if end < cut), default=cut), cut}))


def residual_blocks(net: MobileNetV2, suffix_blocks: int) -> dict[str, int]:
    """Where adapters can attach: the suffix's blocks that keep their input's shape.

    Returns:
        Channels by the name of each block's body, `"features.15.body"`.
    """
    blocks = {i: net.block(i) for i in range(DEPTH + 1 - suffix_blocks, DEPTH + 1)}
    return {f"features.{i}.body": block.width for i, block in blocks.items() if block.residual}


def split_mobilenet(
    net: MobileNetV2,
    suffix_blocks: int,
    depths: Sequence[int] = (),
    *,
    prefix_alone: bool = False,
) -> tuple[Prefix, Suffix]:
    """Cuts an encoder in two; `suffix(prefix(images))` begins with what `net(images)` gives.

    Both halves are copies: hooks on the suffix leave the whole encoder as it was. A suffix module
    is named as in the whole, `suffix.get_submodule("features.15.body")`.

    Args:
        net: The whole encoder.
        suffix_blocks: How many of the last blocks the suffix takes, 1 to 16; the convolution
            after them is always its own.
        depths: After how many blocks the maps are pooled into further features; all within the
            prefix. Without any, `suffix(prefix(images))` equals `net(images)`.
        prefix_alone: Base features are the taps alone, so the suffix hands on none of them.

    Returns:
        The prefix, images float32 [n, 3, s, s] to hidden [n, c * h * w + taps], and the suffix,
        hidden to features [n, net.dim + taps], where taps are the channels of all `depths`; or
        to [n, net.dim] where the prefix stands alone.

    Raises:
        EncoderError: `suffix_blocks` is outside 1 to 16, or a depth outside the prefix.
    """
    if not 1 <= suffix_blocks < DEPTH:
        raise EncoderError(
            f"suffix of {suffix_blocks} blocks asked of an encoder of {DEPTH}, which gives 1 to "
            f"{DEPTH - 1}"
        )
    cut = DEPTH - suffix_blocks
    if outside := [depth for depth in depths if not 1 <= depth <= cut]:
        raise EncoderError(f"depth {outside[0]} is outside the prefix of {cut} blocks")
    taps = [net.block(depth).width for depth in depths]
    return (
        Prefix(net, cut, depths, alone=prefix_alone),
        Suffix(net, suffix_blocks, taps, alone=prefix_alone),
    )


def mobilenet_from_state_dict(state: Mapping[str, Tensor], image_size: int) -> MobileNetV2:
    """Builds an encoder from weights with batch norm folded in, its widths read off their shapes.

    Args:
        state: Weights by name, in any float type: `features.0.conv`, `features.N.body.M.conv` for
            blocks 1 to 17, `features.18.conv`, each with a bias; a `classifier.*` is ignored.
        image_size: Side of the input, in pixels.

    Returns:
        The encoder in float32 and evaluation mode, holding copies of the weights.

    Raises:
        EncoderError: A weight is missing, unknown or of an unexpected shape; the message
            names it.
    """
    weights = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    blocks: list[tuple[int | None, int]] = []
    for index in range(1, DEPTH + 1):
        start = f"features.{index}.body"
        first = shaped(weights, f"{start}.0.conv.weight", rank=4)
        # A body begins with the filter of each channel, or with the convolution that expands.
        expands = f"{start}.2.conv.weight" in weights
        last = shaped(weights, f"{start}.{2 if expands else 1}.conv.weight", rank=4)
        blocks.append((first.shape[0] if expands else None, last.shape[0]))
    net = MobileNetV2(
        image_size=image_size,
        stem=shaped(weights, "features.0.conv.weight", rank=4).shape[0],
        blocks=blocks,
        features=shaped(weights, f"features.{_HEAD}.conv.weight", rank=4).shape[0],
    )
    load_exactly(net, weights)
    return net.eval()
