"""Encoder packages: what one holds on disk, reading it, and proving that it is whole.

A package is a directory: `manifest.json`, the weights once, the prefix graph, and for each adapter
family a suffix graph and a suffix program, both without weights. The daemon, the trainer and the
exporter read packages through here; nothing here imports torch or ONNX, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from adapter_store.bundle import EncoderInterface
from exporter.errors import EncoderError

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PREFIX_GRAPH = "prefix.onnx"
PREFIX_KEY = "prefix."
SUFFIX_KEY = "suffix."
# Tensors that only quantised graphs take; they are handed over as they are stored.
QUANTISED_KEY = "quantised."
_MANIFEST_LIMIT_BYTES = 1 << 20

Array = npt.NDArray[np.generic]

BaseFeatures = Literal["prefix", "whole"]
Kind = Literal["activation", "attention", "block", "key", "linear", "norm", "query", "value"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the package: its digest and size."""

    sha256: str
    size: int


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module of the suffix that adapters attach to.

    Attributes:
        dim: Channels of the module's input, and of its output unless `out_dim` says otherwise.
        channel_axis: The axis the channels are on: -1 for tokens [n, t, dim], 1 for the
            feature maps of a convolution [n, dim, h, w].
        kind: What the module is, by which adapter families choose their sites: a `block`
            (perceptron or convolutions, as wide behind as before), a `query`, `key` or `value`
            projection, another `linear` map, a `norm`, an `activation`, or the `attention`
            itself, a module of query, key and value that returns the mixed values.
        out_dim: Channels of the output, where they are not `dim`.
        heads: Heads of an `attention`.
    """

    dim: int
    channel_axis: int = -1
    kind: Kind = "block"
    out_dim: int | None = None
    heads: int = 1

    @property
    def outputs(self) -> int:
        """Channels of the module's output."""
        return self.dim if self.out_dim is None else self.out_dim


class FamilyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the package holds for one adapter family.

    Attributes:
        graph: File of the suffix's ONNX graph.
        program: File of the suffix's `torch.export` program, gzip-compressed.
        tensors: Shape of every adapter tensor by name; `"rank"` stands for the adapter's rank.
            A name is also the graph's input of that tensor.
        settings: The family's fixed numbers.
    """

    graph: str
    program: str
    tensors: dict[str, tuple[int | str, ...]]
    settings: dict[str, float]


class Quantisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a quantised package was made from.

    Attributes:
        original: Digest of the package it was made from.
        method: How, one of `exporter.quantise_methods.METHODS`.
        difference: The root mean square of the features' difference from the original's, relative
            to theirs, on the samples it was made with.
    """

    original: str
    method: str
    difference: float


class PackageManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`manifest.json`: everything about an encoder but its numbers.

    A field with a default is left out where it has it, so that packages made before the field
    was there keep their digest.

    Attributes:
        format: The version of this layout.
        name: The name people know the encoder by.
        image_size: Side of the square input, in pixels.
        mean: Mean of each colour channel, of values in 0 to 1.
        std: Standard deviation of each colour channel.
        dtype: How the weights are stored; they are computed with in float32.
        hidden_shape: Shape of the prefix's output for one sample.
        feature_dim: Width of a vector of base features.
        feature_parts: Widths of what base features are put together from, at unit length each:
            the network's own output unless `network_dim` says otherwise, then what was pooled at
            shallower depths. One part alone is as the network gives it.
        sites: Where adapters attach, by module name.
        families: What the package holds for each adapter family.
        graphs: The stored weights each ONNX graph has to be given, by the graph's file.
        files: Every other file of the package.
        built_with: Versions of the libraries that built it.
        quantised: What it was made from, where it is a quantised encoder.
        rows_per_run: The most rows that a graph may be run on at once, where more would make a
            row's result depend on the others; None where they do not.
        network_dim: Width of the network's own output where base features are the prefix's alone:
            the prefix's output ends with them, and the suffix gives the network's output and
            nothing else. None where base features are the suffix's output.
    """

    format: int
    name: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Literal["float16", "float32"]
    hidden_shape: tuple[int, ...]
    feature_dim: int
    feature_parts: tuple[int, ...]
    sites: dict[str, Site]
    families: dict[str, FamilyEntry]
    graphs: dict[str, tuple[str, ...]]
    files: dict[str, FileEntry]
    built_with: dict[str, str]
    quantised: Quantisation | None = None
    rows_per_run: int | None = None
    network_dim: int | None = None


class _Format(msgspec.Struct):
    format: int


@dataclass(frozen=True)
class EncoderPackage:
    """A verified encoder package.

    Attributes:
        path: The package's directory.
        manifest: What it says about itself.
        digest: SHA-256 of the canonical manifest, which names every other file's digest: the
            encoder's identity.
    """

    path: Path
    manifest: PackageManifest
    digest: str

    @classmethod
    def load(cls, path: Path) -> EncoderPackage:
        """Reads a package and checks every file of it against the manifest.

        Raises:
            EncoderError: The directory is no package, is of an unknown format, or a file is
                missing, damaged or inconsistent; the message names the file.
        """
        manifest = _read_manifest(path / MANIFEST)
        _check_manifest(manifest, path / MANIFEST)
        package = cls(path, manifest, hashlib.sha256(canonical(manifest)).hexdigest())
        for name in manifest.files:
            package.read(name)
        return package

    @property
    def name(self) -> str:
        """The name people know the encoder by."""
        return self.manifest.name

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.manifest.image_size

    @property
    def feature_dim(self) -> int:
        """Width of a vector of base features."""
        return self.manifest.feature_dim

    @property
    def base_from_prefix(self) -> bool:
        """Whether base features are the prefix's, so that no suffix has to run for them."""
        return self.manifest.network_dim is not None

    @property
    def network_dim(self) -> int:
        """Width of the network's own output, which what a suffix gives begins with."""
        if self.manifest.network_dim is None:
            return self.manifest.feature_parts[0]
        return self.manifest.network_dim

    @property
    def suffix_dim(self) -> int:
        """Width of what a suffix gives."""
        return self.network_dim if self.base_from_prefix else self.feature_dim

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Shape of the prefix's output for one sample, without the batch axis."""
        return self.manifest.hidden_shape

    @property
    def sites(self) -> tuple[str, ...]:
        """Where adapters attach, by module name."""
        return tuple(sorted(self.manifest.sites))

    @property
    def families(self) -> tuple[str, ...]:
        """The adapter families this encoder was built for."""
        return tuple(sorted(self.manifest.families))

    def family(self, name: str) -> FamilyEntry:
        """What the package holds for a family.

        Raises:
            EncoderError: The encoder was not built for this family.
        """
        entry = self.manifest.families.get(name)
        if entry is None:
            raise EncoderError(
                f"encoder {self.name!r} has no adapter family {name!r}; "
                f"it has {', '.join(self.families)}"
            )
        return entry

    def interface(self) -> EncoderInterface:
        """What a bundle must fit to be used with this encoder."""
        return EncoderInterface(
            digest=self.digest,
            feature_dim=self.feature_dim,
            sites=self.sites,
            families={name: dict(self.manifest.families[name].tensors) for name in self.families},
            network_dim=self.network_dim,
        )

    def read(self, name: str) -> bytes:
        """Reads one of the package's files and checks it.

        Raises:
            EncoderError: The file is missing, unreadable or not what the manifest says.
        """
        entry, path = self.manifest.files[name], self.path / name
        try:
            if path.stat().st_size != entry.size:
                found = path.stat().st_size
                raise EncoderError(
                    f"{path} has {found} bytes, its manifest says {entry.size}; "
                    "copy or build the encoder package again"
                )
            data = path.read_bytes()
        except OSError as error:
            raise EncoderError(f"cannot read {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise EncoderError(
                f"{path} is damaged: its SHA-256 is not the manifest's; "
                "copy or build the encoder package again"
            )
        return data

    def weights(self, part: str) -> dict[str, Array]:
        """Reads the weights of one part, floating-point ones widened to float32.

        Args:
            part: `PREFIX_KEY` or `SUFFIX_KEY`, which the returned names keep.
        """
        return self._weights(lambda name: name.startswith(part))

    def graph_weights(self, graph: str) -> dict[str, Array]:
        """Reads the weights that one of the package's graphs has to be given.

        Floating-point ones are widened to float32, but for those under `QUANTISED_KEY`.

        Args:
            graph: The graph's file.
        """
        return self.named_weights(self.manifest.graphs[graph])

    def named_weights(self, names: Collection[str]) -> dict[str, Array]:
        """Reads some weights, floating-point ones widened to float32.

        Args:
            names: Their names as the package stores them.
        """
        return self._weights(frozenset(names).__contains__)

    def _weights(self, wanted: Callable[[str], bool]) -> dict[str, Array]:
        self.read(WEIGHTS)
        path = self.path / WEIGHTS
        try:
            with safe_open(path, framework="numpy") as archive:
                names = [name for name in archive.keys() if wanted(name)]  # noqa: SIM118
                return {name: _widened(name, archive.get_tensor(name)) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise EncoderError(f"cannot read the weights in {path}: {error}") from error


def _widened(name: str, value: Array) -> Array:
    if np.issubdtype(value.dtype, np.floating) and not name.startswith(QUANTISED_KEY):
        return np.ascontiguousarray(value, dtype=np.float32)
    return np.ascontiguousarray(value)


def canonical(manifest: PackageManifest) -> bytes:
    """The manifest as bytes that depend on its content alone: compact JSON, keys sorted."""
    return msgspec.json.encode(manifest, order="sorted")


def file_entries(contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Describes files by digest and size, for a new manifest."""
    return {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in sorted(contents.items())
    }


def default_encoder_package(cache: Path | None = None) -> EncoderPackage:
    """Loads the encoder that ships with Driftkeel; it needs neither torch nor ONNX.

    Args:
        cache: Where to unpack it when Driftkeel is installed in a way that keeps no plain files
            (a zip archive); not touched otherwise.

    Raises:
        EncoderError: The installation lacks the package, or it is damaged.
    """
    resource = files("exporter").joinpath("data", "default_encoder")
    if isinstance(resource, Path):
        return EncoderPackage.load(resource)
    if cache is None:
        raise EncoderError("Driftkeel is installed without plain files; give a cache directory")
    cache.mkdir(parents=True, exist_ok=True)
    for source in resource.iterdir():
        (cache / source.name).write_bytes(source.read_bytes())
    return EncoderPackage.load(cache)


def _read_manifest(path: Path) -> PackageManifest:
    try:
        if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise EncoderError(f"{path} is larger than {_MANIFEST_LIMIT_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise EncoderError(
            f"{path.parent} is not an encoder package: cannot read {path.name}: {error.strerror}"
        ) from error
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise EncoderError(
                f"{path} is of format {found}, this version reads {FORMAT}; "
                "build the package again or upgrade driftkeel"
            )
        return msgspec.json.decode(data, type=PackageManifest)
    except msgspec.DecodeError as error:
        raise EncoderError(f"{path} is not an encoder manifest: {error}") from error


def _check_manifest(manifest: PackageManifest, path: Path) -> None:
    for name in manifest.files:
        if name != Path(name).name or name in {MANIFEST, ".", ".."}:
            raise EncoderError(f"{path} names the file {name!r}, which is not a plain file name")
    needed = {WEIGHTS, PREFIX_GRAPH, *manifest.graphs}
    if PREFIX_GRAPH not in manifest.graphs:
        raise EncoderError(f"{path} does not list the weights of {PREFIX_GRAPH!r}")
    for entry in manifest.families.values():
        needed |= {entry.graph, entry.program}
        if entry.graph not in manifest.graphs:
            raise EncoderError(f"{path} does not list the weights of {entry.graph!r}")
    if missing := sorted(needed - set(manifest.files)):
        raise EncoderError(f"{path} does not list the file {missing[0]!r}")
    rows = 1 if manifest.rows_per_run is None else manifest.rows_per_run
    sizes = (manifest.image_size, manifest.feature_dim, *manifest.hidden_shape, rows)
    if min(sizes) < 1 or not manifest.families:
        raise EncoderError(f"{path} describes an encoder without a size or an adapter family")
    parts = manifest.feature_parts
    if not parts or min(parts) < 1 or sum(parts) != manifest.feature_dim:
        raise EncoderError(f"{path}: feature_parts {list(parts)} are not {manifest.feature_dim}")
    if manifest.network_dim is not None and (
        manifest.network_dim < 1 or sum(parts) > math.prod(manifest.hidden_shape)
    ):
        raise EncoderError(
            f"{path}: a prefix that gives {list(manifest.hidden_shape)} cannot end with "
            f"{sum(parts)} base features"
        )
    if not np.all(np.isfinite([*manifest.mean, *manifest.std])) or min(manifest.std) <= 0:
        raise EncoderError(f"{path} has a mean or a standard deviation that is not usable")
