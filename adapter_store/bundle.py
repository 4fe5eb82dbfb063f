"""The bundle: an adapter, its class statistics, signature and manifest in one safetensors file.

A bundle is named by the SHA-256 of its bytes, and packing the same bundle twice gives the same
bytes. `unpack` trusts nothing: every size is checked from the header before anything is allocated,
and nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapter_store.errors import (
    BundleError,
    BundleTooLargeError,
    CorruptBundleError,
    ForeignBundleError,
    NonFiniteBundleError,
    TruncatedBundleError,
    WrongEncoderError,
)
from ood.errors import OodError
from ood.signature import Signature
from ood.statistics import ClassStatistics

FORMAT: Final = 1
FROZEN: Final = "frozen"
_METADATA_KEY: Final = "driftkeel"
_DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "I64": 8, "U8": 1}
_SPACES: Final = ("base", "own")

# A label or a name is shown to people and written to logs: no control characters, no novels.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class EncoderInterface(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle must know of an encoder to be checked against it.

    Attributes:
        digest: The encoder package's digest.
        feature_dim: Dimension of the features.
        sites: Where adapters attach.
        families: For each family the shape of every tensor ``<site>/<parameter>``; the string
            ``rank`` in a shape stands for the adapter's rank.
    """

    digest: str
    feature_dim: int
    sites: tuple[str, ...]
    families: dict[str, dict[str, tuple[int | str, ...]]]


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
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory.

    Attributes:
        manifest: What it says of itself.
        tensors: The adapter, ``<site>/<parameter>`` to float32; empty for ``frozen``.
        base: Class statistics in the base feature space.
        own: Class statistics in the adapter's feature space; ``base`` itself for ``frozen``.
        signature: What the distribution it was trained on looks like.
    """

    manifest: Manifest
    tensors: Mapping[str, NDArray[np.float32]]
    base: ClassStatistics
    own: ClassStatistics
    signature: Signature


@dataclass(frozen=True)
class Limits:
    """How large a bundle may be before it is refused unread."""

    bundle_bytes: int = 64 * 1024 * 1024
    header_bytes: int = 1024 * 1024
    tensors: int = 4096


def pack(bundle: Bundle) -> bytes:
    """Write a bundle; the same bundle gives the same bytes.

    Raises:
        BundleError: The parts do not belong together.
    """
    _check_consistent(bundle)
    arrays: dict[str, NDArray[Any]] = {
        f"adapter/{name}": np.ascontiguousarray(tensor, dtype=np.float32)
        for name, tensor in bundle.tensors.items()
    }
    for space in _SPACES if bundle.manifest.family != FROZEN else _SPACES[:1]:
        statistics: ClassStatistics = getattr(bundle, space)
        arrays |= {f"{space}/{name}": array for name, array in statistics.to_arrays().items()}
    arrays["signature"] = np.frombuffer(bundle.signature.to_bytes(), dtype=np.uint8)
    manifest = msgspec.json.encode(bundle.manifest, order="sorted").decode()
    data: bytes = save(dict(sorted(arrays.items())), metadata={_METADATA_KEY: manifest})
    return data


def bundle_digest(data: bytes) -> str:
    """The name of a bundle: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def unpack(data: bytes, *, limits: Limits = Limits()) -> Bundle:
    """Read a bundle from anywhere.

    Args:
        data: The whole file.
        limits: What is refused as too large.

    Raises:
        TruncatedBundleError: The file ends early.
        BundleTooLargeError: A declared size is over the limit; nothing was allocated.
        ForeignBundleError: Not a bundle, or a format version this side does not know.
        CorruptBundleError: The parts contradict each other or the format.
        NonFiniteBundleError: A number is NaN or infinite.
    """
    manifest = _manifest(_checked_header(data, limits))
    try:
        arrays: dict[str, NDArray[Any]] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptBundleError(f"bundle cannot be read: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NonFiniteBundleError(f"tensor {name!r} holds NaN or infinity; train it again")
    groups: dict[str, dict[str, NDArray[Any]]] = {"adapter": {}, "base": {}, "own": {}}
    packed_signature = arrays.pop("signature", None)
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        if group not in groups or not rest:
            raise ForeignBundleError(f"bundle has a tensor {name[:80]!r} that none should have")
        groups[group][rest] = array
    if packed_signature is None or packed_signature.dtype != np.uint8:
        raise CorruptBundleError("bundle has no signature")
    try:
        base = ClassStatistics.from_arrays(manifest.labels, groups["base"])
        own = (
            base
            if manifest.family == FROZEN and not groups["own"]
            else ClassStatistics.from_arrays(manifest.labels, groups["own"])
        )
        bundle = Bundle(
            manifest=manifest,
            tensors=groups["adapter"],
            base=base,
            own=own,
            signature=Signature.from_bytes(packed_signature.tobytes()),
        )
    except OodError as error:
        raise CorruptBundleError(
            f"bundle's statistics or signature are unusable: {error}"
        ) from error
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
    if bundle.base.dim != interface.feature_dim or bundle.own.dim != interface.feature_dim:
        raise WrongEncoderError(
            f"bundle's statistics have dimension {bundle.base.dim}/{bundle.own.dim}, "
            f"the encoder's features {interface.feature_dim}"
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
        raise CorruptBundleError("bundle's statistics are of other classes than its manifest says")
    if bundle.own.dim != bundle.base.dim:
        raise CorruptBundleError("bundle's two feature spaces have different dimensions")
    if (manifest.family == FROZEN) != (not bundle.tensors):
        raise CorruptBundleError(
            f"bundle of family {manifest.family!r} has {len(bundle.tensors)} adapter tensors"
        )
    for name, tensor in bundle.tensors.items():
        if tensor.dtype != np.float32:
            raise CorruptBundleError(f"tensor {name!r} is {tensor.dtype}, expected float32")
        if not np.isfinite(tensor).all():
            raise NonFiniteBundleError(f"tensor {name!r} holds NaN or infinity; train it again")
    numbers = (*manifest.score_quantiles, *manifest.metrics.values(), manifest.created_at)
    if not all(math.isfinite(number) for number in numbers):
        raise NonFiniteBundleError("the manifest holds a number that is NaN or infinite")


def _checked_header(data: bytes, limits: Limits) -> dict[str, Any]:
    """Parse the safetensors header and hold every declared size against the file and the limits."""
    if len(data) > limits.bundle_bytes:
        raise BundleTooLargeError(
            f"bundle of {len(data)} bytes is over the limit of {limits.bundle_bytes}"
        )
    if len(data) < 8:
        raise TruncatedBundleError(f"bundle has {len(data)} bytes, too few for any header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > limits.header_bytes:
        raise BundleTooLargeError(
            f"header declares {length} bytes, the limit is {limits.header_bytes}; "
            "this is no bundle, or a hostile one"
        )
    if 8 + length > len(data):
        raise TruncatedBundleError(
            f"bundle ends inside its header: {len(data)} of {8 + length} bytes are there"
        )
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ForeignBundleError(f"file is no safetensors file: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ForeignBundleError("file is no bundle: its header has no metadata")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) > limits.tensors:
        raise BundleTooLargeError(f"bundle has {len(tensors)} tensors, over {limits.tensors}")
    expected_end = _declared_end(tensors)
    available = len(data) - 8 - length
    if expected_end > available:
        raise TruncatedBundleError(
            f"bundle declares {expected_end} bytes of tensors, {available} are there"
        )
    if expected_end < available:
        raise CorruptBundleError(f"bundle has {available - expected_end} bytes that belong to none")
    return header


def _declared_end(tensors: Mapping[str, Any]) -> int:
    """The end of the last tensor, every tensor's size being what its shape and type give."""
    ends: list[tuple[int, int]] = []
    for name, entry in tensors.items():
        try:
            item = _DTYPE_BYTES[entry["dtype"]]
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptBundleError(f"tensor {name[:80]!r} is declared wrongly") from error
        if not whole or end - begin != item * math.prod(shape):
            raise CorruptBundleError(
                f"tensor {name[:80]!r} declares sizes that contradict its shape"
            )
        ends.append((begin, end))
    position = 0
    for begin, end in sorted(ends):
        if begin != position:
            raise CorruptBundleError("tensors overlap or leave a gap")
        position = end
    return position


def _manifest(header: Mapping[str, Any]) -> Manifest:
    text = header["__metadata__"].get(_METADATA_KEY)
    if not isinstance(text, str):
        raise ForeignBundleError("file is a safetensors file but no Driftkeel bundle")
    try:
        version = msgspec.json.decode(text, type=dict).get("format")
        if version != FORMAT:
            raise ForeignBundleError(
                f"bundle has format version {version!r}, this side reads {FORMAT}; update it"
            )
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptBundleError(f"bundle's manifest is not valid: {error}") from error


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
