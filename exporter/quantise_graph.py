"""A package's graphs as quantisers want them, and back: weights inside, then out again.

`opened` fills a graph and leaves adapters as plain inputs, so that no quantiser takes their neutral
defaults for constants; `emptied` takes what a quantiser wrote out of the graph and names it by its
content, so that the graphs of all families share it. Nothing here quantises. Needs ONNX.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import onnxscript.optimizer
from onnx import ModelProto, TensorProto, helper, numpy_helper

from exporter.graphs import external, filled
from exporter.package import QUANTISED_KEY, Array

# Smaller constants (axes, shapes, scalar scales) stay in the graph, where optimisers see them.
_SMALLEST_BYTES: Final = 64
_NAME_DIGITS: Final = 16
# Whatever is computed from weights alone (a transposed copy, a slice) is computed now.
_FOLD_LIMIT: Final = 1 << 30


def opened(proto: ModelProto, weights: Mapping[str, Array], adapter: Collection[str]) -> ModelProto:
    """A package's graph with its weights inside and adapters as inputs without defaults.

    Args:
        proto: The graph, lean as the package holds it.
        weights: The stored weights it names.
        adapter: Names of the adapter's tensors; empty for a prefix.
    """
    inputs = [entry for entry in proto.graph.input if entry.name in adapter]
    model = filled(proto, weights, {})
    constants = [entry for entry in model.graph.initializer if entry.name not in adapter]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    model.graph.input.extend(inputs)
    folded: ModelProto = onnxscript.optimizer.optimize(
        model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
    )
    # What onnxruntime.quantization asks for has been done above.
    helper.set_model_props(folded, {"onnx.quant.pre_process": "onnxruntime.quant"})
    return folded


def emptied(model: ModelProto, stored: Mapping[str, Array]) -> tuple[ModelProto, dict[str, Array]]:
    """Takes the larger constants out of a graph.

    Args:
        model: A graph that stands alone.
        stored: The package's weights. A constant that is one of them is named as it.

    Returns:
        The lean graph, and under `QUANTISED_KEY` the tensors it needs beside the stored ones.
    """
    made: dict[str, Array] = {}
    renamed: dict[str, str] = {}
    for index, tensor in enumerate(model.graph.initializer):
        value = numpy_helper.to_array(tensor)
        if value.nbytes < _SMALLEST_BYTES:
            continue
        name = tensor.name
        if not _same(value, stored.get(name)):
            name = _content_name(value)
            made[name] = np.ascontiguousarray(value)
        renamed[tensor.name] = name
        place = TensorProto(name=name, data_type=tensor.data_type, dims=tensor.dims)
        model.graph.initializer[index].CopyFrom(external(place))
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    _drop_repeated(model)
    for part in (model, model.graph, *model.graph.node):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.graph.ClearField("value_info")
    return model, made


def _same(value: Array, stored: Array | None) -> bool:
    return stored is not None and stored.dtype == value.dtype and np.array_equal(stored, value)


def _content_name(value: Array) -> str:
    about = f"{value.dtype.str} {value.shape}".encode()
    return QUANTISED_KEY + hashlib.sha256(about + value.tobytes()).hexdigest()[:_NAME_DIGITS]


def _drop_repeated(model: ModelProto) -> None:
    """Keeps one initialiser of each name: equal constants were given one."""
    kept = list({tensor.name: tensor for tensor in model.graph.initializer}.values())
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
