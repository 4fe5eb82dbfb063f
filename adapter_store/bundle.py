"""The bundle: an adapter, its class statistics, signature and manifest in one safetensors file.

The adapter is stored by a codec of `adapter_store.codecs`, statistics by `ood.compact`. A bundle
is named by the SHA-256 of its bytes, and packing the same bundle twice gives the same bytes.
`unpack` trusts nothing: every size is checked before anything is allocated, and nothing is ever
unpickled or evaluated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store import codecs, container
from adapter_store.codecs import Codec
from adapter_store.container import DEFAULT_LIMITS, Limits
from adapter_store.errors import (
    BundleError,
    CorruptBundleError,
    ForeignBundleError,
    InvalidManifestError,
    LabelError,
    NonFiniteBundleError,
    WrongEncoderError,
)
from adapter_store.labels import check_label
from ood import compact
from ood.errors import OodError
from ood.signature import Signature
from ood.statistics import ClassStatistics

FORMAT: Final = 2
FROZEN: Final = "frozen"
_METADATA_KEY: Final = "driftkeel"
# Bytes a dimension for up to ten classes. With these a bundle of ten classes and an adapter of
# 25,000 numbers has less than 60 KB at int8 and at int4: base statistics gain more by the bytes
# that int4 saves than an adapter loses by them. One without an adapter has room for more.
_FACTORS: Final = {"base": 22, "own": 12}
_FACTORS_INT4: Final = {"base": 43, "own": 12}
_FACTORS_ALONE: Final = {"base": 48}

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Axis = Annotated[int, msgspec.Meta(ge=1, le=codecs.MAX_NUMBERS)]
Shape = Annotated[tuple[Axis, ...], msgspec.Meta(max_length=8)]


class EncoderInterface(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle must know of an encoder to be checked against it.

    Attributes:
        digest: The encoder package's digest.
        feature_dim: Dimension of the features.
        sites: Where adapters attach.
        families: For each family the shape of every tensor ``<site>/<parameter>``; the string
            ``rank`` in a shape stands for the adapter's rank.
        network_dim: Dimension of the network's own output, the first part of the features; 0
            where it is all of them.
    """

    digest: str
    feature_dim: int
    sites: tuple[str, ...]
    families: dict[str, dict[str, tuple[int | str, ...]]]
    network_dim: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle says of itself.

    Attributes:
        encoder: Digest of the encoder it is bound to.
        family: The adapter's mathematics; ``frozen`` means statistics only, no tensors.
        rank: The adapter's rank; 0 for ``frozen``.
        sites: Where the adapter attaches.
        labels: The classes it knows, sorted.
        task: What it was made for, in words.
        created_at: Seconds since the epoch.
        created_by: The device that made it.
        parents: Digests of the bundles that were installed when it was trained.
        samples: How many samples its statistics were computed from.
        metrics: What was measured of it.
        score_quantiles: 101 quantiles of the OOD score of held-out samples under its own base
            statistics; a device that pulls it compares its own samples with them.
        codec: How the adapter's numbers are stored.
        shapes: The shape of each of the adapter's tensors; `pack` writes them.
        format: The version of this format.
    """

    encoder: Digest
    family: Name
    rank: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    sites: Annotated[tuple[Name, ...], msgspec.Meta(max_length=512)]
    labels: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=10_000)]
    task: Name
    created_at: float
    created_by: Name
    parents: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=1000)] = ()
    samples: Annotated[int, msgspec.Meta(ge=1)]
    metrics: dict[Name, float] = {}
    score_quantiles: Annotated[tuple[float, ...], msgspec.Meta(min_length=101, max_length=101)]
    codec: Codec = "fp32"
    shapes: dict[Name, Shape] = {}
    format: int = FORMAT


class _Versioned(msgspec.Struct, frozen=True):
    """The one field every version of the manifest has."""

    format: int


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory.

    Attributes:
        manifest: What it says of itself.
        tensors: The adapter, ``<site>/<parameter>`` to float32; empty for ``frozen``.
        base: Class statistics in the base feature space.
        own: Class statistics in the adapter's feature space, which may have fewer dimensions;
            ``base`` itself for ``frozen``.
        signature: What the distribution it was trained on looks like.
    """

    manifest: Manifest
    tensors: Mapping[str, NDArray[np.float32]]
    base: ClassStatistics
    own: ClassStatistics
    signature: Signature


