"""Static int8: which products keep float weights, and biases that make up for rounding.

`quantise_methods` calls this before it hands a graph to ONNX Runtime's quantiser, which rounds each
weight to the nearest step by itself. Nothing here changes a weight. Needs ONNX.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporter.sessions import session_options

Floats = npt.NDArray[np.float32]
Feeds = Mapping[str, Floats]

# The steps of symmetric int8, as ONNX Runtime's quantiser lays them.
_STEPS: Final = 127
# Axes of a convolution's output [n, c, h, w] that are not the channels'.
_OTHER_AXES: Final = (0, 2, 3)
_PROBES: Final = 16


def convolutions(model: ModelProto) -> list[NodeProto]:
    """The convolutions of a graph with constant weights and a constant bias, in order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and len(node.input) == 3 and {*node.input[1:]} <= constants
    ]


def rounded(weight: Floats) -> Floats:
    """A convolution's weight [out, ...] as symmetric int8 by output channel holds it."""
    axes = tuple(range(1, weight.ndim))
    step = np.abs(weight).max(axis=axes, keepdims=True) / _STEPS
    step = np.where(step > 0, step, 1)
    nearest: Floats = (np.round(weight / step) * step).astype(np.float32)
    return nearest


def stem(model: ModelProto) -> list[str]:
    """Names of the convolutions that read the graph's input."""
    inputs = {entry.name for entry in model.graph.input}
    return [node.name for node in convolutions(model) if node.input[0] in inputs]


def sensitivities(model: ModelProto, feeds: Sequence[Feeds]) -> dict[str, float]:
    """How much the graph's output changes when one convolution's weights alone are rounded.

    Args:
        model: A graph that stands alone, with one output.
        feeds: Samples to measure on; the first few are used.

    Returns:
        By convolution's name, the root mean square of the change relative to the output's.
    """
    chosen = feeds[:_PROBES]
    before = _run(model, chosen)
    size = float(np.sqrt(np.mean(np.square(before, dtype=np.float64)))) or 1.0
    found = {}
    for node in convolutions(model):
        weight = _constant(model, node.input[1])
        after = _run(_replaced(model, {node.input[1]: rounded(weight)}), chosen)
        change = np.square(after.astype(np.float64) - before)
        found[node.name] = float(np.sqrt(change.mean())) / size
    return found


def corrected(model: ModelProto, feeds: Sequence[Feeds], kept: Collection[str]) -> ModelProto:
    """The graph with biases from which the mean error of rounding the weights is taken off.

    What the rounding of a weight adds to an output is not zero on average, as inputs are not:
    E[W'x] - E[Wx] goes into the bias (Nagel et al., "Data-free quantization through weight
    equalization and bias correction", ICCV 2019, eq. 16, its expectation taken over samples).

    Args:
        model: A graph that stands alone.
        feeds: Samples to take the expectation over.
        kept: Names of convolutions whose weights will not be rounded.
    """
    chosen = [node for node in convolutions(model) if node.name not in kept]
    if not chosen:
        return model
    probe = ModelProto()
    probe.CopyFrom(model)
    outputs = []
    for node in chosen:
        weight = _constant(model, node.input[1])
        error, shifted = f"{node.name}/error", f"{node.name}/shifted"
        tensor = numpy_helper.from_array(rounded(weight) - weight, error)
        probe.graph.initializer.append(tensor)
        beside = NodeProto()
        beside.CopyFrom(node)
        beside.name = shifted
        beside.input[:] = [node.input[0], error]
        beside.output[:] = [shifted]
        outputs.append(f"{node.name}/mean")
        axes = numpy_helper.from_array(np.array(_OTHER_AXES, np.int64), f"{node.name}/axes")
        probe.graph.initializer.append(axes)
        mean = helper.make_node("ReduceMean", [shifted, axes.name], [outputs[-1]], keepdims=0)
        probe.graph.node.extend([beside, mean])
        probe.graph.output.append(
            helper.make_tensor_value_info(outputs[-1], TensorProto.FLOAT, None)
        )
    session = _session(probe)
    means = [session.run(outputs, dict(given)) for given in feeds]
    changes = {}
    for node, shift in zip(chosen, zip(*means, strict=True), strict=True):
        bias = _constant(model, node.input[2])
        changes[node.input[2]] = (bias - np.mean(shift, axis=0)).astype(np.float32)
    return _replaced(model, changes)


def _constant(model: ModelProto, name: str) -> Floats:
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value: Floats = numpy_helper.to_array(found)
    return value


def _replaced(model: ModelProto, values: Mapping[str, Floats]) -> ModelProto:
    changed = ModelProto()
    changed.CopyFrom(model)
    for index, tensor in enumerate(changed.graph.initializer):
        if tensor.name in values:
            new = numpy_helper.from_array(values[tensor.name], tensor.name)
            changed.graph.initializer[index].CopyFrom(new)
    return changed


def _session(model: ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )


def _run(model: ModelProto, feeds: Sequence[Feeds]) -> Floats:
    session = _session(model)
    return np.concatenate([session.run(None, dict(given))[0] for given in feeds])
