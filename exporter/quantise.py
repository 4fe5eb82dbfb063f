"""Quantising an encoder package into another encoder package.

The builder of encoders calls this, with calibration images where the method needs them. The result
is an encoder of its own: another digest, and class statistics, bundles and calibration made for the
original do not fit it. Its manifest says what it was made from. Adapters keep their own precision.
For training it carries the original's suffix: gradients come from that, features from the quantised
graphs. Needs ONNX, not torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from safetensors import safe_open
from safetensors.numpy import save

from exporter.errors import EncoderError
from exporter.graphs import weight_names, with_defaults
from exporter.package import (
    MANIFEST,
    PREFIX_GRAPH,
    SUFFIX_KEY,
    WEIGHTS,
    Array,
    EncoderPackage,
    PackageManifest,
    Quantisation,
    canonical,
    file_entries,
)
from exporter.quantise_graph import emptied, opened
from exporter.quantise_methods import METHODS, Feeds
from exporter.sessions import EncoderSessions
from exporter.writing import check_absent, write_directory

Floats = npt.NDArray[np.float32]
Progress = Callable[[str], None]

_PROBE_IMAGES: Final = 8
_PROBE_SEED: Final = 0
# The most that features may differ from the original's; what is useful is far below it.
_LARGEST_DIFFERENCE: Final = 0.5
# Even where activations' scales are fixed, sums in float32 differ in their last bit with the number
# of rows, and rounding to int8 makes a step of that. One row a run gives one answer for a sample.
_ROWS_PER_RUN: Final = 1


def quantise(
    package: EncoderPackage,
    out: Path,
    *,
    method: str = "int8",
    images: Floats | None = None,
    name: str | None = None,
    progress: Progress = lambda _: None,
) -> EncoderPackage:
    """Writes a quantised copy of an encoder.

    Args:
        package: The encoder; not itself a quantised one.
        out: The new package's directory; it must not exist.
        method: One of `METHODS`.
        images: Samples of what the encoder will see, float32 [n, 3, s, s] as
            `preprocess.prepare` gives them. Methods that fix activations' scales beforehand take
            them from these; the difference from the original is measured on them. Random images
            when absent.
        name: The name people will know it by; the original's and the method when absent.
        progress: Told each step as it begins.

    Returns:
        The package, loaded from what was written.

    Raises:
        EncoderError: The method is unknown or lacks images, the package is quantised already,
            nothing of a graph can be quantised, or features differ by half of their size.
    """
    check_absent(out)
    _check(package, method, images)
    if images is None:
        images = _noise(package)
    sessions = EncoderSessions(package)
    hidden = sessions.prefix(images)
    contents = {
        entry.program: package.read(entry.program) for entry in package.manifest.families.values()
    }
    made: dict[str, Array] = {}
    graphs: dict[str, tuple[str, ...]] = {}
    for graph, adapter in _graphs(package).items():
        progress(f"quantising {graph}")
        feeds = _feeds(images if graph == PREFIX_GRAPH else hidden, graph, adapter)
        proto, tensors = _quantised(package, graph, adapter, method, feeds)
        made |= tensors
        graphs[graph] = weight_names(proto)
        contents[graph] = proto.SerializeToString()
    kept = {weight for names in graphs.values() for weight in names} - set(made)
    contents[WEIGHTS] = save({**_stored(package, kept), **made})
    manifest = msgspec.structs.replace(
        package.manifest,
        name=name or f"{package.name}-{method}",
        graphs=graphs,
        files=file_entries(contents),
        built_with={**package.manifest.built_with, "onnxruntime": version("onnxruntime")},
        quantised=Quantisation(package.digest, method, 0.0),
        rows_per_run=_ROWS_PER_RUN,
    )
    progress("comparing with the original")
    difference = _difference(manifest, contents, images, sessions.suffix(hidden))
    found = Quantisation(package.digest, method, difference)
    manifest = msgspec.structs.replace(manifest, quantised=found)
    progress("writing the package")
    write_directory(out, {**contents, MANIFEST: canonical(manifest)})
    return EncoderPackage.load(out)


def _difference(
    manifest: PackageManifest, contents: Mapping[str, bytes], images: Floats, original: Floats
) -> float:
    """Runs the new package as a device would and compares its features with the original's."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft"
        write_directory(draft, {**contents, MANIFEST: canonical(manifest)})
        sessions = EncoderSessions(EncoderPackage.load(draft))
        features = sessions.suffix(sessions.prefix(images))
    difference = relative_difference(features, original)
    if not difference <= _LARGEST_DIFFERENCE:
        raise EncoderError(
            f"the features of {manifest.name!r} differ from the original's by {difference:.2g} of "
            f"their size, more than {_LARGEST_DIFFERENCE:g}; use another method, or images nearer "
            "to what the encoder was made for"
        )
    return difference


