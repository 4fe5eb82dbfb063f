"""`driftkeel encoder quantise`: reads images, calls `exporter.quantise`, prints.

The only command that needs ONNX Runtime's quantiser, which it imports when it runs.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from exporter.console import progress, training_extra
from exporter.errors import EncoderError, PreprocessError
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import decode_sample, prepare
from exporter.sessions import Array

# More change the scales little and cost time.
_MOST_IMAGES = 512


@click.command("quantise")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new directory.")
@click.option(
    "--method",
    type=click.Choice(["int8", "int8-static", "int4", "float16"]),
    default="int8",
    show_default=True,
    help="int8 for transformers, int8-static for convolutions; see docs/encoders.md.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="A folder of images, or a .npy array, like what the encoder will see. int8-static needs "
    f"them; at most {_MOST_IMAGES} are used.",
)
@click.option("--name", help="What to call it; the original's name and the method when absent.")
def quantise_command(
    path: Path | None, out: Path, method: str, images: Path | None, name: str | None
) -> None:
    """Write a quantised copy of the encoder package in PATH, or else of the shipped one.

    The copy is another encoder: bundles and calibration of the original do not fit it.
    """
    with training_extra():
        from exporter.quantise import quantise  # noqa: PLC0415 - ONNX only where it is needed
    package = EncoderPackage.load(path) if path else default_encoder_package()
    samples = None if images is None else _read(images, package)
    made = quantise(package, out, method=method, images=samples, name=name, progress=progress())
    about = made.manifest.quantised
    assert about is not None
    click.echo(f"name        {made.name}")
    click.echo(f"digest      {made.digest}")
    click.echo(f"from        {about.original}")
    click.echo(f"difference  {100 * about.difference:.1f} % of the features' size")
    for which, entry in (("size", made), ("original", package)):
        size = sum(file.size for file in entry.manifest.files.values())
        click.echo(f"{which:<10}  {size} bytes")


def _read(path: Path, package: EncoderPackage) -> Array:
    """Images of a file or of a folder's files, prepared for the encoder."""
    files = (
        sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    )
    if not files:
        raise EncoderError(f"{path} holds no image")
    parts: list[Array] = []
    count = 0
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise EncoderError(f"cannot read {file}: {error.strerror}") from error
        try:
            part = decode_sample(data)[: _MOST_IMAGES - count]
        except PreprocessError as error:
            raise PreprocessError(f"{file}: {error}") from error
        parts.append(prepare(part, package))
        count += len(part)
        if count == _MOST_IMAGES:
            break
    return np.concatenate(parts)
