"""From captured programs to ONNX graphs without weights; only the builder calls this.

Apart from `programs` so that a process that trains does not load the ONNX packages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from onnx import ModelProto
from torch.export import ExportedProgram

from exporter.graphs import lean, with_defaults
from exporter.programs import quiet


def prefix_graph(program: ExportedProgram) -> ModelProto:
    """Lowers a captured prefix to ONNX without its weights: `images` to `hidden`."""
    return _lowered(program, ["images"], "hidden")


def suffix_graph(
    program: ExportedProgram, tensors: Mapping[str, tuple[int | str, ...]]
) -> ModelProto:
    """Lowers a captured suffix to ONNX without its weights: `hidden` to `features`.

    Every adapter tensor is an input under its own name, with a default that changes nothing.
    """
    proto = _lowered(program, ["hidden", *tensors], "features")
    with_defaults(proto, tensors)
    return proto


def _lowered(program: ExportedProgram, inputs: list[str], output: str) -> ModelProto:
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=inputs,
            output_names=[output],
        )
    assert exported is not None
    return lean(exported.model, stored=set(program.state_dict))
