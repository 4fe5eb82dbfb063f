"""The ways to quantise one graph: standalone ONNX model in, standalone ONNX model out.

Each is a thin setting of ONNX Runtime's own quantiser, with what was measured to matter. Only
products with constant weights are touched: what adapters feed keeps its own precision. They know
nothing of packages. Needs ONNX.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from exporter.quantise_static import corrected, sensitivities, stem

Feeds = Mapping[str, npt.NDArray[np.float32]]

# A convolution keeps its weights when rounding them alone changes the output by more than this.
_SENSITIVE: Final = 0.04
_INT4_BLOCK: Final = 32
# Made and summed in float32 by ONNX Runtime's CPU provider only.
_SINGLE_ONLY: Final = ("ConstantOfShape", "ScatterElements")
# MatMulNBits' level 4: activations become int8 within each row and block, whatever the batch.
_INT8_ACTIVATIONS: Final = 4


@dataclass(frozen=True)
class Method:
    """One way to quantise.

    Attributes:
        apply: Quantises a graph, given feeds to observe activations with.
        calibrated: Whether it needs those feeds.
    """

    apply: Callable[[ModelProto, Sequence[Feeds]], ModelProto]
    calibrated: bool = False


def dynamic_int8(model: ModelProto, feeds: Sequence[Feeds]) -> ModelProto:
    """Weights of matrix products in int8 by output channel; activations at run time, a scale a run.

    One scale spans all rows of a run: rows have to be run one at a time.
    """
    del feeds
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantised.onnx"
        quantize_dynamic(
            model,
            out,
            per_channel=True,
            # Unsigned weights were measured slower.
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        return onnx.load(out)


def static_int8(model: ModelProto, feeds: Sequence[Feeds]) -> ModelProto:
    """Weights of convolutions and matrix products in int8, activations at scales fixed beforehand.

    The first convolution stays as it is, for with three input channels int8 makes it slower, and so
    do those that rounding harms most. Biases make up for the mean error of the rest.
    """
    harmed = [n for n, change in sensitivities(model, feeds).items() if change > _SENSITIVE]
    kept = sorted({*stem(model), *harmed})
    model = corrected(model, feeds, kept)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantised.onnx"
        quantize_static(
            model,
            out,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Clip", "MatMul", "Gemm"],
            nodes_to_quantize=_static_nodes(model, kept),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        return onnx.load(out)


def int4_weights(model: ModelProto, feeds: Sequence[Feeds]) -> ModelProto:
    """Weights of matrix products in int4 by blocks of 32 along the input (MatMulNBits)."""
    del feeds
    quantiser = _nbits_quantiser()(
        model,
        bits=4,
        block_size=_INT4_BLOCK,
        is_symmetric=True,
        accuracy_level=_INT8_ACTIVATIONS,
    )
    quantiser.process()
    quantised: ModelProto = quantiser.model.model
    return quantised


def half_precision(model: ModelProto, feeds: Sequence[Feeds]) -> ModelProto:
    """Everything in float16 but inputs and outputs; for providers that compute in it."""
    del feeds
    halved: ModelProto = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_SINGLE_ONLY]
    )
    # The conversion leaves casts behind the nodes that take them, which only ONNX Runtime accepts.
    OnnxModel.graph_topological_sort(halved.graph)
    return halved


METHODS: Final[Mapping[str, Method]] = {
    "int8": Method(dynamic_int8),
    "int8-static": Method(static_int8, calibrated=True),
    "int4": Method(int4_weights),
    "float16": Method(half_precision),
}


def _nbits_quantiser() -> Any:
    """Imports what importing would set up logging for, in the whole process; undoes that."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: PLC0415 - see above
        MatMulNBitsQuantizer,
    )

    root.handlers[:] = handlers
    root.setLevel(level)
    return MatMulNBitsQuantizer


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """Hands feeds to the quantiser, one run each."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def _static_nodes(model: ModelProto, kept: Collection[str]) -> list[str]:
    """What static quantisation takes: products with constant weights, and clips of convolutions.

    ONNX Runtime's static quantiser would take the products with an adapter's tensors as well.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    taken: list[str] = []
    convolved: set[str] = set()
    for node in model.graph.node:
        if node.op_type in {"Conv", "MatMul", "Gemm"}:
            if node.input[1] in constants and node.name not in kept:
                taken.append(node.name)
                convolved |= set(node.output) if node.op_type == "Conv" else set()
        elif node.op_type == "Clip" and node.input[0] in convolved:
            taken.append(node.name)
    return taken
