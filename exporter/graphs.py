"""ONNX graphs without their weights: making them, giving adapters defaults, filling them again.

A package stores weights once, in its own precision, so its graphs only name them. Sessions hand
them to ONNX Runtime by name; `filled` writes them into a graph that has to stand alone. The
exporter calls this; a device that only infers does not (it has no ONNX package).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx.compose
import onnxscript.optimizer
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnxscript import ir

# Names the place weights would be in; the file never exists, sessions bring the weights.
_LOCATION = "weights"
# Numbers from which on a constant of zeros is made when the graph is loaded, not stored.
_LARGE = 1024


def lean(model: ir.Model, stored: Collection[str]) -> ModelProto:
    """Optimises a model and takes its stored weights out, leaving their names and shapes.

    The weights are hidden from the optimiser, or it would fold them into new tensors under new
    names (a transposed copy, say); ONNX Runtime does that folding when a session is made.

    Args:
        model: The model as exported, unoptimised: its initialisers keep the parameters' names.
        stored: Names of the initialisers the package stores.
    """
    hidden = set()
    for name in [name for name in model.graph.initializers if name in stored]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
        hidden.add(name)
    onnxscript.optimizer.optimize_ir(model)
    proto: ModelProto = ir.to_proto(model)
    _zeros_made(proto.graph)
    used = {name for node in _nodes(proto.graph) for name in node.input}
    for entry in [entry for entry in proto.graph.input if entry.name in hidden]:
        proto.graph.input.remove(entry)
        if entry.name in used:
            kind = entry.type.tensor_type
            dims = [axis.dim_value for axis in kind.shape.dim]
            place = TensorProto(name=entry.name, data_type=kind.elem_type, dims=dims)
            proto.graph.initializer.append(external(place))
    _forget_sources(proto)
    return proto


def weight_names(proto: ModelProto) -> tuple[str, ...]:
    """The stored weights a lean graph has to be given, sorted."""
    entries = proto.graph.initializer
    return tuple(sorted(t.name for t in entries if t.data_location == TensorProto.EXTERNAL))


def external(tensor: TensorProto) -> TensorProto:
    """Marks a tensor without data, in place, as a weight that sessions bring."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    length = int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", _LOCATION), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _nodes(graph: GraphProto) -> list[NodeProto]:
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                nodes.extend(_nodes(attribute.g))
    return nodes


def _zeros_made(graph: GraphProto) -> None:
    """Replaces large constants of zeros by a node that makes them: they would fill the file."""
    for index, entry in reversed(list(enumerate(graph.initializer))):
        if math.prod(entry.dims) < _LARGE or entry.data_type != TensorProto.FLOAT:
            continue
        if not numpy_helper.to_array(entry).any():
            shape = numpy_helper.from_array(np.array(entry.dims, np.int64), f"{entry.name}/shape")
            made = onnx.helper.make_node("ConstantOfShape", [shape.name], [entry.name])
            graph.node.insert(0, made)
            graph.initializer[index].CopyFrom(shape)


def _forget_sources(proto: ModelProto) -> None:
    """Removes source paths and intermediate shapes, which are large and bind to one machine."""
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    proto.graph.ClearField("doc_string")
    proto.graph.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    for function in proto.functions:
        function.ClearField("metadata_props")
        function.ClearField("value_info")
    nodes = [*_nodes(proto.graph), *(node for f in proto.functions for node in f.node)]
    for part in (*nodes, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def with_defaults(proto: ModelProto, tensors: Mapping[str, tuple[int | str, ...]]) -> None:
    """Gives every adapter input a default of rank 0, in place: not fed, it changes nothing."""
    for name, shape in tensors.items():
        dims = [axis if isinstance(axis, int) else 0 for axis in shape]
        zeros = np.zeros(dims, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(zeros, name))


def filled(
    proto: ModelProto,
    weights: Mapping[str, npt.NDArray[np.generic]],
    tensors: Mapping[str, npt.NDArray[np.float32]],
) -> ModelProto:
    """Returns a graph that stands alone: weights inside, one adapter as constants.

    Args:
        proto: A graph from a package.
        weights: The package's weights by initialiser name.
        tensors: The adapter's tensors; empty keeps the base model, without adapter inputs.
    """
    whole = ModelProto()
    whole.CopyFrom(proto)
    graph = whole.graph
    inner = {entry.name for entry in graph.initializer}
    for entry in [entry for entry in graph.input if entry.name in inner]:
        graph.input.remove(entry)
    for index, entry in enumerate(graph.initializer):
        if entry.data_location == TensorProto.EXTERNAL:
            value = weights[entry.name]
        elif entry.name in tensors:
            value = np.ascontiguousarray(tensors[entry.name], dtype=np.float32)
        else:
            continue
        graph.initializer[index].CopyFrom(numpy_helper.from_array(value, entry.name))
    return whole


def joined(prefix: ModelProto, suffix: ModelProto) -> ModelProto:
    """Connects two filled graphs, `images` to `hidden` to `features`, into one."""
    first = onnx.compose.add_prefix(prefix, "prefix/", rename_inputs=False, rename_outputs=False)
    second = onnx.compose.add_prefix(suffix, "suffix/", rename_inputs=False, rename_outputs=False)
    whole: ModelProto = onnx.compose.merge_models(first, second, io_map=[("hidden", "hidden")])
    return whole
