"""A score's graph says what NumPy says, alone and behind an encoder's suffix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx.compose
import onnxruntime
import pytest
from sklearn.datasets import load_digits

from exporter.attach import attach
from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from exporter.score_graph import score_graph
from exporter.sessions import EncoderSessions
from ood.calibration import Calibration
from ood.combined import CombinedScore
from ood.logits import EnergyScore
from ood.scores import MahalanobisScore, Score
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

Array = npt.NDArray[np.float32]
# Scores are about 0 to 100; float32 throughout keeps three digits after the point.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-3}


def _run(model: onnx.ModelProto, features: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, {"features": features})
    return found


def _random(seed: int, names: str, n: int, dim: int) -> tuple[Array, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [names[i % len(names)] for i in range(n)]
    centres = {name: np.random.default_rng(ord(name)).normal(size=dim) for name in names}
    rows = np.stack([centres[label] for label in labels]) + 0.7 * rng.normal(size=(n, dim))
    return rows.astype(np.float32), labels


def _head(features: Array, labels: list[str]) -> GaussianHead:
    return GaussianHead.from_statistics([ClassStatistics.fit(l2_normalise(features), labels)])


def _same(score: Score, features: Array) -> None:
    expected = score.score(l2_normalise(features))
    (found,) = _run(score_graph(score), features)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("dim", "parts"), [(24, ()), (96, (32, 64)), (576, (192, 192, 192))])
def test_random_features_score_as_in_numpy(batch: int, dim: int, parts: tuple[int, ...]) -> None:
    head = _head(*_random(0, "abcdefgh", 400, dim))
    reference = l2_normalise(_random(1, "abcdefgh", 80, dim)[0])
    score = CombinedScore(head, reference, parts=parts)
    for names in ("abcdefgh", "wxyz"):
        _same(score, _random(2, names, batch, dim)[0])
    _same(MahalanobisScore(head), _random(3, "abxy", batch, dim)[0])


@pytest.mark.parametrize("batch", [1, 32])
def test_pictures_of_digits_score_as_in_numpy(batch: int) -> None:
    """Many of these features are constant, and two in three are zero."""
    data = load_digits()
    features, labels = data.data.astype(np.float32), [str(digit) for digit in data.target]
    known = data.target < 7
    score = CombinedScore(
        _head(features[known][:600], [name for name in labels if name < "7"][:600]),
        l2_normalise(features[known][600:700]),
        parts=(32, 32),
    )
    _same(score, features[known][700 : 700 + batch])
    _same(score, features[~known][:batch])


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (np.full((6, 8), 0.4, np.float32), ["a"] * 6),
        (np.full((6, 8), 0.4, np.float32), list("aabbcc")),
        (np.eye(8, dtype=np.float32)[:2], ["a", "b"]),
        (np.zeros((4, 8), np.float32), list("abab")),
    ],
    ids=["constant, one class", "constant", "one each", "zeros"],
)
def test_degenerate_worlds_score_finite_and_in_the_same_order(
    rows: Array, labels: list[str]
) -> None:
    """Where known samples do not vary, scores are beyond any scale; only their order is kept."""
    score = CombinedScore(_head(rows, labels), l2_normalise(rows), parts=(4, 4))
    probe = np.vstack([rows[:1], -np.eye(8, dtype=np.float32)[:1]])
    (found,) = _run(score_graph(score), probe)
    assert np.isfinite(found).all()
    expected = score.score(l2_normalise(probe))
    assert (found[0] < found[1]) == (expected[0] < expected[1])


def test_a_model_gives_the_p_value_of_the_calibration_too() -> None:
    score = CombinedScore(
        _head(*_random(0, "abcd", 300, 16)), l2_normalise(_random(1, "abcd", 80, 16)[0])
    )
    held_out = score.score(l2_normalise(_random(2, "abcd", 200, 16)[0]))
    calibration = Calibration(held_out)
    features = _random(3, "abcdxy", 60, 16)[0]
    scores, p_values = _run(score_graph(score, calibration), features)
    # Rounding moves a score past its neighbour at most.
    assert np.abs(p_values - calibration.p_values(scores)).max() <= 1.5 / 201
    assert p_values.min() < 0.01
    assert p_values.max() > 0.5


def test_a_score_is_merged_behind_a_suffix(package: EncoderPackage, tmp_path) -> None:
    sessions = EncoderSessions(package)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(60, *package.hidden_shape)).astype(np.float32)
    features = sessions.suffix(hidden)
    score = CombinedScore(
        _head(features[:40], list("ab") * 20),
        l2_normalise(features[40:]),
        parts=package.manifest.feature_parts,
    )
    suffix = onnx.load(attach(package, {}, tmp_path / "suffix.onnx"))
    model = onnx.compose.merge_models(
        suffix,
        score_graph(score),
        io_map=[("features", "features")],
        outputs=["features", "ood_score"],
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found, scores = session.run(None, {"hidden": hidden[:7]})
    assert np.allclose(found, features[:7], atol=1e-5)
    assert np.allclose(scores, score.score(l2_normalise(features[:7])), **TOLERANCE)


def test_a_score_without_a_graph_is_refused() -> None:
    with pytest.raises(EncoderError, match="EnergyScore has no graph"):
        score_graph(EnergyScore(_head(*_random(0, "ab", 40, 8))))
