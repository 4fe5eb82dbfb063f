"""Which network a state dict's weights are of, and building its encoder package.

`driftkeel encoder build` calls this. A new architecture is a builder and a line in
`build_known`; what is in the package is `exporter.build`'s to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from exporter.build import Progress, build_encoder, build_vit
from exporter.errors import EncoderError
from exporter.families import adapter_family, attached_sites, family_names
from exporter.mobilenet import (
    DEPTH,
    mobilenet_from_state_dict,
    residual_blocks,
    split_mobilenet,
    tapped_depths,
)
from exporter.package import BaseFeatures, EncoderPackage, Site

# A weight that every network of the architecture has and none of the others.
_VIT_KEY = "patch_embed.proj.weight"
_MOBILENET_KEY = f"features.{DEPTH}.body.0.conv.weight"


def _silent(line: str) -> None:
    del line


def attachable_families(sites: Mapping[str, Site]) -> list[str]:
    """The adapter families that find a site of their kinds among these."""
    found = []
    for name in family_names():
        with contextlib.suppress(EncoderError):
            attached_sites(adapter_family(name), sites)
            found.append(name)
    return found


def build_mobilenet(
    state: Mapping[str, Tensor],
    *,
    image_size: int,
    suffix_blocks: int,
    name: str,
    out: Path,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    families: Sequence[str] | None = ("bottleneck",),
    base_features: BaseFeatures = "whole",
    dtype: Literal["float16", "float32"] = "float32",
    progress: Progress = _silent,
) -> EncoderPackage:
    """Builds an encoder package from a MobileNetV2's weights with batch norm folded in.

    The last blocks are the suffix, and the convolutions of each that is added to its input are a
    site. Features are the mean over space of the last convolution, and what the prefix's maps are
    on average at `tapped_depths`.

    Args:
        state: The weights, as `mobilenet_from_state_dict` takes them.
        image_size: Side of the input in pixels.
        suffix_blocks: How many of the last blocks are the suffix, 1 to 16.
        name: The name people will know the encoder by.
        out: The package's directory; it must not exist.
        mean: Mean of each colour channel, of values in 0 to 1.
        std: Standard deviation of each colour channel.
        families: The adapter families to capture the suffix for; None for all that attach to
            convolutions.
        base_features: Whether base features are the whole encoder's or the prefix's alone.
        dtype: What the package stores weights in. The encoder is what they are after rounding.
        progress: Told each step as it begins.

    Raises:
        EncoderError: The weights are not a MobileNetV2's, no block of the suffix can take an
            adapter, or the result is not usable.
    """
    net = mobilenet_from_state_dict(state, image_size)
    depths = tapped_depths(suffix_blocks)
    alone = base_features == "prefix"
    prefix, suffix = split_mobilenet(net, suffix_blocks, depths, prefix_alone=alone)
    blocks = residual_blocks(net, suffix_blocks)
    if not blocks:
        raise EncoderError(
            f"none of the last {suffix_blocks} blocks is added to its input, so none can take "
            "an adapter; ask for more suffix blocks"
        )
    sites = {site: Site(channels, channel_axis=1) for site, channels in blocks.items()}
    taps = tuple(net.block(depth).width for depth in depths)
    return build_encoder(
        prefix,
        suffix,
        sites=sites,
        image_size=image_size,
        mean=mean,
        std=std,
        name=name,
        out=out,
        families=attachable_families(sites) if families is None else families,
        feature_parts=taps if alone else (net.dim, *taps),
        base_features=base_features,
        dtype=dtype,
        progress=progress,
    )


def build_known(
    state: Mapping[str, Tensor],
    *,
    image_size: int,
    suffix_blocks: int,
    name: str,
    out: Path,
    heads: int | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    families: Sequence[str] | None = ("bottleneck",),
    base_features: BaseFeatures | None = None,
    dtype: Literal["float16", "float32"] = "float32",
    progress: Progress = _silent,
) -> EncoderPackage:
    """Builds an encoder package from weights whose names say what network they are of.

    Args:
        state: The weights of a Vision Transformer under timm's names, or of a MobileNetV2.
        image_size: Side of the input in pixels.
        suffix_blocks: How many of the last blocks are the suffix.
        name: The name people will know the encoder by.
        out: The package's directory; it must not exist.
        heads: Attention heads of a Vision Transformer; `dim // 64` when absent.
        mean: Mean of each colour channel, of values in 0 to 1.
        std: Standard deviation of each colour channel.
        families: The adapter families to capture the suffix for; None for all that can attach.
        base_features: Whether base features are the whole encoder's or the prefix's alone; when
            absent, the prefix's of a Vision Transformer whose prefix has half of its blocks or
            more, which loses nothing by it, and the whole encoder's of any other.
        dtype: What the package stores weights in.
        progress: Told each step as it begins.

    Raises:
        EncoderError: The weights are of no network known here, or not usable.
    """
    if _VIT_KEY in state:
        return build_vit(
            state,
            image_size=image_size,
            suffix_blocks=suffix_blocks,
            name=name,
            out=out,
            heads=heads,
            mean=mean,
            std=std,
            families=family_names() if families is None else families,
            base_features=base_features or _transformers_base(state, suffix_blocks),
            dtype=dtype,
            progress=progress,
        )
    if _MOBILENET_KEY not in state:
        raise EncoderError(
            "the weights are of no known network: a Vision Transformer under timm's names has "
            f"{_VIT_KEY!r}, a MobileNetV2 with batch norm folded in has {_MOBILENET_KEY!r}; "
            f"found {', '.join(sorted(state)[:3]) or 'nothing'}. Build others from Python with "
            "exporter.build.build_encoder"
        )
    if heads is not None:
        raise EncoderError(f"{heads} heads were asked of a MobileNetV2, which has none")
    return build_mobilenet(
        state,
        image_size=image_size,
        suffix_blocks=suffix_blocks,
        name=name,
        out=out,
        mean=mean,
        std=std,
        families=families,
        base_features=base_features or "whole",
        dtype=dtype,
        progress=progress,
    )


def _transformers_base(state: Mapping[str, Tensor], suffix_blocks: int) -> BaseFeatures:
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return "prefix" if 2 * suffix_blocks <= depth else "whole"
