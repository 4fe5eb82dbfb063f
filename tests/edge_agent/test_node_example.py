"""The example for Node.js answers as Python does, from the exported file alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from adapter_store.state import StateReader
from edge_agent.agent import Agent
from edge_agent.export_generation import export_generation
from edge_agent.snapshot import scale_images
from exporter.sessions import session_options
from tests.edge_agent.conftest import striped

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "node"
RUNTIME = ROOT / ".cache" / "node" / "node_modules"
INSTALL_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its runtime beside it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed (apt-get install nodejs npm)")
    if not (RUNTIME / "onnxruntime-node" / "package.json").is_file():
        subprocess.run(["make", "node"], cwd=ROOT, check=True, timeout=INSTALL_TIMEOUT_S)
    if not (RUNTIME / "onnxruntime-node" / "package.json").is_file():
        pytest.skip("onnxruntime-node could not be installed (make node)")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules").symlink_to(RUNTIME)
    return folder


@pytest.fixture
def model(
    agent: Agent, install: Callable[..., int], make_bundle: Callable[..., bytes], tmp_path: Path
) -> Path:
    install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))
    state = StateReader(agent.state.path)
    try:
        out = tmp_path / "model.onnx"
        export_generation(state, agent.sessions, None, out, progress=lambda _: None)
    finally:
        state.close()
    return out


def node(example: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", str(example / "run.mjs"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def images() -> NDArray[np.uint8]:
    noise = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    return np.concatenate([scale_images(striped(range(6), 3, seed=5)[0], 64), noise])


def test_node_answers_as_python_does(
    agent: Agent, example: Path, model: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images())
    done = node(example, model, tmp_path / "images.npy")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    session = onnxruntime.InferenceSession(
        model, session_options(), providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_outputs()]
    found: dict[str, Any] = dict(zip(names, session.run(None, {"images": images()}), strict=True))
    assert (said["generation"], said["encoder"]) == (1, agent.package.digest)
    assert said["labels"] == [f"stripes-{k}" for k in range(6)]
    bundles = [*sorted(agent.state.generations.get(1).manifest.bundles), None]
    answers = said["samples"]
    assert [answer["label"] for answer in answers] == found["label_name"].tolist()
    assert [answer["adapter"] for answer in answers] == [bundles[k] for k in found["adapter"]]
    assert len({answer["adapter"] for answer in answers}) == 2
    for key, expected in (
        ("probability", found["probabilities"].max(axis=1)),
        ("ood_score", found["ood_score"]),
        ("ood_p_value", found["ood_p_value"]),
    ):
        values = np.array([answer[key] for answer in answers])
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_raw_bytes_are_answered_as_the_array(example: Path, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images())
    (tmp_path / "images.raw").write_bytes(images().tobytes())
    array, raw = (node(example, model, tmp_path / f"images.{kind}") for kind in ("npy", "raw"))
    assert raw.returncode == 0, raw.stderr
    assert raw.stdout == array.stdout


def test_images_of_another_size_and_other_files_are_refused(
    example: Path, model: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "small.npy", np.zeros((2, 32, 32, 3), np.uint8))
    np.save(tmp_path / "floats.npy", np.zeros((2, 64, 64, 3), np.float32))
    small = node(example, model, tmp_path / "small.npy")
    assert (small.returncode, "expected [n, 64, 64, 3]" in small.stderr) == (1, True)
    floats = node(example, model, tmp_path / "floats.npy")
    assert (floats.returncode, "not a plain uint8 array" in floats.stderr) == (1, True)
    other = node(example, tmp_path / "small.npy", tmp_path / "small.npy")
    assert (other.returncode, "ONNX file" in other.stderr) == (1, True)
