"""The suffix without adapter nodes, taken from any family's suffix graph.

A family's graph computes the bare encoder when nothing is fed, but runs the adapter's nodes all
the same. Here they are removed by following what neutral tensors make of them. Called when a
package's further graphs are derived; needs the ONNX package, no torch, and knows no family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from exporter.errors import EncoderError

# What a value is when every adapter tensor is zero or empty.
_Neutral = Literal["zeros", "ones", "unknown"]

_LAYOUT = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Expand", "Identity"})
_ZERO_AT_ZERO = _LAYOUT | {"Relu", "Gelu", "Neg", "ReduceSum"}


def bare(proto: ModelProto, tensors: Collection[str]) -> ModelProto:
    """Removes the adapter from a suffix graph.

    Args:
        proto: The graph of any family, as a package holds it: weights left out.
        tensors: The names of the adapter's inputs.

    Returns:
        A graph of `hidden` to `features` with the same weights and none of the adapter's nodes.

    Raises:
        EncoderError: The adapter's nodes cannot be told from the encoder's.
    """
    model = ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    adapter: dict[str, _Neutral] = dict.fromkeys(tensors, "zeros")
    constants = _constants(graph, adapter)
    same: dict[str, str] = {}
    transposed: dict[str, NodeProto] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        inputs = [same.get(name, name) for name in node.input]
        node.ClearField("input")
        node.input.extend(inputs)
        output, equal = node.output[0], None
        if adapter.keys() & set(inputs):
            equal = _equal(node, {**constants, **adapter})
            if equal is None or equal in adapter or equal in constants:
                adapter[output] = {**constants, **adapter}.get(equal or "", "unknown")
                continue
        elif node.op_type == "ConstantOfShape":
            constants[output] = _filled(node)
        elif node.op_type == "Transpose":
            # Channels are moved to the end for an adapter and back behind it.
            before = transposed.get(inputs[0])
            equal = before.input[0] if before is not None and _undoes(node, before) else None
            transposed[output] = node
        if equal is None:
            kept.append(node)
        else:
            same[output] = equal
    ends = [entry.name for entry in graph.output]
    if adapter.keys() & set(ends):
        raise EncoderError("the adapter's nodes cannot be told from the encoder's")
    names = {same[end]: end for end in ends if end in same}
    for node in kept:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    _prune(graph, kept, ends)
    return model


def _constants(graph: onnx.GraphProto, adapter: Collection[str]) -> dict[str, _Neutral]:
    found: dict[str, _Neutral] = {}
    for entry in graph.initializer:
        if entry.name not in adapter and entry.data_location != onnx.TensorProto.EXTERNAL:
            found[entry.name] = _neutral(numpy_helper.to_array(entry))
    return found


def _filled(node: NodeProto) -> _Neutral:
    """What a node that makes a constant of one number makes."""
    return _neutral(numpy_helper.to_array(node.attribute[0].t) if node.attribute else np.zeros(1))


def _neutral(value: npt.NDArray[np.generic]) -> _Neutral:
    if not value.size:
        return "unknown"
    return "ones" if bool(np.all(value == 1)) else "unknown" if np.any(value) else "zeros"


def _equal(node: NodeProto, values: Mapping[str, _Neutral]) -> str | None:
    """The input that a node's output equals but for its layout, when the adapter is neutral."""
    inputs: list[str] = list(node.input)
    is_zero = [values.get(name) == "zeros" for name in inputs]
    if node.op_type in _ZERO_AT_ZERO and is_zero[0]:
        return inputs[0]
    if node.op_type in _LAYOUT and values.get(inputs[0]) == "ones":
        return inputs[0]
    if node.op_type == "ScatterElements" and is_zero[2] and _adds(node):
        return inputs[0]
    if node.op_type in {"Mul", "MatMul"} and any(is_zero):
        return inputs[is_zero.index(True)]
    if node.op_type == "Gemm" and any(is_zero[:2]):
        return inputs[2] if len(inputs) == 3 else inputs[is_zero.index(True)]
    for one, other in (inputs, inputs[::-1]) if len(inputs) == 2 else ():
        if node.op_type == "Add" and values.get(one) == "zeros":
            return other
        if node.op_type == "Mul" and values.get(one) == "ones":
            return other
    return None


def _adds(node: NodeProto) -> bool:
    return any(about.name == "reduction" and about.s == b"add" for about in node.attribute)


def _undoes(node: NodeProto, before: NodeProto) -> bool:
    first, second = (list(n.attribute[0].ints) if n.attribute else None for n in (before, node))
    if first is None or second is None:
        return first is second
    return [first[axis] for axis in second] == list(range(len(first)))


def _prune(graph: onnx.GraphProto, nodes: Sequence[NodeProto], ends: Collection[str]) -> None:
    """Leaves of some of a graph's nodes what its outputs depend on, in place."""
    needed, kept = set(ends), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    for entries, left in (
        (graph.node, kept[::-1]),
        (graph.initializer, [entry for entry in graph.initializer if entry.name in needed]),
        (graph.input, [entry for entry in graph.input if entry.name in needed]),
    ):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in left]
        del entries[:]
        entries.extend(copies)
