"""The safetensors container: named arrays and a few texts in one file, read without trust.

Only `adapter_store.bundle` uses it. Every size is checked from the header against the file and the
limits before an array is made; nothing is unpickled or evaluated. What `write` gives, any
safetensors reader opens: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.errors import (
    BundleTooLargeError,
    CorruptBundleError,
    ForeignBundleError,
    TruncatedBundleError,
)

Array = NDArray[Any]

_METADATA: Final = "__metadata__"
_CHECKSUM: Final = "sha256"
_Dtype = Literal["F32", "I64", "I16", "U8"]
_DTYPES: Final[dict[_Dtype, str]] = {"F32": "<f4", "I64": "<i8", "I16": "<i2", "U8": "|u1"}
_NAMES: Final[dict[Any, _Dtype]] = {np.dtype(code): name for name, code in _DTYPES.items()}
_PREFIX: Final = struct.Struct("<Q")

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


@dataclass(frozen=True)
class Limits:
    """How large a bundle may be before it is refused unread.

    Attributes:
        bundle_bytes: The whole file.
        header_bytes: Its header, which holds the manifest.
        tensors: How many arrays.
    """

    bundle_bytes: int = 16 * 1024 * 1024
    header_bytes: int = 1024 * 1024
    tensors: int = 2048


DEFAULT_LIMITS: Final = Limits()


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array, as the header declares it."""

    dtype: _Dtype
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=4)]
    data_offsets: tuple[_Size, _Size]


def write(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """Write arrays and texts; the same content gives the same bytes.

    Args:
        arrays: float32, int64, int16 or uint8 arrays.
        metadata: Texts; a checksum over everything is added.
    """
    # The widest first, so that every array begins at a multiple of its item size.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    entries, buffers, position = {}, [], 0
    for name in names:
        dtype = _NAMES[arrays[name].dtype.newbyteorder("<")]
        data = np.ascontiguousarray(arrays[name], dtype=_DTYPES[dtype]).tobytes()
        end = position + len(data)
        entries[name] = _Entry(dtype, arrays[name].shape, (position, end))
        buffers.append(data)
        position = end
    body = b"".join(buffers)
    texts = {**metadata, _CHECKSUM: _checksum(metadata, entries, body)}
    header = msgspec.json.encode({_METADATA: dict(sorted(texts.items())), **entries})
    header += b" " * (-len(header) % 8)
    return _PREFIX.pack(len(header)) + header + body


def read(data: bytes, limits: Limits) -> tuple[dict[str, str], dict[str, Array]]:
    """Read what `write` wrote, from anywhere.

    Returns:
        The texts and the arrays; the arrays are views of ``data`` and cannot be written to.

    Raises:
        TruncatedBundleError: The file ends early.
        BundleTooLargeError: A declared size is over the limit; nothing was allocated.
        ForeignBundleError: Not a safetensors file, or not one of ours.
        CorruptBundleError: The header contradicts itself or the file, or the checksum is wrong.
    """
    metadata, entries, body = _split(data, limits)
    _check_layout(entries, len(body))
    expected = metadata.pop(_CHECKSUM, "")
    if _checksum(metadata, entries, body) != expected:
        raise CorruptBundleError(
            "bundle is damaged: its content does not have the checksum it declares; fetch it again"
        )
    arrays = {}
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        flat = np.frombuffer(body[begin:end], dtype=_DTYPES[entry.dtype])
        arrays[name] = flat.reshape(entry.shape)
    return metadata, arrays


def _split(data: bytes, limits: Limits) -> tuple[dict[str, str], dict[str, _Entry], memoryview]:
    if len(data) > limits.bundle_bytes:
        raise BundleTooLargeError(
            f"bundle has {len(data)} bytes, at most {limits.bundle_bytes} are taken"
        )
    if len(data) < _PREFIX.size:
        raise TruncatedBundleError(
            f"bundle has {len(data)} bytes, too few for any header; fetch it again"
        )
    (length,) = _PREFIX.unpack_from(data)
    if data[_PREFIX.size : _PREFIX.size + 1] not in (b"{", b""):
        raise ForeignBundleError("file is no safetensors file; give a Driftkeel bundle")
    if length > limits.header_bytes:
        raise BundleTooLargeError(
            f"bundle declares a header of {length} bytes, at most {limits.header_bytes} are taken"
        )
    start = _PREFIX.size + length
    if start > len(data):
        raise TruncatedBundleError(
            f"bundle ends inside its header: found {len(data)} bytes, expected {start} or more; "
            "fetch it again"
        )
    try:
        header = msgspec.json.decode(data[_PREFIX.size : start], type=dict[str, msgspec.Raw])
        if _METADATA not in header:
            raise ForeignBundleError(
                "file is a safetensors file without metadata; give a Driftkeel bundle"
            )
        metadata = msgspec.json.decode(header.pop(_METADATA), type=dict[str, str])
        if len(header) > limits.tensors:
            raise BundleTooLargeError(
                f"bundle declares {len(header)} tensors, at most {limits.tensors} are taken"
            )
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptBundleError(
            f"bundle's header cannot be read ({error}); fetch it again"
        ) from error
    return metadata, entries, memoryview(data)[start:]


def _check_layout(entries: Mapping[str, _Entry], available: int) -> None:
    """Every array has the bytes its shape needs, and together they are the file."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        needed = math.prod(entry.shape) * np.dtype(_DTYPES[entry.dtype]).itemsize
        if not needed:
            raise CorruptBundleError(f"tensor {name[:80]!a} is empty; no bundle has such")
        if end - begin != needed:
            raise CorruptBundleError(
                f"tensor {name[:80]!a} declares {end - begin} bytes, its shape needs {needed}"
            )
        if begin != position:
            raise CorruptBundleError(
                f"tensor {name[:80]!a} begins at byte {begin}, expected {position}: tensors must "
                "neither overlap nor leave a gap"
            )
        position = end
    if position > available:
        raise TruncatedBundleError(
            f"bundle ends early: found {available} bytes of tensors, expected {position}; "
            "fetch it again"
        )
    if position < available:
        raise CorruptBundleError(f"bundle has {available - position} bytes that belong to nothing")


def _checksum(
    metadata: Mapping[str, str], entries: Mapping[str, _Entry], body: bytes | memoryview
) -> str:
    described = msgspec.json.encode([sorted(metadata.items()), sorted(entries.items())])
    digest = hashlib.sha256(described)
    digest.update(body)
    return digest.hexdigest()
