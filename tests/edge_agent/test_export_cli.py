"""`driftkeel export`: one adapter as before, and a whole generation beside a running agent."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from adapter_store.bundle import bundle_digest
from adapter_store.errors import DiskFullError, GenerationError, StoreError
from edge_agent.agent import Agent
from edge_agent.export_cli import export
from exporter.errors import EncoderError
from exporter.sessions import session_options


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Describes the device of the fixture `agent`."""
    path = tmp_path / "agent.toml"
    path.write_text('[agent]\ndevice = "device-a"\nstate_dir = "state"\n', encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(export, [str(part) for part in arguments], catch_exceptions=False)


def generation(config_file: Path, number: object, out: Path, *more: str) -> Result:
    return invoke("--generation", number, "--config", config_file, "--out", out, *more)


def test_a_generation_is_written_beside_a_running_agent_and_says_what_it_is(
    agent: Agent,
    install: Callable[..., int],
    make_bundle: Callable[..., bytes],
    config_file: Path,
    tmp_path: Path,
) -> None:
    bundles = [make_bundle((0, 1, 2)), make_bundle((3, 4), adapter=1)]
    install(*bundles)
    result = generation(config_file, "current", tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    size = (tmp_path / "model.onnx").stat().st_size
    assert result.stdout == f"{tmp_path / 'model.onnx'}: {size} bytes\n"
    assert "noise: probabilities differ by" in result.stderr
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    about = {entry.key.removeprefix("driftkeel."): entry.value for entry in model.metadata_props}
    running = agent.state.generations.get(1)
    assert json.loads(about["labels"]) == [f"stripes-{k}" for k in range(5)]
    assert json.loads(about["bundles"]) == sorted(map(bundle_digest, bundles))
    assert about["encoder"] == agent.package.digest
    assert about["encoder_name"] == agent.package.name
    assert (about["generation"], about["generation_digest"]) == ("1", running.digest)
    assert (about["version"], about["max_rounds"]) == (version("driftkeel"), "1")
    preprocessing = json.loads(about["preprocessing"])
    assert (preprocessing["size"], preprocessing["colour_order"]) == (64, "RGB")
    assert preprocessing["mean"] == list(agent.package.manifest.mean)
    assert preprocessing["std"] == list(agent.package.manifest.std)
    assert "bicubic, antialiased" in preprocessing["resize"]


def test_a_model_describes_its_inputs_and_outputs(
    install: Callable[..., int], config_file: Path, tmp_path: Path
) -> None:
    install()
    generation(config_file, 1, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", session_options(), providers=["CPUExecutionProvider"]
    )
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == (
        "images", "tensor(uint8)", ["n", 64, 64, 3],
    )  # fmt: skip
    found: dict[str, Any] = {o.name: (o.type, o.shape) for o in session.get_outputs()}
    assert found == {
        "label": ("tensor(int64)", ["n"]),
        "label_name": ("tensor(string)", ["n"]),
        "probabilities": ("tensor(float)", ["n", 3]),
        "adapter": ("tensor(int64)", ["n"]),
        "ood_score": ("tensor(float)", ["n"]),
        "ood_p_value": ("tensor(float)", ["n"]),
        "features": ("tensor(float)", ["n", 576]),
    }


def test_the_score_can_be_left_out(
    install: Callable[..., int], config_file: Path, tmp_path: Path
) -> None:
    install()
    assert generation(config_file, 1, tmp_path / "m.onnx", "--without-score").exit_code == 0
    outputs = {entry.name for entry in onnx.load(tmp_path / "m.onnx").graph.output}
    assert outputs == {"label", "label_name", "probabilities", "adapter", "features"}


def test_a_bundle_is_exported_as_before(make_bundle: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "a.bundle").write_bytes(make_bundle((0, 1), adapter=1))
    result = invoke(
        "--bundle", tmp_path / "a.bundle", "--whole", "--form", "nodes",
        "--out", tmp_path / "model.onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = onnx.load(tmp_path / "model.onnx")
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert np.array(["bottleneck" in entry.value for entry in model.metadata_props]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --bundle or --generation"),
        (["--bundle", "a", "--generation", "1"], "give either --bundle or --generation"),
        (["--generation", "1"], "--generation needs --config"),
        (["--generation", "seven", "--config", "a"], "'seven' is neither a number"),
        (["--generation", "-1", "--config", "a"], "'-1' is neither a number"),
        (["--generation", "1", "--config", "a", "--whole"], "--whole does not go with"),
        (["--generation", "1", "--form", "nodes"], "--form does not go with --generation"),
        (["--bundle", "a", "--without-score"], "--without-score does not go with --bundle"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    result = invoke(*options, "--out", tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_state_is_refused(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no agent's state directory"):
        generation(config_file, 1, tmp_path / "model.onnx")


def test_an_unknown_generation_is_refused(
    install: Callable[..., int], config_file: Path, tmp_path: Path
) -> None:
    install()
    with pytest.raises(GenerationError, match="generation 7 is not on this device; it has 1"):
        generation(config_file, 7, tmp_path / "model.onnx")


def test_a_place_that_cannot_be_written_is_refused(
    install: Callable[..., int], config_file: Path, tmp_path: Path
) -> None:
    install()
    with pytest.raises(EncoderError, match="is a directory"):
        generation(config_file, 1, tmp_path)
    with pytest.raises(EncoderError, match="no directory"):
        generation(config_file, 1, tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(DiskFullError, match="cannot write"):
        generation(config_file, 1, tmp_path / ("m" * 250))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.toml", "state"]
