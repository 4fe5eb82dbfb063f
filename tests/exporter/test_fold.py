"""An adapter in the encoder's weights is the adapter, and costs no node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from exporter.build import build_encoder
from exporter.derived import BARE_GRAPH, read_derived
from exporter.errors import EncoderError, ParityError
from exporter.families.affine import Affine
from exporter.fold import Folder, folded_weights
from exporter.graphs import filled
from exporter.package import Site
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, moved

FOLDS = [("vit", name) for name in ("bitfit", "ia3", "lora", "sparse", "ssf")]
FOLDS += [("cnn", name) for name in ("bitfit", "hydra", "lora", "sparse", "ssf")]


@pytest.mark.parametrize(("network", "family"), FOLDS)
def test_a_folded_suffix_computes_what_the_fed_adapter_does(
    encoders: dict[str, EncoderSessions], images: Array, network: str, family: str
) -> None:
    sessions = encoders[network]
    hidden = sessions.prefix(images)
    tensors = moved(sessions.package, family, 3)
    found = Folder(sessions).fold(family, tensors).run(hidden)
    np.testing.assert_allclose(found, sessions.suffix(hidden, tensors, family), atol=2e-5)
    assert np.abs(found - sessions.suffix(hidden)).max() > 1e-3


@pytest.mark.parametrize("family", ["lora", "sparse", "ssf"])
def test_the_folded_graph_is_the_bare_graph_with_other_numbers(
    encoders: dict[str, EncoderSessions], family: str
) -> None:
    package = encoders["vit"].package
    graph = read_derived(package, BARE_GRAPH)
    weights = package.named_weights(graph.weights)
    folded = folded_weights(package, family, moved(package, family, 1), weights)
    proto = onnx.load_model_from_string(graph.data)
    bare, changed = (filled(proto, numbers, {}) for numbers in (weights, folded))
    assert list(bare.graph.node) == list(changed.graph.node)
    assert {t.name: list(t.dims) for t in bare.graph.initializer} == {
        t.name: list(t.dims) for t in changed.graph.initializer
    }
    touched = [name for name in weights if folded[name] is not weights[name]]
    assert "suffix.blocks.1.attn.qkv.weight" in touched
    assert "suffix.norm.weight" not in touched


def test_folding_leaves_the_base_weights_for_the_next_adapter(
    encoders: dict[str, EncoderSessions], images: Array
) -> None:
    sessions = encoders["vit"]
    hidden, folder = sessions.prefix(images), Folder(sessions)
    first, second = (moved(sessions.package, "lora", rank) for rank in (2, 5))
    folder.fold("lora", first)
    found = folder.fold("lora", second).run(hidden)
    np.testing.assert_allclose(found, sessions.suffix(hidden, second, "lora"), atol=2e-5)


@pytest.mark.parametrize("family", ["bottleneck", "compacter", "prefix"])
def test_families_that_are_not_linear_are_refused_by_name(
    encoders: dict[str, EncoderSessions], family: str
) -> None:
    sessions = encoders["vit"]
    with pytest.raises(EncoderError, match=f"'{family}' is not linear"):
        Folder(sessions).fold(family, moved(sessions.package, family, 2))


def test_a_branch_around_a_perceptron_is_refused_by_its_site(
    encoders: dict[str, EncoderSessions],
) -> None:
    sessions = encoders["vit"]
    with pytest.raises(EncoderError, match=r"'hydra'.*'blocks\.1\.mlp'.*no linear map"):
        Folder(sessions).fold("hydra", moved(sessions.package, "hydra", 2))


def test_tensors_of_another_encoder_are_refused(encoders: dict[str, EncoderSessions]) -> None:
    tensors = moved(encoders["vit"].package, "lora", 2)
    with pytest.raises(EncoderError, match="none of 'lora'"):
        Folder(encoders["cnn"]).fold("lora", tensors)


class Rectified(nn.Module):
    """A module whose own weight is not the last thing it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight.T)


def small(suffix: nn.Module, out: Path) -> EncoderSessions:
    prefix = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    package = build_encoder(
        prefix, suffix, sites={"0": Site(6)}, image_size=8, name="own", out=out, families=("lora",)
    )
    return EncoderSessions(package)


def test_a_weight_that_is_not_what_its_name_says_is_found_out(tmp_path: Path) -> None:
    sessions = small(nn.Sequential(Rectified(), nn.Linear(6, 4)), tmp_path / "own")
    with pytest.raises(ParityError, match="folding 'lora' into 'own' changes features by"):
        Folder(sessions).fold("lora", moved(sessions.package, "lora", 2))


def test_a_module_whose_weights_are_not_known_is_refused_by_its_site(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    sessions = small(nn.Sequential(inner, nn.Linear(6, 4)), tmp_path / "own")
    with pytest.raises(EncoderError, match="site '0' of 'own': it is not known which weights"):
        Folder(sessions).fold("lora", moved(sessions.package, "lora", 2))


def test_a_shift_needs_a_bias_and_mixing_needs_a_matrix() -> None:
    gains = Affine(np.ones(3), None, of_input=False)
    with pytest.raises(EncoderError, match="no bias"):
        gains.shifted(np.ones(3))
    with pytest.raises(EncoderError, match="cannot mix"):
        gains.mixed(np.eye(3))
    with pytest.raises(EncoderError, match="no linear map"):
        gains.plus(np.eye(3))


def test_folding_needs_neither_torch_nor_onnx(encoders: dict[str, EncoderSessions]) -> None:
    package = encoders["cnn"].package
    code = f"""
import sys
from pathlib import Path
import numpy as np
from exporter.fold import Folder
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
package = EncoderPackage.load(Path({str(package.path)!r}))
tensors = {{name: np.full([2 if a == "rank" else a for a in shape], 0.1, np.float32)
           for name, shape in package.family("lora").tensors.items()}}
Folder(EncoderSessions(package)).fold("lora", tensors)
print(sorted({{"torch", "onnx"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
