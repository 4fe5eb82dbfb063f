"""`driftkeel encoder build|inspect|derive|quantise` and `driftkeel export`.

Thin: reads options and files, calls the exporter, prints. Only the commands that build or write
graphs import torch and ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from exporter.console import progress, training_extra
from exporter.errors import EncoderError
from exporter.package import BaseFeatures, EncoderPackage, PackageManifest, default_encoder_package
from exporter.quantise_cli import quantise_command
from exporter.sessions import EncoderSessions

if TYPE_CHECKING:
    from exporter.parity import ParityReport

_PARITY_SAMPLES = 8


@click.group()
def encoder() -> None:
    """Build, inspect, complete and quantise encoder packages."""


@encoder.command()
@click.option(
    "--weights",
    required=True,
    type=click.Path(path_type=Path),
    help="A safetensors file with the weights of a Vision Transformer or a MobileNetV2.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new directory.")
@click.option("--image-size", type=int, help="Side of the input in pixels.")
@click.option(
    "--suffix-blocks",
    type=int,
    default=4,
    show_default=True,
    help="Last blocks that take adapters.",
)
@click.option(
    "--heads", type=int, help="Attention heads of a Vision Transformer; width / 64 when absent."
)
@click.option("--mean", help="One number, or three with commas.  [default: 0.5]")
@click.option("--std", help="One number, or three with commas.  [default: 0.5]")
@click.option("--name", help="What to call it; the file's name when absent.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="How weights are stored; float16 halves the size and rounds them.",
)
@click.option(
    "--families",
    default="bottleneck",
    show_default=True,
    help="Adapter families to build for, with commas, or all.",
)
@click.option(
    "--base-features",
    type=click.Choice(["whole", "prefix"]),
    help="What shift detection and routing see: the whole encoder's features, or the prefix's "
    "alone, which is faster and for a Vision Transformer, where it is the default, as good.",
)
def build(  # noqa: PLR0917 - click passes one argument an option
    weights: Path,
    out: Path,
    image_size: int | None,
    suffix_blocks: int,
    heads: int | None,
    mean: str | None,
    std: str | None,
    name: str | None,
    dtype: str,
    families: str,
    base_features: BaseFeatures | None,
) -> None:
    """Build an encoder package from the weights of a Vision Transformer or a MobileNetV2.

    Which of them it is, the weights' names say: timm's for the first, `features.N.body.M.conv`
    with batch norm folded in for the second.
    Where an option is absent, the safetensors file's own metadata is used when it has an entry of
    that name. Other networks are built with exporter.build.build_encoder, from Python.
    """
    about = _metadata(weights)
    size = image_size or _whole(about.get("image_size"), "image_size")
    if size is None:
        raise click.UsageError("--image-size is needed: the file does not say it")
    with training_extra():
        from safetensors.torch import load_file  # noqa: PLC0415 - torch only where it is needed

        from exporter.architectures import build_known  # noqa: PLC0415
    package = build_known(
        load_file(weights),
        image_size=size,
        suffix_blocks=suffix_blocks,
        heads=heads or _whole(about.get("heads"), "heads"),
        mean=_colour(mean or about.get("mean", "0.5"), "mean"),
        std=_colour(std or about.get("std", "0.5"), "std"),
        name=name or about.get("name") or weights.stem,
        dtype="float16" if dtype == "float16" else "float32",
        families=None if families == "all" else families.split(","),
        base_features=base_features,
        out=out,
        progress=progress(),
    )
    _describe(package)


@encoder.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the digest and the manifest as JSON.")
def inspect(path: Path | None, as_json: bool) -> None:
    """Check the encoder package in PATH and describe it; the shipped one when PATH is absent."""
    package = EncoderPackage.load(path) if path else default_encoder_package()
    if as_json:
        about = {"digest": package.digest, "manifest": msgspec.to_builtins(package.manifest)}
        click.echo(json.dumps(about, indent=2))
    else:
        _describe(package)


@encoder.command("derive")
@click.argument("path", required=False, type=click.Path(path_type=Path))
def derive_command(path: Path | None) -> None:
    """Add the bare suffix and the banks to the package in PATH; its digest stays what it is.

    Packages built by this version have them already. They are needed to fold adapters into the
    encoder's weights and to answer one batch with several adapters.
    """
    with training_extra():
        from exporter.derive import derive  # noqa: PLC0415 - ONNX only where it is needed
    package = EncoderPackage.load(path) if path else default_encoder_package()
    for name in derive(package, progress()):
        click.echo(f"{package.path / name}: {(package.path / name).stat().st_size} bytes")


@click.command()
@click.option(
    "--encoder",
    "encoder_path",
    type=click.Path(path_type=Path),
    help="The encoder package's directory; the shipped encoder when absent.",
)
@click.option(
    "--bundle",
    required=True,
    type=click.Path(path_type=Path),
    help="The bundle with the adapter.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The ONNX file; of an adapter file, the directory.",
)
@click.option("--whole", is_flag=True, help="Include the prefix: images in, features out.")
@click.option(
    "--form",
    type=click.Choice(["nodes", "folded", "adapter-file"]),
    default="nodes",
    show_default=True,
    help="The adapter as nodes beside the encoder's, in the encoder's weights, or alone for ONNX "
    "Runtime's adapter files.",
)
def export(encoder_path: Path | None, bundle: Path, out: Path, whole: bool, form: str) -> None:
    """Write one adapter as a standalone ONNX file, or as an adapter file.

    Every form is compared with torch before one is written.
    """
    from adapter_store.bundle import check_compatible, unpack  # noqa: PLC0415
    from exporter.adapter_files import write_adapter  # noqa: PLC0415

    with training_extra():
        from exporter.attach import attach  # noqa: PLC0415 - torch only where it is needed
        from exporter.parity import parity  # noqa: PLC0415
    say = progress()
    package = EncoderPackage.load(encoder_path) if encoder_path else default_encoder_package()
    try:
        data = bundle.read_bytes()
    except OSError as error:
        raise EncoderError(f"cannot read {bundle}: {error.strerror}") from error
    adapter = unpack(data)
    check_compatible(adapter, package.interface())
    family = package.families[0]
    if adapter.tensors:
        family = adapter.manifest.family
        say("comparing with torch")
        shape = (_PARITY_SAMPLES, 3, package.image_size, package.image_size)
        noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        hidden = EncoderSessions(package).prefix(noise)
        report = parity(package, family, adapter.tensors, hidden)
        for line in _compared(report):
            say(line)
    if form == "adapter-file":
        out = write_adapter(package, family, adapter.tensors, out)
    else:
        folded = form == "folded"
        attach(package, adapter.tensors, out, family=family, whole=whole, folded=folded)
    click.echo(f"{out}: {out.stat().st_size} bytes")


def _compared(report: ParityReport) -> Iterator[str]:
    """The parity report in words, one form a line."""
    for name, form in report.forms.items():
        median, _, most = form.quantiles
        yield (
            f"{name}: differs by {form.largest:.2g} of the features' size at most, half of them by "
            f"{median:.1g}, 99 % by {most:.1g}; {form.decisions_changed} of {report.samples} "
            "decisions changed"
        )
    for name, reason in report.left_out.items():
        yield f"{name}: not possible: {reason}"


def _describe(package: EncoderPackage) -> None:
    manifest = package.manifest
    size = sum(entry.size for entry in manifest.files.values())
    rows = [
        ("name", manifest.name),
        ("digest", package.digest),
        ("input", f"{manifest.image_size} x {manifest.image_size} RGB"),
        ("mean, std", f"{list(manifest.mean)}, {list(manifest.std)}"),
        ("hidden", " x ".join(str(axis) for axis in manifest.hidden_shape)),
        ("features", _features(package)),
        ("weights", manifest.dtype),
        *_quantisation(manifest),
        ("families", ", ".join(package.families)),
        *(
            ("site", f"{name} ({site.kind}, {site.dim} channels)")
            for name, site in sorted(manifest.sites.items())
        ),
        ("built with", ", ".join(f"{k} {v}" for k, v in sorted(manifest.built_with.items()))),
        ("size", f"{size} bytes in {len(manifest.files)} files"),
    ]
    for key, value in rows:
        click.echo(f"{key:<10}  {value}")


def _features(package: EncoderPackage) -> str:
    if package.base_from_prefix:
        return f"{package.feature_dim} of the prefix, {package.network_dim} of the network"
    return str(package.feature_dim)


def _quantisation(manifest: PackageManifest) -> list[tuple[str, str]]:
    made = manifest.quantised
    if made is None:
        return []
    return [("quantised", f"{made.method}, from {made.original}, {made.difference:.2g} away")]


def _metadata(weights: Path) -> dict[str, str]:
    try:
        with safe_open(weights, framework="numpy") as archive:
            return dict(archive.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{weights} is not a readable safetensors file: {error}") from error


def _whole(text: str | None, key: str) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise EncoderError(f"the file's metadata has {key} {text!r}, expected a whole number")
    return int(text)


def _colour(text: str, key: str) -> tuple[float, float, float]:
    try:
        values = [float(part) for part in text.strip("[]").split(",")]
    except ValueError as error:
        raise EncoderError(f"{key} is {text!r}, expected one number or three") from error
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise EncoderError(f"{key} is {text!r}, expected one number or three")
    red, green, blue = values
    return red, green, blue


encoder.add_command(quantise_command)
