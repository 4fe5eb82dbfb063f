"""Writing one adapter and its encoder as an ONNX file that needs nothing else.

For runtimes Driftkeel is not on: the file holds the weights and the adapter, and says in its
metadata which encoder it came from and how images are prepared. Needs the ONNX package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from exporter.derived import BARE_GRAPH, read_derived
from exporter.errors import EncoderError
from exporter.fold import folded_weights
from exporter.graphs import filled, joined
from exporter.package import PREFIX_GRAPH, EncoderPackage
from exporter.sessions import check_tensors

# One protocol-buffer message cannot be larger.
_LIMIT_BYTES = (1 << 31) - 1


def attach(
    package: EncoderPackage,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    out: Path,
    *,
    family: str | None = None,
    whole: bool = False,
    folded: bool = False,
) -> Path:
    """Writes a standalone ONNX model with one adapter inside.

    Args:
        package: The encoder.
        tensors: The adapter's tensors by name; empty for the base model.
        out: The file to write, whole or not at all.
        family: The adapter's family; the package's first when absent.
        whole: Include the prefix: the model takes `images`, not `hidden`.
        folded: Write the adapter into the encoder's weights, so that it adds no node.

    Returns:
        `out`.

    Raises:
        EncoderError: The tensors are not this encoder's, cannot be folded, or the model cannot be
            written.
    """
    family = family or package.families[0]
    if tensors:
        check_tensors(package, family, tensors)
    if tensors and folded:
        model = _folded(package, family, tensors)
    else:
        model = _filled(package, package.family(family).graph, tensors)
    if whole:
        model = joined(_filled(package, PREFIX_GRAPH, {}), model)
    about = {
        "driftkeel.encoder": package.digest,
        "driftkeel.encoder_name": package.name,
        "driftkeel.family": family if tensors else "frozen",
        "driftkeel.image_size": str(package.image_size),
        "driftkeel.mean": json.dumps(package.manifest.mean),
        "driftkeel.std": json.dumps(package.manifest.std),
    }
    onnx.helper.set_model_props(model, about)
    if model.ByteSize() > _LIMIT_BYTES:
        raise EncoderError(f"the model has {model.ByteSize()} bytes, one file holds {_LIMIT_BYTES}")
    onnx.checker.check_model(model)
    draft = out.with_name(f".{out.name}.part")
    try:
        with draft.open("wb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(out)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise EncoderError(f"cannot write {out}: {error.strerror}") from error
    return out


def _filled(
    package: EncoderPackage, graph: str, tensors: Mapping[str, npt.NDArray[np.float32]]
) -> onnx.ModelProto:
    proto = onnx.load_model_from_string(package.read(graph))
    return filled(proto, package.graph_weights(graph), tensors)


def _folded(
    package: EncoderPackage, family: str, tensors: Mapping[str, npt.NDArray[np.float32]]
) -> onnx.ModelProto:
    graph = read_derived(package, BARE_GRAPH)
    weights = folded_weights(package, family, tensors, package.named_weights(graph.weights))
    return filled(onnx.load_model_from_string(graph.data), weights, {})
