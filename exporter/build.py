"""Building encoder packages from a ViT's weights or from any two torch modules.

`build_vit` serves timm-named Vision Transformers; `build_encoder` is the general way: you say
where the network is cut and where adapters attach, and it refuses, naming the fault, what would
not work on a device. Only whoever builds encoders needs this; devices receive the package.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from exporter.derive import derive
from exporter.errors import EncoderError
from exporter.families import adapter_family, attached_sites, tensor_shapes
from exporter.graphs import weight_names
from exporter.lowering import prefix_graph, suffix_graph
from exporter.package import (
    FORMAT,
    MANIFEST,
    PREFIX_GRAPH,
    PREFIX_KEY,
    SUFFIX_KEY,
    WEIGHTS,
    BaseFeatures,
    EncoderPackage,
    FamilyEntry,
    PackageManifest,
    Site,
    canonical,
    file_entries,
)
from exporter.programs import (
    AdaptedSuffix,
    capture_prefix,
    capture_suffix,
    save_program,
)
from exporter.vit import pooled_depths, split_vit, vit_from_state_dict, vit_sites
from exporter.writing import check_absent, write_directory

Progress = Callable[[str], None]
_PROBE_IMAGES = 2
# How far from 1 the length of base features may be, in float32.
_LENGTH_TOLERANCE = 1e-3
# How many tensors a site's module takes, where that is not one.
_PROJECTION = ((1, 2), "the tensor it projects, and perhaps what that became")
_TAKES: dict[str, tuple[tuple[int, ...], str]] = {
    "query": _PROJECTION,
    "key": _PROJECTION,
    "value": _PROJECTION,
    "attention": ((3,), "query, key and value"),
}


def _silent(line: str) -> None:
    del line


def build_vit(
    state: Mapping[str, Tensor],
    *,
    image_size: int,
    suffix_blocks: int,
    name: str,
    out: Path,
    heads: int | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    families: Sequence[str] = ("bottleneck",),
    base_features: BaseFeatures = "whole",
    dtype: Literal["float16", "float32"] = "float32",
    progress: Progress = _silent,
) -> EncoderPackage:
    """Builds an encoder package from a Vision Transformer's weights under timm's names.

    The last blocks are the suffix, where every family finds its sites. Base features are the class
    token and what the prefix's patch tokens are on average at `pooled_depths`.

    Args:
        state: The weights.
        image_size: Side of the input in pixels; positions are resized to it.
        suffix_blocks: How many of the last blocks are the suffix.
        name: The name people will know the encoder by.
        out: The package's directory; it must not exist.
        heads: Attention heads; `dim // 64` when absent.
        mean: Mean of each colour channel, of values in 0 to 1.
        std: Standard deviation of each colour channel.
        families: The adapter families to capture the suffix for.
        base_features: Whether base features are the whole encoder's or the prefix's alone, which
            costs an adapted sample no second run of the suffix.
        dtype: What the package stores weights in. The encoder is what they are after rounding.
        progress: Told each step as it begins.

    Raises:
        EncoderError: The weights are not a Vision Transformer's, or the result is not usable.
    """
    vit = vit_from_state_dict(state, image_size=image_size, heads=heads)
    alone = base_features == "prefix"
    if alone and suffix_blocks >= vit.depth:
        raise EncoderError(
            f"with {suffix_blocks} of {vit.depth} blocks in the suffix the prefix has none to take "
            "base features from; take fewer, or base features of the whole encoder"
        )
    depths = pooled_depths(vit.depth, suffix_blocks, prefix_alone=alone)
    prefix, suffix = split_vit(vit, suffix_blocks, depths, prefix_alone=alone)
    return build_encoder(
        prefix,
        suffix,
        sites=vit_sites(vit, suffix_blocks),
        image_size=image_size,
        mean=mean,
        std=std,
        name=name,
        out=out,
        families=families,
        feature_parts=(vit.dim,) * (1 + len(depths)),
        base_features=base_features,
        dtype=dtype,
        progress=progress,
    )


def build_encoder(
    prefix: nn.Module,
    suffix: nn.Module,
    *,
    sites: Mapping[str, int | Site],
    image_size: int,
    name: str,
    out: Path,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    families: Sequence[str] = ("bottleneck",),
    feature_parts: Sequence[int] | None = None,
    base_features: BaseFeatures = "whole",
    dtype: Literal["float16", "float32"] = "float32",
    progress: Progress = _silent,
) -> EncoderPackage:
    """Builds an encoder package from any network that `torch.export` can capture.

    Args:
        prefix: Maps images float32 [n, 3, s, s], normalised, to one hidden tensor [n, ...].
        suffix: Maps that hidden tensor to features [n, d].
        sites: Where adapters attach: names of submodules of `suffix`, as `get_submodule` takes
            them, and the number of channels each maps to as many. A module must take one tensor
            and return one of the same shape. Channels are on the last axis; for feature maps
            [n, c, h, w] give `Site(c, channel_axis=1)`. Further kinds of places are `Site`'s to
            describe; those that no family asked for attaches to are left out.
        image_size: Side s of the input in pixels.
        name: The name people will know the encoder by.
        out: The package's directory; it must not exist. It appears whole or not at all.
        mean: Mean of each colour channel, of values in 0 to 1.
        std: Standard deviation of each colour channel.
        families: The adapter families to capture the suffix for; each must find a site of its
            kinds.
        feature_parts: Widths of the parts that base features are put together from; one part when
            absent. They are the suffix's features, the network's own output first.
        base_features: With `"prefix"` the parts are what the prefix's output ends with, of length
            one together, and the suffix gives the network's own output alone.
        dtype: What the package stores weights in. The encoder is what they are after rounding.
        progress: Told each step as it begins.

    Returns:
        The package, loaded from what was written.

    Raises:
        EncoderError: A site does not exist or is never run, shapes do not fit together, an output
            is not finite, or a half cannot be captured.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> prefix = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.GELU())
        >>> suffix = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
        >>> package = build_encoder(prefix, suffix, sites={"0": 16}, image_size=8, name="toy",
        ...                         out=folder / "toy")
        >>> package.feature_dim, package.sites
        (4, ('0',))
    """
    check_absent(out)
    if not families:
        raise EncoderError("no adapter family was asked for; an encoder needs at least one")
    colours = _colour(mean, "mean"), _colour(std, "std")
    chosen: dict[str, Site] = {}
    if sites:
        for family_name in families:
            chosen |= attached_sites(adapter_family(family_name), sites)
    prefix, suffix = _stored_as(prefix, dtype), _stored_as(suffix, dtype)
    progress("checking the halves and the sites")
    images = torch.randn(
        _PROBE_IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)
    )
    hidden, features = _probe(prefix, suffix, images, chosen)
    alone = base_features == "prefix"
    if alone:
        if not feature_parts or sum(feature_parts) > hidden[0].numel():
            raise EncoderError(
                f"base features of the prefix alone need the widths of their parts, within the "
                f"{hidden[0].numel()} values of its output; feature_parts is {feature_parts}"
            )
        lengths = hidden.flatten(1)[:, -sum(feature_parts) :].norm(dim=1)
        if float((lengths - 1).abs().max()) > _LENGTH_TOLERANCE:
            raise EncoderError(
                f"base features at the end of the prefix's output have length {lengths[0]:.3g}, "
                "expected 1; end the prefix with torch.nn.functional.normalize, each part divided "
                "by the square root of their number"
            )
    elif feature_parts is not None and sum(feature_parts) != features.shape[1]:
        raise EncoderError(
            f"feature parts {list(feature_parts)} do not add up to the {features.shape[1]} "
            "features that the suffix returns"
        )
    parts = tuple(feature_parts or (features.shape[1],))

    progress("packing the weights")
    contents = {WEIGHTS: _weights(prefix, suffix, dtype)}
    progress("capturing the prefix and lowering it to ONNX")
    with _capturing("the prefix"):
        protos = {PREFIX_GRAPH: prefix_graph(capture_prefix(prefix, images))}
    entries = {}
    for family_name in families:
        progress(f"capturing the suffix for {family_name!r} adapters and lowering it to ONNX")
        family = adapter_family(family_name)
        shapes = tensor_shapes(family, chosen)
        entry = FamilyEntry(
            graph=f"suffix-{family_name}.onnx",
            program=f"suffix-{family_name}.pt2.gz",
            tensors=shapes,
            settings=dict(family.settings),
        )
        with _capturing("the suffix"):
            adapted = AdaptedSuffix(copy.deepcopy(suffix), family, chosen)
            program = capture_suffix(adapted, hidden)
            protos[entry.graph] = suffix_graph(program, shapes)
            contents[entry.program] = save_program(program)
        entries[family_name] = entry
    contents |= {file: proto.SerializeToString() for file, proto in protos.items()}

    manifest = PackageManifest(
        format=FORMAT,
        name=name,
        image_size=image_size,
        mean=colours[0],
        std=colours[1],
        dtype=dtype,
        hidden_shape=tuple(hidden.shape[1:]),
        feature_dim=sum(parts),
        feature_parts=parts,
        sites=dict(sorted(chosen.items())),
        families=entries,
        graphs={file: weight_names(proto) for file, proto in protos.items()},
        files=file_entries(contents),
        built_with={package: version(package) for package in ("torch", "onnx", "onnxscript")},
        network_dim=features.shape[1] if alone else None,
    )
    progress("writing the package")
    write_directory(out, {**contents, MANIFEST: canonical(manifest)})
    package = EncoderPackage.load(out)
    progress("deriving the bare suffix and the banks")
    derive(package, progress)
    return package


def _stored_as(module: nn.Module, dtype: str) -> nn.Module:
    """A frozen copy in evaluation mode whose weights are what the package will hold."""
    module = copy.deepcopy(module).float().eval().requires_grad_(requires_grad=False)
    if dtype == "float16":
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half().float())
    return module


def _colour(values: Sequence[float], what: str) -> tuple[float, float, float]:
    if len(values) != 3 or not np.all(np.isfinite(values)) or (what == "std" and min(values) <= 0):
        raise EncoderError(f"{what} is {list(values)}, expected three usable numbers")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _probe(
    prefix: nn.Module, suffix: nn.Module, images: Tensor, sites: Mapping[str, Site]
) -> tuple[Tensor, Tensor]:
    """Runs both halves on random images and checks everything a device relies on."""
    _check_names(suffix, sites)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, site in sites.items():
            watch = _watcher(name, site, seen)
            hook = suffix.get_submodule(name).register_forward_hook(watch)
            hooks.callback(hook.remove)
        hidden = _run(prefix, images, "prefix", f"images {list(images.shape)}")
        features = _run(suffix, hidden, "suffix", f"the prefix's output {list(hidden.shape)}")
    if features.ndim != 2:
        raise EncoderError(
            f"the suffix returns shape {list(features.shape)}, expected features [n, d]; "
            "pool or flatten at its end"
        )
    for name, site in sites.items():
        _check_site(name, site, seen.get(name))
    return hidden, features


def _check_names(suffix: nn.Module, sites: Mapping[str, Site]) -> None:
    if not sites:
        raise EncoderError("no site was given; adapters need at least one module of the suffix")
    names = {name for name, _ in suffix.named_modules() if name}
    for name in sites:
        if name not in names:
            close = sorted(n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1])
            hint = f"; similar are {', '.join(close[:8])}" if close else ""
            raise EncoderError(f"site {name!r} is no module of the suffix{hint}")


def _watcher(name: str, site: Site, seen: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        del module
        counts, words = _TAKES.get(site.kind, ((1,), "exactly one tensor"))
        if len(inputs) not in counts or not isinstance(inputs[0], Tensor):
            raise EncoderError(f"site {name!r} does not take {words}")
        if not isinstance(output, Tensor):
            raise EncoderError(f"site {name!r} does not return a tensor")
        seen[name] = (inputs[0], output)

    return hook


def _run(half: nn.Module, value: Tensor, what: str, given: str) -> Tensor:
    try:
        output = half(value)
    except EncoderError:
        raise
    except Exception as error:  # whatever a user's module raises
        raise EncoderError(f"the {what} cannot run on {given}: {error}") from error
    if not isinstance(output, Tensor):
        raise EncoderError(f"the {what} returns {type(output).__name__}, expected one tensor")
    if output.ndim < 2 or output.shape[0] != value.shape[0]:
        raise EncoderError(
            f"the {what} returns shape {list(output.shape)} for a batch of {value.shape[0]}; "
            "expected the batch first"
        )
    if output.dtype != torch.float32:
        raise EncoderError(f"the {what} returns {output.dtype}, expected torch.float32")
    if not bool(torch.isfinite(output).all()):
        raise EncoderError(f"the {what} returns NaN or infinite values for random images")
    return output


def _check_site(name: str, site: Site, seen: tuple[Tensor, Tensor] | None) -> None:
    if seen is None:
        raise EncoderError(f"site {name!r} is never run by the suffix")
    x, y = seen
    if site.out_dim is None and x.shape != y.shape:
        raise EncoderError(
            f"site {name!r} maps shape {list(x.shape)} to {list(y.shape)}; "
            "an adapter needs both to be the same"
        )
    if not -x.ndim <= site.channel_axis < x.ndim or site.channel_axis == 0:
        raise EncoderError(f"site {name!r} has no axis {site.channel_axis}: {list(x.shape)}")
    if x.shape[site.channel_axis] != site.dim:
        raise EncoderError(
            f"site {name!r} has {x.shape[site.channel_axis]} channels on axis "
            f"{site.channel_axis} of {list(x.shape)}, expected {site.dim}; "
            "feature maps [n, c, h, w] need Site(c, channel_axis=1)"
        )
    outputs = list(x.shape)
    outputs[site.channel_axis] = site.outputs
    if list(y.shape) != outputs:
        raise EncoderError(
            f"site {name!r} maps shape {list(x.shape)} to {list(y.shape)}, expected {outputs}"
        )
    if site.heads < 1 or site.dim % site.heads:
        raise EncoderError(f"site {name!r} has {site.heads} heads for {site.dim} channels")


def _weights(prefix: nn.Module, suffix: nn.Module, dtype: str) -> bytes:
    wanted = torch.float16 if dtype == "float16" else torch.float32
    tensors = {}
    for key, half in ((PREFIX_KEY, prefix), (SUFFIX_KEY, suffix)):
        for name, value in half.state_dict().items():
            stored = value.to(wanted) if value.is_floating_point() else value
            if value.is_floating_point() and not bool(torch.isfinite(stored).all()):
                raise EncoderError(f"weight {key + name!r} is not finite in {dtype}")
            tensors[key + name] = stored.contiguous().clone()
    return bytes(save(tensors))


class _capturing:  # noqa: N801 - reads as a statement
    """Names the half that cannot be captured, whatever torch raises."""

    def __init__(self, half: str) -> None:
        self.half = half

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and issubclass(kind, Exception) and not issubclass(kind, EncoderError):
            raise EncoderError(
                f"{self.half} cannot be captured with torch.export or lowered to ONNX: {error}"
            ) from (error if isinstance(error, BaseException) else None)
