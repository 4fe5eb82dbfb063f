"""One model of a whole generation: images in, labels and scores out, with ONNX Runtime alone.

Prefix, base features, OOD score, the first round of routing, adapters and heads in one ONNX file,
for programs in any language that Driftkeel is not in. `edge_agent` gathers a generation's parts and
compares the model with what the device answers before `write_model`. Needs the ONNX package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from adapter_store.blobs import write_durably
from exporter.derived import BARE_GRAPH, derived_names, read_derived
from exporter.errors import EncoderError
from exporter.graph_writer import GraphWriter, check_size
from exporter.package import PREFIX_GRAPH, EncoderPackage
from exporter.routing_graph import (
    ADAPTER,
    LABEL,
    LABEL_NAME,
    PROBABILITIES,
    Group,
    add_decision,
)
from exporter.score_graph import FEATURES, P_VALUE, SCORE, add_score
from ood.calibration import Calibration
from ood.mixture import Mixture
from ood.scores import Score

IMAGES: Final = "images"
HIDDEN: Final = "hidden"
BASE: Final = "base_evidence"
OWN: Final = "own_evidence"
# Of the metadata's layout.
_FORMAT: Final = "1"


@dataclass(frozen=True, eq=False)
class GenerationParts:
    """What a generation consists of, as far as a model of it needs it.

    Attributes:
        package: The encoder.
        mixture: The head in the base space.
        groups: The bundles, in the order of their digests.
        score: The OOD score; None for a model without one.
        calibration: The score's calibration; None where there is no score.
    """

    package: EncoderPackage
    mixture: Mixture
    groups: Sequence[Group]
    score: Score | None = None
    calibration: Calibration | None = None


def whole_model(parts: GenerationParts) -> onnx.ModelProto:
    """Writes a generation as one model, from `images` to everything a device says of them.

    Args:
        parts: The generation.

    Returns:
        A checked model of `images` uint8 [n, s, s, 3] to `label` int64 [n], `label_name` string
        [n], `probabilities` float32 [n, labels], `adapter` int64 [n], `features` float32 [n, d]
        and, with a score, `ood_score` and `ood_p_value` float32 [n].

    Raises:
        EncoderError: The score has no graph, a family has no bank, the package lacks a graph, or
            the model is larger than one file can be.
    """
    package, size = parts.package, parts.package.image_size
    graph = GraphWriter("driftkeel")
    prepared = _prepared(graph, package)
    prefix = onnx.load_model_from_string(package.read(PREFIX_GRAPH))
    (hidden,) = graph.put_in(prefix, "prefix", {"images": prepared})
    rows = _base_features(graph, package, hidden)
    graph.add("Identity", rows, output=FEATURES)
    outputs, _ = _answers(graph, parts, hidden=hidden, rows=FEATURES)
    images = helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["n", size, size, 3])
    features = helper.make_tensor_value_info(
        FEATURES, TensorProto.FLOAT, ["n", package.feature_dim]
    )
    weights = package.named_weights(graph.weights)
    return graph.model("generation", [images], [*outputs, features], weights)


def answering_model(parts: GenerationParts) -> onnx.ModelProto:
    """Writes what follows base features, as it is in `whole_model`, as a model of its own.

    With it every adapter can be asked about any features, whatever images there are.

    Returns:
        A model of `hidden` float32 [n, *package.hidden_shape] and `features` float32 [n, d] to the
        other outputs of `whole_model`, and to the evidence that decisions rest on: `base_evidence`
        float32 [n, components] and, where there are adapters, `own_evidence` [n, entries].

    Raises:
        EncoderError: As `whole_model`.
    """
    package = parts.package
    graph = GraphWriter("driftkeel")
    outputs, evidence = _answers(graph, parts, hidden=HIDDEN, rows=FEATURES)
    # Probabilities are soon 0 or 1; what they are computed from tells small errors.
    widths = {BASE: len(parts.mixture.label), OWN: len(parts.mixture.entries)}
    for value, (name, width) in zip(evidence, widths.items(), strict=False):
        graph.add("Identity", value, output=name)
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]))
    shapes = {HIDDEN: package.hidden_shape, FEATURES: (package.feature_dim,)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
        for name, shape in shapes.items()
    ]
    return graph.model("answers", inputs, outputs, package.named_weights(graph.weights))


def metadata(
    parts: GenerationParts, *, number: int, digest: str, bundles: Sequence[str]
) -> dict[str, str]:
    """What a model says of itself: labels, bundles, where it is from, how images are prepared.

    Args:
        parts: The generation.
        number: The generation's number on its device.
        digest: The generation's digest.
        bundles: The bundles' digests, in the order of `parts.groups`.
    """
    package = parts.package
    preprocessing = {
        "size": package.image_size,
        "layout": "NHWC",
        "dtype": "uint8",
        "colour_order": "RGB",
        "resize": "both sides scaled, whatever the proportions; bicubic, antialiased",
        "mean": package.manifest.mean,
        "std": package.manifest.std,
        "normalisation": "inside the graph: (value / 255 - mean) / std",
    }
    about = {
        "format": _FORMAT,
        "version": version("driftkeel"),
        "labels": json.dumps(parts.mixture.labels),
        "bundles": json.dumps(list(bundles)),
        "encoder": package.digest,
        "encoder_name": package.name,
        "generation": str(number),
        "generation_digest": digest,
        "max_rounds": "1",
        "preprocessing": json.dumps(preprocessing),
    }
    if package.manifest.rows_per_run is not None:
        about["rows_per_run"] = str(package.manifest.rows_per_run)
    return {f"driftkeel.{key}": value for key, value in about.items()}


def check_place(out: Path) -> None:
    """Checks that a model can be written to a place, before time is spent on it.

    Raises:
        EncoderError: It is a directory, or it is in none.
    """
    if out.is_dir():
        raise EncoderError(f"{out} is a directory; name the file to write")
    if not out.parent.is_dir():
        raise EncoderError(f"{out.parent} is no directory; make it, or write elsewhere")


def write_model(model: onnx.ModelProto, about: Mapping[str, str], out: Path) -> int:
    """Writes a model and what it says of itself, whole or not at all.

    Args:
        model: The model; its metadata are set.
        about: The metadata.
        out: The file.

    Returns:
        Its size in bytes.

    Raises:
        EncoderError: The model is larger than one file can be.
        DiskFullError: It cannot be written; what was there stays.
    """
    helper.set_model_props(model, dict(about))
    check_size(model)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    write_durably(out, data)
    return len(data)


def _prepared(graph: GraphWriter, package: EncoderPackage) -> str:
    """`preprocess.prepare` of images that have the encoder's size."""
    # The same roundings as there: one multiplication and one addition a value.
    std = np.asarray(package.manifest.std, np.float32)
    scale = np.float32(1 / 255) / std
    shift = -np.asarray(package.manifest.mean, np.float32) / std
    values = graph.add("Cast", IMAGES, to=TensorProto.FLOAT)
    planes = graph.add("Transpose", values, perm=[0, 3, 1, 2])
    scaled = graph.add("Mul", planes, graph.constant(scale[:, None, None]))
    return graph.add("Add", scaled, graph.constant(shift[:, None, None]))


