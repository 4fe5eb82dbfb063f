"""How an adapter's numbers are stored: 32, 16, 8, 4, 2 or 1 bits each.

Called by the bundle format, and by training that prepares weights for a codec. NumPy only; what is
decoded is equal on every device to the last bit. Knows nothing of families or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adapter_store.errors import BundleTooLargeError, CorruptBundleError, NonFiniteBundleError
from ood.errors import OodError
from ood.quantiser import pack_codes, packed_size, quantise_rows, restore_rows, unpack_codes

Codec = Literal["fp32", "fp16", "int8", "int4", "int2", "int1"]
Shape = tuple[int, ...]

CODECS: Final[tuple[Codec, ...]] = get_args(Codec)
MAX_NUMBERS: Final = 4 * 1024 * 1024

_BITS: Final[dict[Codec, int]] = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
_FLOATS: Final[dict[Codec, str]] = {"fp32": "<f4", "fp16": "<f2"}
# Biases and gains are few and act on every sample alike: fewer bits would save next to nothing.
_VECTOR_BITS: Final = 8


def encode(tensors: Mapping[str, NDArray[np.floating[Any]]], codec: Codec) -> bytes:
    """Write tensors one after another in the order of their names.

    The integer codecs see a matrix as rows along its longer side (for an adapter: one for each
    unit of its rank), give each a float16 step and each number a code of so many bits, by
    `ood.quantiser.quantise_rows`. Tensors of one dimension keep at least 8 bits.

    Args:
        tensors: names to finite floats, none empty.
        codec: one of `CODECS`.

    Raises:
        NonFiniteBundleError: a number is NaN or infinite, or would be in this codec.
        BundleTooLargeError: there are more than `MAX_NUMBERS` numbers.
    """
    encoded_size({name: tensor.shape for name, tensor in tensors.items()}, codec)
    return b"".join(_encode(name, tensors[name], codec) for name in sorted(tensors))


def decode(data: bytes, shapes: Mapping[str, Sequence[int]], codec: Codec) -> dict[str, Any]:
    """Read what `encode` wrote, from anywhere: names to float32 arrays.

    Args:
        data: the bytes.
        shapes: the shape of each tensor.
        codec: how it was written.

    Raises:
        BundleTooLargeError: the shapes hold more than `MAX_NUMBERS` numbers; nothing was
            allocated.
        CorruptBundleError: the bytes are not as many as the shapes need.
        NonFiniteBundleError: a number is NaN or infinite.
    """
    needed = encoded_size(shapes, codec)
    if len(data) != needed:
        raise CorruptBundleError(
            f"bundle's adapter has {len(data)} bytes, its shapes need {needed} at {codec}"
        )
    tensors, position = {}, 0
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        size = _size(shape, codec)
        tensors[name] = _decode(name, data[position : position + size], shape, codec)
        position += size
    return tensors


def quantised(
    tensors: Mapping[str, NDArray[np.floating[Any]]], codec: Codec
) -> dict[str, NDArray[np.float32]]:
    """Return what a reader will have of these tensors: the numbers after writing and reading.

    Training that knows its codec runs on these and passes gradients straight through to the
    tensors themselves (Bengio, Léonard and Courville 2013): see `edge_agent.quantised_training`.

    Raises:
        NonFiniteBundleError: a number is NaN or infinite, or would be in this codec.
        BundleTooLargeError: there are more than `MAX_NUMBERS` numbers.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return decode(encode(tensors, codec), shapes, codec)


def encoded_size(shapes: Mapping[str, Sequence[int]], codec: Codec) -> int:
    """Return the bytes that tensors of these shapes take; computed, nothing is allocated.

    Raises:
        BundleTooLargeError: there are more than `MAX_NUMBERS` numbers.
        CorruptBundleError: a tensor is empty.
    """
    numbers = [math.prod(shape) for shape in shapes.values()]
    if sum(numbers) > MAX_NUMBERS:
        raise BundleTooLargeError(
            f"bundle's adapter declares {sum(numbers)} numbers, at most {MAX_NUMBERS} are taken"
        )
    if any(number < 1 for number in numbers):
        raise CorruptBundleError("bundle declares an empty tensor; no bundle has such")
    return sum(_size(tuple(shape), codec) for shape in shapes.values())


def _encode(name: str, tensor: NDArray[np.floating[Any]], codec: Codec) -> bytes:
    if not np.isfinite(tensor).all():
        raise NonFiniteBundleError(f"tensor {name[:80]!a} holds NaN or infinity; train it again")
    if codec in _FLOATS:
        with np.errstate(over="ignore"):
            stored = tensor.astype(_FLOATS[codec])
        if not np.isfinite(stored).all():
            raise NonFiniteBundleError(
                f"tensor {name[:80]!a} has numbers up to {np.abs(tensor).max():g}, which {codec} "
                "cannot hold; store it as fp32"
            )
        return stored.tobytes()
    rows, columns, bits, turned = _layout(tensor.shape, codec)
    matrix = tensor.reshape((columns, rows) if turned else (rows, columns))
    try:
        codes, steps = quantise_rows(matrix.T if turned else matrix, bits)
    except OodError as error:
        raise NonFiniteBundleError(
            f"tensor {name[:80]!a} cannot be stored as {codec}: {error}; store it as fp32"
        ) from error
    return steps.astype("<f2").tobytes() + pack_codes(codes, bits)


def _decode(name: str, data: bytes, shape: Shape, codec: Codec) -> NDArray[np.float32]:
    result: NDArray[np.float32]
    if codec in _FLOATS:
        result = np.frombuffer(data, dtype=_FLOATS[codec]).astype(np.float32).reshape(shape)
    else:
        rows, columns, bits, turned = _layout(shape, codec)
        steps = np.frombuffer(data[: 2 * rows], dtype="<f2").astype(np.float16)
        matrix = restore_rows(unpack_codes(data[2 * rows :], rows, columns, bits), steps, bits)
        result = np.ascontiguousarray(matrix.T if turned else matrix).reshape(shape)
    if not np.isfinite(result).all():
        raise NonFiniteBundleError(f"tensor {name[:80]!a} holds NaN or infinity; train it again")
    return result


def _size(shape: Shape, codec: Codec) -> int:
    if codec in _FLOATS:
        return math.prod(shape) * np.dtype(_FLOATS[codec]).itemsize
    rows, columns, bits, _ = _layout(shape, codec)
    return 2 * rows + packed_size(rows, columns, bits)


def _layout(shape: Shape, codec: Codec) -> tuple[int, int, int, bool]:
    """Rows, columns and bits of a tensor's codes, and whether its first axis is the columns."""
    if len(shape) < 2:
        return 1, math.prod(shape), max(_BITS[codec], _VECTOR_BITS), False
    first, rest = shape[0], math.prod(shape[1:])
    return min(first, rest), max(first, rest), _BITS[codec], first > rest