def pack(bundle: Bundle, *, codec: Codec | None = None) -> bytes:
    """Write a bundle; the same bundle gives the same bytes.

    What is read back is what ships: its tensors and statistics are rounded as the codec and the
    compact form demand, so measure the `unpack`ed bundle, not the one that went in.

    Args:
        bundle: What to write.
        codec: How to store the adapter; what its manifest says by default.

    Raises:
        BundleError: The parts do not belong together, or are not finite; `unpack` would refuse it.
    """
    try:
        fields = msgspec.to_builtins(bundle.manifest, enc_hook=_plain)
        fields["shapes"] = {name: list(tensor.shape) for name, tensor in bundle.tensors.items()}
        fields["codec"] = codec or bundle.manifest.codec
        manifest = msgspec.convert(fields, Manifest)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidManifestError(f"bundle's manifest is not valid: {error}") from error
    # Before it is encoded: JSON has no word for NaN.
    _check_manifest(manifest)
    bundle = replace(bundle, manifest=manifest)
    _check_consistent(bundle)
    frozen = manifest.family == FROZEN
    parts = {"signature": bundle.signature.to_bytes()}
    factors = _FACTORS_INT4 if manifest.codec == "int4" else _FACTORS
    try:
        for space, ten_classes in (_FACTORS_ALONE if frozen else factors).items():
            budget = compact.factor_bytes(len(manifest.labels), ten_classes=ten_classes)
            parts[space] = compact.to_bytes(getattr(bundle, space), budget=budget)
    except OodError as error:
        raise BundleError(f"bundle's statistics cannot be written: {error}") from error
    if not frozen:
        parts["adapter"] = codecs.encode(bundle.tensors, manifest.codec)
    text = msgspec.json.encode(manifest, order="sorted").decode()
    arrays = {name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()}
    data = container.write(arrays, {_METADATA_KEY: text})
    # The writer holds itself to the reader's rules: a bundle nobody can read never leaves here.
    unpack(data)
    return data


