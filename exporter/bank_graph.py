"""A family's suffix graph rewritten so that every row of a batch has an adapter of its own.

Each adapter input becomes a bank of T adapters, [T, ...], of which one is gathered for each row;
from there on the nodes that the family's `apply` was captured as work on [n, ...], product by
product. So the mathematics stays where it is written. Called when a package's further graphs are
derived; needs the ONNX package, no torch, and knows no family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporter.errors import EncoderError

INDEX = "index"
_ADAPTERS = "adapters"

_UNARY = frozenset({"Relu", "Gelu", "Neg", "Identity"})
_BINARY = frozenset({"Add", "Mul"})
# Their second input holds axes, which move by one behind the rows.
_BY_AXES = frozenset({"Unsqueeze", "Squeeze", "ReduceSum"})


def banked(proto: ModelProto, tensors: Mapping[str, tuple[int | str, ...]]) -> ModelProto:
    """Rewrites a suffix graph to take a bank and an index for each row.

    Args:
        proto: A family's graph as a package holds it: weights left out.
        tensors: The shapes of the adapter's inputs by name.

    Returns:
        A graph of `hidden` [n, ...], `index` int64 [n] and each tensor [T, ...] to `features`.
        Row i is what the suffix computes with the adapter `index[i]`.

    Raises:
        EncoderError: The family's nodes include one that is not known here.
    """
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    ranks = {
        entry.name: len(entry.type.tensor_type.shape.dim)
        for entry in (*inferred.value_info, *inferred.input, *inferred.output)
        if entry.type.tensor_type.HasField("shape")
    }
    constants = {
        entry.name: None
        if entry.data_location == TensorProto.EXTERNAL
        else numpy_helper.to_array(entry)
        for entry in proto.graph.initializer
        if entry.name not in tensors
    }
    ranks |= {entry.name: len(entry.dims) for entry in proto.graph.initializer}
    rows = _Rows(ranks | {name: len(shape) for name, shape in tensors.items()}, constants)
    for name in tensors:
        rows.gather(name)
    for node in proto.graph.node:
        rows.take(node)

    model = ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    hidden = next(entry for entry in proto.graph.input if entry.name not in tensors)
    batch = hidden.type.tensor_type.shape.dim[0].dim_param
    inputs = [
        hidden,
        helper.make_tensor_value_info(INDEX, TensorProto.INT64, [batch]),
        *(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [_ADAPTERS, *shape])
            for name, shape in tensors.items()
        ),
    ]
    weights = [entry for entry in proto.graph.initializer if entry.name not in tensors]
    for field in ("node", "input", "initializer"):
        graph.ClearField(field)
    graph.node.extend(rows.nodes)
    graph.input.extend(inputs)
    graph.initializer.extend([*weights, *rows.initializers])
    return model


class _Rows:
    """The rewriting under way.

    Values of the adapter have one axis more than they had, the rows', in front; values of the
    samples have it already. Fixed ones are the same for all rows: what the encoder stores, the
    adapters' shapes, and what is made of these alone.
    """

    def __init__(
        self, ranks: Mapping[str, int], constants: Mapping[str, npt.NDArray[np.generic] | None]
    ) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._ranks = ranks
        self._constants = constants
        self._gathered: dict[str, str] = {}
        self._fixed = set(constants)
        self._made = 0

    def gather(self, name: str) -> None:
        """Picks each row's adapter out of the bank of one tensor."""
        self._gathered[name] = self._add("Gather", [name, INDEX], axis=0)

    def take(self, node: NodeProto) -> None:
        """Adds a node, rewritten where the adapter reaches it."""
        if not any(name in self._gathered for name in node.input):
            self.nodes.append(node)
            if self._fixed.issuperset(name for name in node.input if name):
                self._fixed.update(node.output)
            return
        if node.op_type == "Shape":
            self._shape(node)
            return
        of_sample = any(
            name not in self._gathered and name not in self._fixed for name in node.input
        )
        if node.op_type == "Gemm":
            self._gemm(node)
        elif node.op_type in _BINARY or node.op_type == "MatMul":
            self._broadcast(node)
        elif node.op_type == "ScatterElements":
            self._scatter(node)
        elif of_sample:
            raise EncoderError(f"a bank cannot run the node {node.op_type!r} row by row")
        else:
            self._rearrange(node)
        if not of_sample:
            output = node.output[0]
            self._gathered[output] = output

    def _rearrange(self, node: NodeProto) -> None:
        """A node that moves one tensor's axes, or none."""
        first = self._gathered[node.input[0]]
        output, rank = node.output[0], self._ranks[node.input[0]]
        if node.op_type in _UNARY:
            self._add(node.op_type, [first], output, **_attributes(node))
        elif node.op_type == "Transpose":
            order = _attributes(node).get("perm") or range(rank)[::-1]
            self._add("Transpose", [first], output, perm=[0, *(axis + 1 for axis in order)])
        elif node.op_type == "Reshape":
            # A zero keeps the axis at its place, here the rows'.
            shape = self._constant([0, *self._value(node.input[1])])
            self._add("Reshape", [first, shape], output)
        elif node.op_type in _BY_AXES and len(node.input) == 2:
            axes = self._value(node.input[1])
            behind = rank + len(axes) if node.op_type == "Unsqueeze" else rank
            moved = self._constant([axis % behind + 1 for axis in axes])
            self._add(node.op_type, [first, moved], output, **_attributes(node))
        else:
            raise EncoderError(f"a bank cannot run the node {node.op_type!r} row by row")

    def _broadcast(self, node: NodeProto) -> None:
        """A sum or a product of two values, of which either may be the adapter's."""
        matrices = node.op_type == "MatMul"
        behind = {name: self._behind(name) for name in node.input}
        most = max(*behind.values(), 2 if matrices else 0)
        inputs, vector = [], False
        for name in node.input:
            value, missing = self._gathered.get(name, name), most - behind[name]
            if matrices and behind[name] == 1:
                if name in self._gathered or name == node.input[1]:
                    raise EncoderError("a bank cannot multiply by a vector row by row")
                vector = True
            if missing and name not in self._fixed:
                value = self._add("Unsqueeze", [value, self._constant(range(1, missing + 1))])
            inputs.append(value)
        if not vector:
            self._add(node.op_type, inputs, node.output[0])
            return
        product = self._add(node.op_type, inputs)
        self._add("Squeeze", [product, self._constant([most - 1])], node.output[0])

    def _gemm(self, node: NodeProto) -> None:
        """A linear map of rows [n, d], written as a product for each row and a sum."""
        about = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **_attributes(node)}
        if about["alpha"] != 1 or about["beta"] != 1 or about["transA"]:
            raise EncoderError("a bank cannot run a scaled or transposed 'Gemm' row by row")
        x, weight = node.input[:2]
        gathered = self._gathered.get(weight)
        if gathered is None or x in self._gathered:
            raise EncoderError("a bank cannot run a 'Gemm' of anything but an adapter's weight")
        if about["transB"]:
            gathered = self._add("Transpose", [gathered], perm=[0, 2, 1])
        wide = self._add("Unsqueeze", [x, self._constant([1])])
        product = self._add("MatMul", [wide, gathered])
        end = [] if len(node.input) == 3 else [node.output[0]]
        rows = self._add("Squeeze", [product, self._constant([1])], *end)
        if len(node.input) == 3:
            bias = node.input[2]
            self._add("Add", [rows, self._gathered.get(bias, bias)], node.output[0])

    def _shape(self, node: NodeProto) -> None:
        """The shape of an adapter's tensor, which all adapters of a bank have."""
        about = {"start": 0, **_attributes(node)}
        moved = {key: axis + 1 if axis >= 0 else axis for key, axis in about.items()}
        self._add("Shape", [self._gathered[node.input[0]]], node.output[0], **moved)
        self._fixed.update(node.output)

    def _scatter(self, node: NodeProto) -> None:
        """Entries of an adapter put into a fixed tensor at fixed places: into a copy a row."""
        data, places, updates = node.input
        if updates not in self._gathered or not self._fixed.issuperset((data, places)):
            raise EncoderError("a bank can scatter nothing but an adapter's entries row by row")
        about = _attributes(node)
        count = self._add("Shape", [self._gathered[updates]])
        rows = self._add("Shape", [self._gathered[updates]], start=0, end=1)
        whole = self._add("Concat", [rows, self._add("Shape", [data])], axis=0)
        inputs = [
            self._add("Expand", [data, whole]),
            self._add("Expand", [places, count]),
            self._gathered[updates],
        ]
        axis = about["axis"] % self._ranks[data] + 1
        self._add("ScatterElements", inputs, node.output[0], **{**about, "axis": axis})

    def _behind(self, name: str) -> int:
        """How many axes a value has behind the rows'; all of them, if it has none for rows."""
        if name not in self._ranks:
            raise EncoderError(f"the shape of {name!r} is not known")
        of_sample = name not in self._gathered and name not in self._fixed
        return self._ranks[name] - 1 if of_sample else self._ranks[name]

    def _value(self, name: str) -> list[int]:
        value = self._constants.get(name)
        if value is None:
            raise EncoderError(f"a bank needs {name!r} to be a constant")
        return [int(entry) for entry in value]

    def _constant(self, values: Iterable[int]) -> str:
        name = f"bank/axes_{len(self.initializers)}"
        array = np.array(list(values), np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def _add(self, kind: str, inputs: Sequence[str], output: str = "", **about: Any) -> str:
        if not output:
            output, self._made = f"bank/value_{self._made}", self._made + 1
        self.nodes.append(helper.make_node(kind, inputs, [output], **about))
        return output


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
