"""The out-of-distribution score as an ONNX graph, for a model that is to score by itself.

Takes features as the suffix gives them and computes what `ood.combined` (or, with few held-out
samples, `ood.scores`) computes in NumPy, in float32 throughout. Stands alone or is merged behind a
suffix. Needs the ONNX package. The daemon stays with NumPy: docs/benchmarks/ood.md says why.
A sample with NaN or infinity, which NumPy refuses by name, scores NaN.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from exporter.errors import EncoderError
from exporter.graph_writer import GraphWriter
from ood.calibration import Calibration
from ood.combined import LEAST_DISTANCE, WEIGHTS, CombinedScore, PartDistances
from ood.scores import MahalanobisScore, Score

FEATURES: Final = "features"
SCORE: Final = "ood_score"
P_VALUE: Final = "ood_p_value"


def score_graph(score: Score, calibration: Calibration | None = None) -> onnx.ModelProto:
    """Writes a fitted score as a model from `features` to `ood_score`.

    Args:
        score: A `CombinedScore` or a `MahalanobisScore`, as a detector has.
        calibration: The detector's; then `ood_p_value` is an output too: the conservative conformal
            p-value, float32 [n].

    Returns:
        A checked model: features float32 [n, d], of any length, to float32 [n].

    Raises:
        EncoderError: The score is of another kind.
    """
    graph = GraphWriter("score")
    outputs = add_score(graph, graph.unit_rows(FEATURES), score, calibration)
    features = helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["n", _dim(score)])
    return graph.model(
        "score",
        [features],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in outputs],
    )


def add_score(
    graph: GraphWriter, rows: str, score: Score, calibration: Calibration | None
) -> list[str]:
    """Writes a fitted score into a graph, to `ood_score` and `ood_p_value`.

    Args:
        graph: Where to.
        rows: The value with features of unit length, float32 [n, d].
        score: As for `score_graph`.
        calibration: As for `score_graph`.

    Returns:
        The names of the outputs.

    Raises:
        EncoderError: The score is of another kind.
    """
    if isinstance(score, CombinedScore):
        found = _combined(graph, rows, score)
    elif isinstance(score, MahalanobisScore):
        head = score.head
        found = _nearest(
            graph, rows, PartDistances(head.means, head.covariance, slice(0, head.dim))
        )
    else:
        raise EncoderError(
            f"a score of kind {type(score).__name__} has no graph; only the combined score and the "
            "Mahalanobis distance do"
        )
    graph.add("Identity", found, output=SCORE)
    if calibration is None:
        return [SCORE]
    _p_value(graph, found, calibration)
    return [SCORE, P_VALUE]


def _dim(score: Score) -> int:
    if isinstance(score, CombinedScore):
        return len(score.centre)
    assert isinstance(score, MahalanobisScore)
    return score.head.dim


def _combined(graph: GraphWriter, rows: str, score: CombinedScore) -> str:
    """`CombinedScore.score`, term by term."""
    components = len(score.biases)
    depths = [graph.add("Log", _nearest(graph, rows, part)) for part in score.parts]
    distance = _joined(graph, depths, score.depth_scale, (1.0,) * len(depths))
    centred = graph.add("Sub", rows, graph.constant(score.centre))
    squares = graph.reduced("ReduceSumSquare", centred)
    columns = np.hstack([score.vim.classifier.weights.T, score.linear])
    linear = graph.add("MatMul", centred, graph.constant(columns))
    logits = graph.add("Add", graph.columns(linear, 0, components), graph.constant(score.biases))
    cosines = graph.add(
        "Add",
        graph.columns(linear, components, 2 * components),
        graph.constant(score.central),
    )
    length = graph.at_least(graph.reduced("ReduceL2", rows), 1e-12)
    direction = graph.add("Neg", graph.add("Div", graph.reduced("ReduceMax", cosines), length))
    views = [
        distance,
        direction,
        _boundary(graph, score, logits, squares),
        _virtual_logit(graph, score, logits, graph.columns(linear, 2 * components, 1 << 31)),
    ]
    return _joined(graph, views, score.view_scale, WEIGHTS)


def _nearest(graph: GraphWriter, rows: str, part: PartDistances) -> str:
    """`PartDistances.nearest`."""
    width = len(part.centre)
    mine = graph.columns(rows, part.columns.start, part.columns.stop)
    projected = graph.add(
        "MatMul",
        graph.add("Sub", mine, graph.constant(part.centre)),
        graph.constant(part.project),
    )
    own = graph.reduced("ReduceSumSquare", graph.columns(projected, 0, width))
    others = graph.add(
        "Add", graph.columns(projected, width, 1 << 31), graph.constant(part.offsets)
    )
    nearest = graph.add("Add", own, graph.reduced("ReduceMin", others))
    return graph.at_least(nearest, LEAST_DISTANCE)


def _boundary(graph: GraphWriter, score: CombinedScore, logits: str, squares: str) -> str:
    """`BoundaryScore.from_logits`."""
    best = graph.reduced("ReduceMax", logits, keepdims=1)
    which = graph.add("ArgMax", logits, axis=1, keepdims=0)
    reciprocal = graph.add("Gather", graph.constant(score.boundary.reciprocal), which, axis=0)
    lead = graph.add("Mul", graph.add("Sub", best, logits), reciprocal)
    others = max(len(score.biases) - 1, 1)
    away = graph.at_least(graph.add("Sqrt", squares), 1e-12)
    scaled = graph.add("Mul", away, graph.constant(-float(others)))
    return graph.add("Div", graph.reduced("ReduceSum", lead), scaled)


def _virtual_logit(graph: GraphWriter, score: CombinedScore, logits: str, outside: str) -> str:
    """`VimScore.from_logits`."""
    length = graph.reduced("ReduceL2", outside)
    weighed = graph.add("Mul", length, graph.constant(score.vim.alpha))
    return graph.add("Sub", weighed, graph.reduced("ReduceLogSumExp", logits))


def _joined(
    graph: GraphWriter,
    values: list[str],
    scale: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    weights: tuple[float, ...],
) -> str:
    """Standardised, weighed and joined, as the views of `CombinedScore`."""
    shares = np.log(np.array(weights) / sum(weights))
    axis = graph.constant([1], np.int64)
    columns = [graph.add("Unsqueeze", value, axis) for value in values]
    stacked = graph.add("Concat", *columns, axis=1)
    mean, deviation = scale
    standard = graph.add(
        "Div",
        graph.add("Sub", stacked, graph.constant(mean)),
        graph.constant(deviation),
    )
    return graph.reduced("ReduceLogSumExp", graph.add("Add", standard, graph.constant(shares)))


def _p_value(graph: GraphWriter, score: str, calibration: Calibration) -> None:
    """`Calibration.p_values` without a draw: (1 + #{calibration ≥ score}) / (n + 1)."""
    column = graph.add("Unsqueeze", score, graph.constant([1], np.int64))
    above = graph.add("LessOrEqual", column, graph.constant(calibration.scores))
    number = graph.reduced("ReduceSum", graph.add("Cast", above, to=TensorProto.FLOAT))
    graph.add(
        "Div",
        graph.add("Add", number, graph.constant(1.0)),
        graph.constant(float(len(calibration.scores) + 1)),
        output=P_VALUE,
    )
