"""Writing an ONNX graph node by node, with whole graphs put in where they belong.

The graphs that the exporter writes itself, of scores and of decisions, are written through here; so
are models that several graphs make up. It knows nothing of what they compute. Needs the ONNX
package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import count
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from exporter.errors import EncoderError

# Of the encoders' own graphs, so that they go together.
OPSET: Final = 20
IR_VERSION: Final = 10
# Float32 divides by no less.
TINY: Final = 1e-30


class GraphWriter:
    """Nodes and constants in the order they are added; names are numbers behind a word.

    Args:
        word: What the names begin with.

    Attributes:
        nodes: The nodes so far.
        constants: Their constants.
        weights: The stored weights that graphs which were put in have to be given.
    """

    def __init__(self, word: str) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.weights: set[str] = set()
        self._word = word
        self._numbers = count()
        self._domains: dict[str, int] = {"": OPSET}

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Keeps an array and returns its name."""
        name = f"{self._word}/constant_{next(self._numbers)}"
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype))
        self.constants.append(numpy_helper.from_array(array.reshape(np.shape(value)), name))
        return name

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node of one output and returns the output's name."""
        name = output or f"{self._word}/{kind}_{next(self._numbers)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def reduced(self, kind: str, values: str, *, keepdims: int = 0) -> str:
        """Reduces each row."""
        return self.add(kind, values, self.constant([1], np.int64), keepdims=keepdims)

    def columns(self, values: str, start: int, stop: int) -> str:
        """Takes columns."""
        ends = (self.constant([edge], np.int64) for edge in (start, stop, 1))
        return self.add("Slice", values, *ends)

    def at_least(self, values: str, least: float) -> str:
        """The larger of each value and a bound."""
        return self.add("Max", values, self.constant(least))

    def unit_rows(self, values: str) -> str:
        """Rows of unit length, as `ood.statistics.l2_normalise`; a row of zeros stays zero."""
        peak = self.reduced("ReduceMax", self.add("Abs", values), keepdims=1)
        scaled = self.add("Div", values, self.at_least(peak, TINY))
        length = self.reduced("ReduceL2", scaled, keepdims=1)
        return self.add("Div", scaled, self.at_least(length, TINY))

    def branch(self) -> Self:
        """A writer of nodes for one side of an `If`; constants and names are shared with it."""
        other = copy(self)
        other.nodes = []
        return other

    def put_in(self, proto: ModelProto, word: str, given: Mapping[str, str]) -> list[str]:
        """Puts a whole graph in.

        Args:
            proto: The graph. Weights that it only names keep their names, so that graphs share
                them; they are noted in `weights`.
            word: What the names of its other values are to begin with; no two graphs share one.
            given: For each of its inputs, the value it takes.

        Returns:
            Its outputs' names here.

        Raises:
            EncoderError: An input is not given, or the graph has parts that cannot be put in.
        """
        graph = proto.graph
        if len(proto.functions):
            raise EncoderError(f"the graph {word!r} has functions, which cannot be put in a model")
        for entry in proto.opset_import:
            if self._domains.setdefault(entry.domain, entry.version) != entry.version:
                raise EncoderError(
                    f"the graph {word!r} is of opset {entry.version}, the model of "
                    f"{self._domains[entry.domain]}"
                )
        names = dict(given)
        for tensor in graph.initializer:
            if tensor.name in given:
                continue
            if tensor.data_location == TensorProto.EXTERNAL:
                names[tensor.name] = tensor.name
                self.weights.add(tensor.name)
            else:
                names[tensor.name] = f"{word}/{tensor.name}"
                kept = TensorProto()
                kept.CopyFrom(tensor)
                kept.name = names[tensor.name]
                self.constants.append(kept)
        if missing := [entry.name for entry in graph.input if entry.name not in names]:
            raise EncoderError(f"the graph {word!r} needs a value for {missing[0]!r}")
        self.nodes.extend(_renamed(graph, names, word))
        return [names[entry.name] for entry in graph.output]

    def chosen(self, name: str, outputs: Sequence[ValueInfoProto]) -> GraphProto:
        """What was written, as one side of an `If`."""
        return helper.make_graph(self.nodes, name, [], outputs)

    def model(
        self,
        name: str,
        inputs: Sequence[ValueInfoProto],
        outputs: Sequence[ValueInfoProto],
        weights: Mapping[str, npt.NDArray[np.generic]] | None = None,
    ) -> ModelProto:
        """What was written, as a checked model.

        Args:
            name: The graph's name.
            inputs: Its inputs.
            outputs: Its outputs.
            weights: The values of the weights that graphs which were put in name.

        Raises:
            EncoderError: The model is larger than one file can be.
        """
        given = [
            numpy_helper.from_array(value, key) for key, value in sorted((weights or {}).items())
        ]
        model = helper.make_model(
            helper.make_graph(self.nodes, name, inputs, outputs, [*given, *self.constants]),
            opset_imports=[helper.make_opsetid(*entry) for entry in self._domains.items()],
            ir_version=IR_VERSION,
            producer_name="driftkeel",
        )
        check_size(model)
        onnx.checker.check_model(model, full_check=True)
        return model


def check_size(model: ModelProto) -> None:
    """Checks that a model fits into one file: one protocol-buffer message cannot be larger.

    Raises:
        EncoderError: It does not.
    """
    limit = (1 << 31) - 1
    if model.ByteSize() > limit:
        raise EncoderError(f"the model has {model.ByteSize()} bytes, one file holds {limit}")


def _renamed(graph: GraphProto, names: dict[str, str], word: str) -> list[NodeProto]:
    """A graph's nodes under their new names, which are added to `names`."""
    names.setdefault("", "")
    nodes = []
    for number, node in enumerate(graph.node):
        renamed = NodeProto()
        renamed.CopyFrom(node)
        renamed.name = f"{word}/node_{number}"
        # A graph inside a node may use any name of the graph around it.
        if any(attribute.type == attribute.GRAPH for attribute in node.attribute):
            raise EncoderError(f"the graph {word!r} has a graph inside {node.op_type!r}")
        for output in node.output:
            names.setdefault(output, f"{word}/{output}")
        for mine, theirs in ((renamed.input, node.input), (renamed.output, node.output)):
            mine[:] = [names[entry] for entry in theirs]
        nodes.append(renamed)
    return nodes
