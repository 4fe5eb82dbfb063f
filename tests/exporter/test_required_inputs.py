"""Graphs without defaults: what is left out, and nothing else."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import EncoderError
from exporter.package import PREFIX_GRAPH, EncoderPackage
from exporter.required_inputs import required_inputs


def test_defaults_are_left_out_and_everything_else_stays(package: EncoderPackage) -> None:
    entry = package.family("bottleneck")
    before = onnx.load_model_from_string(package.read(entry.graph))
    after = onnx.load_model_from_string(required_inputs(package.read(entry.graph)))
    names = {tensor.name for tensor in before.graph.initializer}
    assert {tensor.name for tensor in after.graph.initializer} == names - set(entry.tensors)
    kept = [tensor for tensor in before.graph.initializer if tensor.name not in entry.tensors]
    del before.graph.initializer[:]
    before.graph.initializer.extend(kept)
    assert after == before


def test_a_graph_without_defaults_stays_as_it_is(package: EncoderPackage) -> None:
    graph = package.read(PREFIX_GRAPH)
    assert required_inputs(graph) == graph


@pytest.mark.parametrize("size", [1, 127, 128, 20_000])
def test_fields_of_any_length_and_kind_survive(size: int) -> None:
    node = onnx.helper.make_node("Constant", [], ["y"], value_floats=[0.5] * size)
    empty = onnx.helper.make_tensor("x", onnx.TensorProto.FLOAT, [0], [])
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [size])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [given], [result], [empty]))
    model.model_version = 2**40
    after = onnx.load_model_from_string(required_inputs(model.SerializeToString()))
    del model.graph.initializer[:]
    assert after == model


def test_half_a_graph_is_refused(package: EncoderPackage) -> None:
    graph = package.read(PREFIX_GRAPH)
    with pytest.raises(EncoderError, match="ends in the middle of a field"):
        required_inputs(graph[: len(graph) // 2])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_graph_never_raise_anything_else(data: bytes) -> None:
    try:
        once = required_inputs(data)
    except EncoderError:
        return
    assert required_inputs(once) == once
