"""OpenVINO for real: every graph of a device, compared with the CPU.

ONNX Runtime's OpenVINO build cannot lie beside the plain one, so this runs a process of another
environment, which `make openvino` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from exporter.package import EncoderPackage
from exporter.quantise import quantise
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("DRIFTKEEL_OPENVINO", ROOT / ".cache" / "openvino")) / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"{PYTHON} is not there; `make openvino` makes it"
)


@pytest.fixture(scope="module")
def report(
    encoders: dict[str, EncoderSessions],
    package: EncoderPackage,
    images: Array,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quantised")
    made = [
        quantise(package, folder / method, method=method, images=images)
        for method in ("int8", "int8-static")
    ]
    paths = [one.path for one in [*(sessions.package for sessions in encoders.values()), *made]]
    script = Path(__file__).with_name("openvino_child.py")
    done = subprocess.run(
        [PYTHON, script, *paths], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_other_environment_has_openvino(report: dict[str, Any]) -> None:
    assert report["available"] == ["openvino", "cpu"]


def test_openvino_runs_every_graph_of_every_encoder(report: dict[str, Any]) -> None:
    for name in ("shipped", "vit", "cnn"):
        found = report["encoders"][name]
        assert set(found["running"].values()) == {"openvino"}, (name, found["running"])


def test_what_openvino_computes_is_what_the_cpu_does(report: dict[str, Any]) -> None:
    for name, found in report["encoders"].items():
        for graph in found["running"]:
            assert found[graph] <= found["tolerance"], (name, graph, found[graph])
    assert report["bank"] <= report["encoders"]["shipped"]["tolerance"]


def test_an_adapter_that_is_fed_acts(report: dict[str, Any]) -> None:
    for name in ("shipped", "vit", "cnn"):
        found = report["encoders"][name]
        for graph in found["running"].keys() - {"prefix"}:
            assert found[f"{graph} acts"] > 1e-3, (name, graph)


def test_an_answer_does_not_depend_on_its_batch(report: dict[str, Any]) -> None:
    for name, found in report["encoders"].items():
        assert found["alone"] <= 1e-5, name


def test_no_decision_changes(report: dict[str, Any]) -> None:
    for name, found in report["encoders"].items():
        assert found["classes"] > 1, name
        assert found["decisions"] == 0, name
