"""The bundle: an adapter, its class statistics, signature and manifest in one safetensors file.

A bundle is named by the SHA-256 of its bytes, and packing the same bundle twice gives the same
bytes. `unpack` trusts nothing: every size is checked from the header before anything is allocated,
and nothing is ever unpickled or evaluated.
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

from adapter_store import container
from adapter_store.container import DEFAULT_LIMITS, Limits
from adapter_store.errors import (
    BundleError,
    BundleTooLargeError,
    CorruptBundleError,
    ForeignBundleError,
    InvalidManifestError,
    LabelError,
    NonFiniteBundleError,
    WrongEncoderError,
)
from adapter_store.labels import check_label
from ood.errors import OodError
from ood.signature import Signature
from ood.statistics import ClassStatistics

FORMAT: Final = 1
FROZEN: Final = "frozen"
MAX_DIM: Final = 2048
_METADATA_KEY: Final = "driftkeel"
_INT16_MAX: Final = 32767
# More than any sum of squares of features needs, and its square is still finite.
_MAX_STEP: Final = 1e15

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


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
        own: Class statistics in the adapter's feature space; ``base`` itself for ``frozen``.
        signature: What the distribution it was trained on looks like.
    """

    manifest: Manifest
    tensors: Mapping[str, NDArray[np.float32]]
    base: ClassStatistics
    own: ClassStatistics
    signature: Signature


def pack(bundle: Bundle) -> bytes:
    """Write a bundle; the same bundle gives the same bytes.

    Raises:
        BundleError: The parts do not belong together, or are not finite; `unpack` would refuse it.
    """
    try:
        fields = msgspec.to_builtins(bundle.manifest, enc_hook=_plain)
        manifest = msgspec.convert(fields, Manifest)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidManifestError(f"bundle's manifest is not valid: {error}") from error
    # Before it is encoded: JSON has no word for NaN.
    _check_manifest(manifest)
    bundle = replace(bundle, manifest=manifest)
    _check_consistent(bundle)
    arrays: dict[str, NDArray[Any]] = {
        f"adapter/{name}": tensor for name, tensor in bundle.tensors.items()
    }
    for space in ("base",) if manifest.family == FROZEN else ("base", "own"):
        parts = _pack_statistics(getattr(bundle, space))
        arrays |= {f"{space}/{name}": array for name, array in parts.items()}
    arrays["signature"] = np.frombuffer(bundle.signature.to_bytes(), dtype=np.uint8)
    text = msgspec.json.encode(manifest, order="sorted").decode()
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
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NonFiniteBundleError(
                f"tensor {name[:80]!a} holds NaN or infinity; train it again"
            )
    packed_signature = arrays.pop("signature", np.empty(0))
    groups: dict[str, dict[str, NDArray[Any]]] = {"adapter": {}, "base": {}, "own": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        if group not in groups or not rest:
            raise CorruptBundleError(f"bundle has a tensor {name[:80]!a} that none should have")
        groups[group][rest] = array
    if packed_signature.dtype != np.uint8:
        raise CorruptBundleError("bundle has no signature")
    try:
        base = _unpack_statistics(manifest.labels, groups["base"], "base")
        own = (
            base
            if manifest.family == FROZEN and not groups["own"]
            else _unpack_statistics(manifest.labels, groups["own"], "own")
        )
        signature = Signature.from_bytes(packed_signature.tobytes())
    except OodError as error:
        raise CorruptBundleError(
            f"bundle's statistics or signature are unusable: {error}; make the bundle again"
        ) from error
    tensors = {name: array.copy() for name, array in groups["adapter"].items()}
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
        raise InvalidManifestError(
            f"bundle's manifest names the classes {list(manifest.labels)[:8]}, its statistics are "
            f"of {list(bundle.base.labels)[:8]}"
        )
    if not bundle.own.dim == bundle.base.dim == bundle.signature.dim:
        raise CorruptBundleError(
            f"bundle's base space, own space and signature have dimensions {bundle.base.dim}, "
            f"{bundle.own.dim} and {bundle.signature.dim}; expected one"
        )
    if manifest.family == FROZEN and (bundle.tensors or manifest.rank or manifest.sites):
        raise InvalidManifestError(
            f"bundle of family {FROZEN!r} has {len(bundle.tensors)} tensors, rank {manifest.rank} "
            f"and {len(manifest.sites)} sites; expected none"
        )
    if manifest.family != FROZEN and not (bundle.tensors and manifest.rank and manifest.sites):
        raise InvalidManifestError(
            f"bundle of family {manifest.family!r} has {len(bundle.tensors)} tensors, rank "
            f"{manifest.rank} and {len(manifest.sites)} sites; expected some of each"
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


def _pack_statistics(statistics: ClassStatistics) -> dict[str, NDArray[Any]]:
    """Arrays of statistics, half as large as their float32 would be.

    The scatter S travels as the upper triangular R with S = RᵀR, each row as int16 with one float32
    step: what is read back is positive semi-definite whatever rounding did, and within 1e-4 of S.
    """
    eigenvalues, vectors = np.linalg.eigh(statistics.scatter)
    root = np.sqrt(np.maximum(eigenvalues, 0.0))[:, None] * vectors.T
    factor = np.linalg.qr(root).R
    step = (np.abs(factor).max(axis=1) / _INT16_MAX).astype(np.float32)
    rounded = np.rint(factor / np.where(step > 0, step, 1)[:, None]).clip(-_INT16_MAX, _INT16_MAX)
    upper = np.triu_indices(statistics.dim)
    return {
        "counts": statistics.counts,
        "means": statistics.means.astype(np.float32),
        "factor": rounded[upper].astype(np.int16),
        "step": step,
    }


def _unpack_statistics(
    labels: tuple[str, ...], arrays: Mapping[str, NDArray[Any]], space: str
) -> ClassStatistics:
    if set(arrays) != {"counts", "means", "factor", "step"}:
        raise CorruptBundleError(
            f"bundle has {sorted(arrays)[:8]} of the statistics {space!r}; expected counts, "
            "factor, means, step"
        )
    means, factor, step = arrays["means"], arrays["factor"], arrays["step"]
    dim = step.shape[0] if step.ndim == 1 else 0
    if means.ndim != 2 or means.shape[1] != dim or factor.shape != (dim * (dim + 1) // 2,):
        raise CorruptBundleError(
            f"shapes of the statistics {space!r} contradict each other: means {means.shape}, "
            f"factor {factor.shape}, step {step.shape}"
        )
    if factor.dtype != np.int16 or step.dtype != np.float32 or means.dtype != np.float32:
        raise CorruptBundleError(f"the statistics {space!r} are of unexpected types")
    if (step < 0).any() or (step > _MAX_STEP).any():
        raise CorruptBundleError(f"the statistics {space!r} have steps outside 0..{_MAX_STEP:g}")
    if dim > MAX_DIM:
        raise BundleTooLargeError(f"bundle's features have dimension {dim}, at most {MAX_DIM}")
    root = np.zeros((dim, dim))
    root[np.triu_indices(dim)] = factor
    root *= step.astype(np.float64)[:, None]
    scatter = root.T @ root
    packed = {
        "counts": arrays["counts"],
        "means": means,
        "scatter": scatter[np.triu_indices(dim)],
    }
    return ClassStatistics.from_arrays(labels, packed)


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