def bundle_digest(data: bytes) -> str:
    """The name of a bundle: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def unpack(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Bundle:
    """Read a bundle from anywhere.

    Args:
        data: The whole file.
        limits: What is refused as too large.

    Raises:
        TruncatedBundleError: The file ends early.
        BundleTooLargeError: A declared size is over the limit; nothing was allocated.
        ForeignBundleError: Not a bundle, or a format version this side does not know.
        CorruptBundleError: Damaged, or the parts contradict each other or the format.
        InvalidManifestError: The manifest is missing something or says what cannot be.
        NonFiniteBundleError: A number is NaN or infinite.
    """
    metadata, arrays = container.read(data, limits)
    manifest = _decode_manifest(metadata)
    frozen = manifest.family == FROZEN
    expected = {"signature", "base"} | (set() if frozen else {"adapter", "own"})
    if arrays.keys() != expected:
        raise CorruptBundleError(
            f"bundle has the parts {[name[:80] for name in sorted(arrays)[:8]]}, "
            f"expected {sorted(expected)}"
        )
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.ndim != 1:
            raise CorruptBundleError(f"part {name!r} of the bundle is no row of bytes")
    parts = {name: array.tobytes() for name, array in arrays.items()}
    tensors = {} if frozen else codecs.decode(parts["adapter"], manifest.shapes, manifest.codec)
    try:
        base = compact.from_bytes(manifest.labels, parts["base"])
        own = base if frozen else compact.from_bytes(manifest.labels, parts["own"])
        signature = Signature.from_bytes(parts["signature"])
    except OodError as error:
        raise CorruptBundleError(
            f"bundle's statistics or signature are unusable: {error}; make the bundle again"
        ) from error
    bundle = Bundle(manifest=manifest, tensors=tensors, base=base, own=own, signature=signature)
    _check_consistent(bundle)
    return bundle


def check_compatible(bundle: Bundle, interface: EncoderInterface) -> None:
    """Refuse a bundle that does not fit an encoder.

    Raises:
        WrongEncoderError: Another encoder, an unknown family or site, or wrong shapes.
    """
    manifest = bundle.manifest
    if manifest.encoder != interface.digest:
        raise WrongEncoderError(
            f"bundle is for encoder {manifest.encoder[:12]}, this one is {interface.digest[:12]}; "
            "use a bundle trained on this encoder"
        )
    network_dim = interface.network_dim or interface.feature_dim
    if bundle.base.dim != interface.feature_dim or bundle.own.dim not in {
        interface.feature_dim,
        network_dim,
    }:
        raise WrongEncoderError(
            f"bundle's statistics have dimension {bundle.base.dim}/{bundle.own.dim}, "
            f"the encoder's features {interface.feature_dim}/{network_dim}"
        )
    if manifest.family == FROZEN:
        return
    shapes = interface.families.get(manifest.family)
    if shapes is None:
        raise WrongEncoderError(
            f"adapter family {manifest.family!r} is not in this encoder's package; "
            f"it has {sorted(interface.families)}"
        )
    unknown = set(manifest.sites) - set(interface.sites)
    if unknown:
        raise WrongEncoderError(f"encoder has no site {min(unknown)!r}")
    expected = {
        name: tuple(manifest.rank if d == "rank" else d for d in shape)
        for name, shape in shapes.items()
        if name.rsplit("/", 1)[0] in manifest.sites
    }
    found = {name: tensor.shape for name, tensor in bundle.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise WrongEncoderError(
                f"tensor {name!r} has shape {found.get(name)}, "
                f"the encoder's site expects {expected.get(name)}"
            )


def _check_consistent(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if bundle.base.labels != manifest.labels or bundle.own.labels != manifest.labels:
        raise InvalidManifestError(
            f"bundle's manifest names the classes {list(manifest.labels)[:8]}, its statistics are "
            f"of {list(bundle.base.labels)[:8]}"
        )
    if bundle.signature.dim != bundle.base.dim or bundle.own.dim > bundle.base.dim:
        raise CorruptBundleError(
            f"bundle's base space, own space and signature have dimensions {bundle.base.dim}, "
            f"{bundle.own.dim} and {bundle.signature.dim}; expected the signature's to be the "
            "base's, and its own no larger"
        )
    for name, tensor in bundle.tensors.items():
        if tensor.dtype != np.float32:
            raise CorruptBundleError(f"tensor {name[:80]!a} is {tensor.dtype}, expected float32")


def _check_manifest(manifest: Manifest) -> None:
    """What the types of its fields do not say already."""
    try:
        for label in manifest.labels:
            check_label(label)
        named = {"task": manifest.task, "device": manifest.created_by, "family": manifest.family}
        for what, name in named.items():
            check_label(name, what=what)
        for names, what in ((manifest.sites, "site"), (tuple(manifest.metrics), "metric")):
            for name in names:
                check_label(name, what=what)
    except LabelError as error:
        raise InvalidManifestError(f"bundle's manifest is not valid: {error}") from error
    numbers = (*manifest.score_quantiles, *manifest.metrics.values(), manifest.created_at)
    if not all(math.isfinite(number) for number in numbers):
        raise NonFiniteBundleError(
            "bundle's manifest holds a number that is NaN or infinite; make the bundle again"
        )
    if manifest.family == FROZEN and (manifest.shapes or manifest.rank or manifest.sites):
        raise InvalidManifestError(
            f"bundle of family {FROZEN!r} has {len(manifest.shapes)} tensors, rank {manifest.rank} "
            f"and {len(manifest.sites)} sites; expected none"
        )
    if manifest.family != FROZEN and not (manifest.shapes and manifest.rank and manifest.sites):
        raise InvalidManifestError(
            f"bundle of family {manifest.family!r} has {len(manifest.shapes)} tensors, rank "
            f"{manifest.rank} and {len(manifest.sites)} sites; expected some of each"
        )
    quantiles = manifest.score_quantiles
    if any(low > high for low, high in pairwise(quantiles)):
        raise InvalidManifestError("bundle's score quantiles decrease; make the bundle again")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a manifest cannot hold a {type(value).__name__}")


def _decode_manifest(metadata: Mapping[str, str]) -> Manifest:
    text = metadata.get(_METADATA_KEY)
    if text is None:
        raise ForeignBundleError("file is a safetensors file but no Driftkeel bundle")
    try:
        version = msgspec.json.decode(text, type=_Versioned).format
        if version != FORMAT:
            raise ForeignBundleError(
                f"bundle has format version {version}, this version reads {FORMAT}; "
                "update the older side"
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidManifestError(f"bundle's manifest is not valid: {error}") from error
    _check_manifest(manifest)
    return manifest


__all__ = [
    "FROZEN",
    "Bundle",
    "BundleError",
    "EncoderInterface",
    "Limits",
    "Manifest",
    "bundle_digest",
    "check_compatible",
    "pack",
    "unpack",
]