def _check(package: EncoderPackage, method: str, images: Floats | None) -> None:
    if method not in METHODS:
        raise EncoderError(f"no method {method!r} to quantise by; there are {', '.join(METHODS)}")
    if package.manifest.quantised is not None:
        raise EncoderError(
            f"{package.name!r} is quantised already; quantise the encoder it was made from, "
            f"{package.manifest.quantised.original}"
        )
    if METHODS[method].calibrated and images is None:
        raise EncoderError(
            f"{method} fixes the scales of activations beforehand; give images of what the "
            "encoder will see"
        )
    if images is not None and not len(images):
        raise EncoderError("no image was given to calibrate with")


def _noise(package: EncoderPackage) -> Floats:
    shape = (_PROBE_IMAGES, 3, package.image_size, package.image_size)
    return np.random.default_rng(_PROBE_SEED).standard_normal(shape, dtype=np.float32)


def _graphs(package: EncoderPackage) -> dict[str, Mapping[str, tuple[int | str, ...]]]:
    """Every graph of a package and the adapter tensors it takes."""
    families = package.manifest.families.values()
    return {PREFIX_GRAPH: {}, **{entry.graph: entry.tensors for entry in families}}


def _feeds(rows: Floats, graph: str, adapter: Mapping[str, tuple[int | str, ...]]) -> list[Feeds]:
    neutral = {
        name: np.zeros([axis if isinstance(axis, int) else 0 for axis in shape], np.float32)
        for name, shape in adapter.items()
    }
    given = "images" if graph == PREFIX_GRAPH else "hidden"
    return [{given: row[None], **neutral} for row in rows]


def _quantised(
    package: EncoderPackage,
    graph: str,
    adapter: Mapping[str, tuple[int | str, ...]],
    method: str,
    feeds: Sequence[Feeds],
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    weights = package.graph_weights(graph)
    model = opened(onnx.load_model_from_string(package.read(graph)), weights, adapter)
    proto, made = emptied(METHODS[method].apply(model, feeds), weights)
    if not made:
        hint = "" if METHODS[method].calibrated else "; convolutions need int8-static"
        raise EncoderError(
            f"{method} finds nothing to quantise in {graph} of {package.name!r}{hint}"
        )
    with_defaults(proto, adapter)
    return proto, made


def relative_difference(features: Floats, original: Floats) -> float:
    """The root mean square of the difference, relative to the original's; not finite if it is."""
    change = np.linalg.norm(features.astype(np.float64) - original)
    return float(change / (np.linalg.norm(original.astype(np.float64)) or 1.0))


def _stored(package: EncoderPackage, kept: set[str]) -> dict[str, Array]:
    """The original's weights as it stores them: those still used, and the suffix for training."""
    with safe_open(package.path / WEIGHTS, framework="numpy") as archive:
        names = [n for n in archive.keys() if n in kept or n.startswith(SUFFIX_KEY)]  # noqa: SIM118
        return {name: archive.get_tensor(name) for name in names}