def _base_features(graph: GraphWriter, package: EncoderPackage, hidden: str) -> str:
    """`EncoderSessions.base_features`."""
    if package.base_from_prefix:
        # What the prefix ends with has length one already.
        return graph.columns(graph.add("Flatten", hidden, axis=1), -package.feature_dim, 1 << 31)
    if BARE_GRAPH in derived_names(package):
        data = read_derived(package, BARE_GRAPH).data
    else:
        # An adapter of rank 0, which is what the graph takes when it is fed none.
        data = package.read(package.family(package.families[0]).graph)
    proto = onnx.load_model_from_string(data)
    (features,) = graph.put_in(proto, "suffix", {"hidden": hidden})
    return graph.unit_rows(features)


def _answers(
    graph: GraphWriter, parts: GenerationParts, *, hidden: str, rows: str
) -> tuple[list[onnx.ValueInfoProto], list[str]]:
    """Everything that is said of samples: the outputs it is said in, and what decisions rest on."""
    evidence = add_decision(
        graph, parts.package, parts.mixture, parts.groups, hidden=hidden, rows=rows
    )
    kinds = {LABEL: TensorProto.INT64, LABEL_NAME: TensorProto.STRING, ADAPTER: TensorProto.INT64}
    outputs = [helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in kinds.items()]
    outputs.append(
        helper.make_tensor_value_info(
            PROBABILITIES, TensorProto.FLOAT, ["n", len(parts.mixture.labels)]
        )
    )
    if parts.score is not None:
        # It normalises again what is normalised: a score's graph takes features as they come.
        names = add_score(graph, rows, parts.score, parts.calibration)
        outputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in names]
    return outputs, evidence


__all__ = [
    "ADAPTER",
    "BASE",
    "LABEL",
    "LABEL_NAME",
    "OWN",
    "PROBABILITIES",
    "P_VALUE",
    "SCORE",
    "GenerationParts",
    "answering_model",
    "check_place",
    "metadata",
    "whole_model",
    "write_model",
]
