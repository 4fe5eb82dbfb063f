"""Graphs that are put into one model keep apart what is theirs and share what is stored."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from exporter.errors import EncoderError
from exporter.graph_writer import OPSET, GraphWriter
from exporter.graphs import external


def scaled(factor: float, *, opset: int = OPSET) -> ModelProto:
    """Multiplies x by a factor inside and by `stored`, which is left out: y."""
    inner = numpy_helper.from_array(np.array([factor], np.float32), "factor")
    stored = external(TensorProto(name="stored", data_type=TensorProto.FLOAT, dims=[1]))
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["between"]),
        helper.make_node("Mul", ["between", "stored"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(nodes, "scaled", ends[:1], ends[1:], [inner, stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_two_graphs_of_the_same_names_share_only_their_weights() -> None:
    graph = GraphWriter("test")
    (first,) = graph.put_in(scaled(2.0), "first", {"x": "x"})
    (second,) = graph.put_in(scaled(3.0), "second", {"x": first})
    graph.add("Identity", second, output="y")
    assert graph.weights == {"stored"}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    model = graph.model("both", ends[:1], ends[1:], {"stored": np.array([5.0], np.float32)})
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.array([1.0, 2.0], np.float32)})
    assert found.tolist() == [150.0, 300.0]
    names = [entry.name for entry in model.graph.initializer]
    assert sorted(names) == ["first/factor", "second/factor", "stored"]


def test_a_branch_has_its_own_nodes_and_the_models_constants() -> None:
    graph = GraphWriter("test")
    side = graph.branch()
    doubled = side.add("Mul", "x", side.constant([2.0]))
    assert graph.nodes == []
    assert len(graph.constants) == 1
    assert graph.constant([1.0]) != graph.constants[0].name
    assert side.chosen("side", []).node[0].output[0] == doubled


def test_a_graph_without_its_input_is_refused() -> None:
    with pytest.raises(EncoderError, match="needs a value for 'x'"):
        GraphWriter("test").put_in(scaled(1.0), "one", {})


def test_a_graph_of_another_opset_is_refused() -> None:
    with pytest.raises(EncoderError, match="'one' is of opset 17, the model of 20"):
        GraphWriter("test").put_in(scaled(1.0, opset=17), "one", {"x": "x"})


def test_a_graph_with_a_function_or_a_graph_inside_is_refused() -> None:
    model = scaled(1.0)
    function = helper.make_function(
        "local", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], []
    )
    model.functions.append(function)
    with pytest.raises(EncoderError, match="has functions"):
        GraphWriter("test").put_in(model, "one", {"x": "x"})
    inside = scaled(1.0)
    body = helper.make_graph([], "body", [], [])
    node = helper.make_node("If", ["y"], ["z"], then_branch=body, else_branch=body)
    inside.graph.node.append(node)
    with pytest.raises(EncoderError, match="a graph inside 'If'"):
        GraphWriter("test").put_in(inside, "one", {"x": "x"})


def test_a_model_that_no_file_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.ModelProto, "ByteSize", lambda _: 1 << 31, raising=False)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])]
    with pytest.raises(EncoderError, match="one file holds 2147483647"):
        GraphWriter("test").model("empty", ends, [])
