from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from exporter.attach import attach
from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, moved


def run(path: Path, **feeds: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features: Array = session.run(None, feeds)[0]
    return features


def test_a_standalone_suffix_computes_what_the_session_does(
    package: EncoderPackage,
    sessions: EncoderSessions,
    hidden: Array,
    tensors: dict[str, Array],
    tmp_path: Path,
) -> None:
    path = attach(package, tensors, tmp_path / "suffix.onnx")
    found = run(path, hidden=hidden)
    np.testing.assert_allclose(found, sessions.suffix(hidden, tensors), atol=1e-5)
    assert [entry.name for entry in onnx.load(path).graph.input] == ["hidden"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_model_takes_images(
    sessions: EncoderSessions, images: Array, tensors: dict[str, Array], tmp_path: Path
) -> None:
    package, hidden = sessions.package, sessions.prefix(images)
    adapted = attach(package, tensors, tmp_path / "adapted.onnx", whole=True)
    base = attach(package, {}, tmp_path / "base.onnx", whole=True)
    expected = sessions.suffix(hidden, tensors)
    np.testing.assert_allclose(run(adapted, images=images), expected, atol=1e-5)
    np.testing.assert_allclose(run(base, images=images), sessions.suffix(hidden), atol=1e-5)


@pytest.mark.parametrize("family", ["lora", "ssf"])
def test_a_folded_standalone_model_has_the_bare_model_s_nodes(
    encoders: dict[str, EncoderSessions], images: Array, tmp_path: Path, family: str
) -> None:
    sessions = encoders["vit"]
    package, tensors = sessions.package, moved(sessions.package, family, 3)
    path = attach(
        package, tensors, tmp_path / "folded.onnx", family=family, whole=True, folded=True
    )
    expected = sessions.suffix(sessions.prefix(images), tensors, family)
    np.testing.assert_allclose(run(path, images=images), expected, atol=2e-5)
    plain = attach(package, tensors, tmp_path / "nodes.onnx", family=family, whole=True)
    assert len(onnx.load(path).graph.node) < len(onnx.load(plain).graph.node)


def test_the_file_says_which_encoder_it_came_from(
    package: EncoderPackage, tensors: dict[str, Array], tmp_path: Path
) -> None:
    model = onnx.load(attach(package, tensors, tmp_path / "suffix.onnx"))
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["driftkeel.encoder"] == package.digest
    assert about["driftkeel.family"] == "bottleneck"
    assert about["driftkeel.mean"] == "[0.5, 0.5, 0.5]"


def test_tensors_of_another_encoder_are_refused_and_nothing_is_written(
    package: EncoderPackage, tensors: dict[str, Array], tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="none of 'bottleneck'"):
        attach(package, {**tensors, "else": tensors[min(tensors)]}, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_clear_error(
    package: EncoderPackage, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="cannot write"):
        attach(package, {}, tmp_path / "missing" / "x.onnx")
