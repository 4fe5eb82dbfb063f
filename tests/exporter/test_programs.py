from __future__ import annotations

import gzip
import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from exporter.programs import load_training_program, reference_features
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, adapter


@pytest.mark.parametrize("rank", [1, 4, 33])
def test_the_program_computes_what_onnx_runtime_computes(
    package: EncoderPackage, sessions: EncoderSessions, hidden: Array, rank: int
) -> None:
    given = adapter(package, rank)
    expected = sessions.suffix(hidden, given)
    found = reference_features(package, "bottleneck", hidden, given)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_adapter_tensor_and_nothing_else(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    program = load_training_program(package, "bottleneck")
    given = {name: torch.tensor(value, requires_grad=True) for name, value in tensors.items()}
    program(torch.tensor(hidden), given)[:, 0].mean().backward()
    for name, value in given.items():
        assert value.grad is not None, name
        assert float(value.grad.abs().sum()) > 0, name
    assert [p for p in program.parameters() if p.requires_grad] == []


def test_a_step_along_the_gradient_lowers_the_loss_in_onnx_runtime(
    package: EncoderPackage,
    sessions: EncoderSessions,
    hidden: Array,
    tensors: dict[str, Array],
) -> None:
    program = load_training_program(package, "bottleneck")
    given = {name: torch.tensor(value, requires_grad=True) for name, value in tensors.items()}
    before = program(torch.tensor(hidden), given)[:, 0].mean()
    before.backward()
    stepped = {
        name: (value - 0.01 * value.grad).detach().numpy()
        for name, value in given.items()
        if value.grad is not None
    }
    assert float(sessions.suffix(hidden, stepped)[:, 0].mean()) < before.item()


def test_the_batch_is_dynamic_down_to_one(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    one = reference_features(package, "bottleneck", hidden[:1], tensors)
    all_of_them = reference_features(package, "bottleneck", hidden, tensors)
    np.testing.assert_allclose(one, all_of_them[:1], atol=1e-5)


def test_a_missing_or_unknown_tensor_is_refused(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    program = load_training_program(package, "bottleneck")
    given = {name: torch.tensor(value) for name, value in tensors.items()}
    name = min(given)
    with pytest.raises(EncoderError, match="'other' is unknown"):
        program(torch.tensor(hidden), {**given, "other": given[name]})
    del given[name]
    with pytest.raises(EncoderError, match="is missing"):
        program(torch.tensor(hidden), given)


def test_the_saved_program_has_no_weights_no_pickle_and_no_path(package: EncoderPackage) -> None:
    raw = gzip.decompress(package.read("suffix-bottleneck.pt2.gz"))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    weights = [data for name, data in contents.items() if "/weight_" in name]
    assert weights
    assert not any(any(data) for data in weights)
    assert not any(data for name, data in contents.items() if name.endswith(".pt"))
    for data in (*contents.values(), package.read("prefix.onnx")):
        assert b".py" not in data


def test_the_program_loads_without_the_model_s_source_and_without_onnx(
    package: EncoderPackage,
) -> None:
    script = f"""
import sys
sys.modules["exporter.vit"] = None
sys.modules["exporter.build"] = None
sys.modules["onnx"] = None
from pathlib import Path
from exporter.package import EncoderPackage
from exporter.programs import load_training_program
program = load_training_program(EncoderPackage.load(Path({str(package.path)!r})), "bottleneck")
assert len(program.tensors) == 8
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
