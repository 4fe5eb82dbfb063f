from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.build import build_encoder, build_vit
from exporter.errors import EncoderError
from exporter.families import adapter_family, initial_tensors
from exporter.package import PREFIX_KEY, EncoderPackage, Site
from exporter.programs import reference_features
from exporter.sessions import EncoderSessions
from exporter.vit import VisionTransformer


class Maps(nn.Module):
    """A convolutional suffix: its sites have channels on axis 1, its norm has integer state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, hidden: Tensor) -> Tensor:
        features: Tensor = self.pool(self.mix(hidden)).flatten(1)
        return features


def test_a_convolutional_network_takes_adapters_on_its_channels(tmp_path: Path) -> None:
    torch.manual_seed(1)
    prefix, suffix = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU()), Maps()
    suffix.mix[1].running_mean.normal_()
    package = build_encoder(
        prefix,
        suffix,
        sites={"mix": Site(6, channel_axis=1)},
        image_size=8,
        name="maps",
        out=tmp_path / "maps",
        mean=(0.1, 0.2, 0.3),
        dtype="float16",
    )
    assert package.hidden_shape == (6, 2, 2)
    assert (tmp_path / "maps" / "weights.safetensors").stat().st_size < 3000
    sessions = EncoderSessions(package)
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)
    hidden = sessions.prefix(images)
    with torch.no_grad():
        expected = suffix.eval()(prefix(torch.tensor(images))).numpy()
    np.testing.assert_allclose(sessions.suffix(hidden), expected, atol=2e-3)
    tensors = initial_tensors(adapter_family("bottleneck"), {"mix": 6}, 2, seed=0)
    tensors["mix/up.weight"] += 1
    adapted = sessions.suffix(hidden, tensors)
    assert np.abs(adapted - sessions.suffix(hidden)).max() > 1e-3
    reference = reference_features(package, "bottleneck", hidden, tensors)
    np.testing.assert_allclose(adapted, reference, atol=1e-5)


def test_what_was_built_from_is_left_as_it_was(
    tiny_vit: VisionTransformer, package: EncoderPackage
) -> None:
    weights = package.weights(PREFIX_KEY)
    assert tiny_vit.pos_embed.abs().sum().item() > 0
    assert np.array_equal(weights["prefix.pos_embed"], tiny_vit.pos_embed.detach().numpy())


def linear(*, n_in: int = 3 * 8 * 8, out: int = 16) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, out))


def suffix(*, n_in: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_in), nn.GELU(), nn.Linear(n_in, 4))


def nan(*, at: str) -> nn.Module:
    module = linear() if at == "prefix" else suffix()
    nn.init.constant_(module[1 if at == "prefix" else 0].weight, float("nan"))
    return module


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(16, 16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        features: Tensor = self.bilinear(hidden, hidden)
        return features


@pytest.mark.parametrize(
    ("first", "second", "sites", "message"),
    [
        (linear(), suffix(), {}, "no site was given"),
        (linear(), suffix(), {"7": 16}, "site '7' is no module"),
        (linear(), nn.Sequential(nn.Module(), suffix()), {"0.2": 16}, r"similar are 1\.2"),
        (linear(), suffix(), {"0": 17}, "has 16 channels on axis -1.*expected 17"),
        (linear(), suffix(), {"2": 16}, r"maps shape \[2, 16\] to \[2, 4\]"),
        (linear(), suffix(), {"0": Site(16, channel_axis=5)}, "no axis 5"),
        (linear(), TwoInputs(), {"bilinear": 16}, "exactly one tensor"),
        (
            linear(out=15),
            suffix(),
            {"0": 16},
            r"suffix cannot run on the prefix's output \[2, 15\]",
        ),
        (linear(n_in=9), suffix(), {"0": 16}, r"prefix cannot run on images \[2, 3, 8, 8\]"),
        (
            linear(),
            nn.Sequential(suffix(), nn.Unflatten(1, (2, 2))),
            {"0.0": 16},
            r"features \[n, d\]",
        ),
        (linear(), nn.Sequential(suffix(), nn.Flatten(0)), {"0.0": 16}, "batch first"),
        (nan(at="prefix"), suffix(), {"0": 16}, "prefix returns NaN"),
        (linear(), nan(at="suffix"), {"0": 16}, "suffix returns NaN"),
        (Pair(), suffix(), {"0": 16}, "prefix returns tuple"),
    ],
)
def test_halves_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path,
    first: nn.Module,
    second: nn.Module,
    sites: Mapping[str, int | Site],
    message: str,
) -> None:
    with pytest.raises(EncoderError, match=message):
        build_encoder(first, second, sites=sites, image_size=8, name="x", out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_is_never_run_is_refused(tmp_path: Path) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 4), nn.Linear(16, 16)

        def forward(self, hidden: Tensor) -> Tensor:
            features: Tensor = self.used(hidden)
            return features

    with pytest.raises(EncoderError, match="'unused' is never run"):
        build_encoder(
            linear(), Skips(), sites={"unused": 16}, image_size=8, name="x", out=tmp_path / "x"
        )


def test_a_network_that_cannot_be_captured_is_refused(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, images: Tensor) -> Tensor:
            hidden: Tensor = self.inner(images)
            return hidden * 2 if float(hidden.sum()) > 0 else hidden

    with pytest.raises(EncoderError, match="the prefix cannot be captured"):
        build_encoder(
            Branches(), suffix(), sites={"0": 16}, image_size=8, name="x", out=tmp_path / "x"
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    large = linear()
    nn.init.constant_(large[1].bias, 1e6)
    with pytest.raises(EncoderError, match="prefix returns NaN or infinite"):
        build_encoder(
            large,
            suffix(),
            sites={"0": 16},
            image_size=8,
            name="x",
            out=tmp_path / "x",
            dtype="float16",
        )


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(EncoderError, match="exists"):
        build_encoder(linear(), suffix(), sites={"0": 16}, image_size=8, name="x", out=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(("key", "value"), [("mean", (0.5,)), ("std", (1.0, 0.0, 1.0))])
def test_colours_that_are_not_usable_are_refused(
    tmp_path: Path, key: str, value: tuple[float, ...]
) -> None:
    with pytest.raises(EncoderError, match=key):
        build_encoder(
            linear(),
            suffix(),
            sites={"0": 16},
            image_size=8,
            name="x",
            out=tmp_path / "x",
            **{key: value},
        )


def test_a_state_dict_that_is_no_vit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="missing"):
        build_vit({}, image_size=16, suffix_blocks=1, name="x", out=tmp_path / "x")
