"""Graphs whose adapter inputs have no defaults, for runtimes that take a default for a constant.

A suffix graph gives each adapter input a default of rank 0, so that nothing needs to be fed. A
provider that compiles a graph builds that rank into its program: OpenVINO then returns no rows at
all. `exporter.sessions` hands such providers what this makes. It reads the protocol buffer's bytes
itself, because a device has no ONNX package, and knows just enough of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from exporter.errors import EncoderError

# Field numbers of onnx.proto, which never change.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_GRAPH_INPUT = 11
_TENSOR_NAME = 8
_VALUE_NAME = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def required_inputs(model: bytes) -> bytes:
    """The graph with every input to be fed: initialisers of an input's name are left out.

    Args:
        model: An ONNX model, serialised.

    Raises:
        EncoderError: The bytes are not a protocol buffer.
    """
    parts = []
    for number, whole, value in _fields(model):
        if number == _MODEL_GRAPH:
            graph = _without_defaults(value)
            parts += [_key(number), _encoded(len(graph)), graph]
        else:
            parts.append(whole)
    return b"".join(parts)


def _without_defaults(graph: bytes) -> bytes:
    fields = list(_fields(graph))
    inputs = {_text(value, _VALUE_NAME) for number, _, value in fields if number == _GRAPH_INPUT}
    return b"".join(
        whole
        for number, whole, value in fields
        if number != _GRAPH_INITIALIZER or _text(value, _TENSOR_NAME) not in inputs
    )


def _text(message: bytes, wanted: int) -> bytes:
    return next((value for number, _, value in _fields(message) if number == wanted), b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field's number, all of its bytes, and the bytes of its value where it has a length."""
    at = 0
    while at < len(message):
        key, value_at = _decoded(message, at)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            size, value_at = _decoded(message, value_at)
            end = value_at + size
        elif kind == _VARINT:
            _, end = _decoded(message, value_at)
        elif kind in {_FIXED64, _FIXED32}:
            end = value_at + (8 if kind == _FIXED64 else 4)
        else:
            raise EncoderError(f"a graph has a field of kind {kind}, which no ONNX model has")
        if end > len(message):
            raise EncoderError("a graph ends in the middle of a field")
        yield number, message[at:end], message[value_at:end] if kind == _BYTES else b""
        at = end


def _decoded(message: bytes, at: int) -> tuple[int, int]:
    """A variable-length number, and where what follows it begins."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise EncoderError("a graph ends in the middle of a field")


def _key(number: int) -> bytes:
    return _encoded(number << 3 | _BYTES)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
