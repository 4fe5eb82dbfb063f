"""Tiny encoder packages with random weights, built once, and adapters that change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from exporter.build import build_encoder, build_vit
from exporter.families import adapter_family, family_names, initial_tensors
from exporter.package import EncoderPackage, Site
from exporter.sessions import EncoderSessions
from exporter.vit import VisionTransformer

Array = npt.NDArray[np.float32]

CONVOLUTIONAL = ("bitfit", "bottleneck", "compacter", "hydra", "lora", "sparse", "ssf")


@pytest.fixture(scope="session")
def tiny_vit() -> VisionTransformer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=16, patch=8, dim=32, depth=3, heads=2, hidden=48).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


@pytest.fixture(scope="session")
def package(
    tiny_vit: VisionTransformer, tmp_path_factory: pytest.TempPathFactory
) -> EncoderPackage:
    return build_vit(
        tiny_vit.state_dict(),
        image_size=16,
        suffix_blocks=2,
        heads=2,
        name="tiny",
        out=tmp_path_factory.mktemp("encoder") / "tiny",
    )


@pytest.fixture(scope="session")
def sessions(package: EncoderPackage) -> EncoderSessions:
    return EncoderSessions(package)


@pytest.fixture(scope="session")
def images() -> Array:
    return np.random.default_rng(0).standard_normal((6, 3, 16, 16), dtype=np.float32)


@pytest.fixture(scope="session")
def hidden(sessions: EncoderSessions, images: Array) -> Array:
    return sessions.prefix(images)


def adapter(package: EncoderPackage, rank: int) -> dict[str, Array]:
    """An adapter whose every tensor is away from zero."""
    rng = np.random.default_rng(rank)
    sites = package.manifest.sites
    fresh = initial_tensors(adapter_family("bottleneck"), sites, rank, seed=rank)
    return {
        name: value + rng.normal(scale=0.3, size=value.shape).astype(np.float32)
        for name, value in fresh.items()
    }


@pytest.fixture(scope="session")
def tensors(package: EncoderPackage) -> dict[str, Array]:
    return adapter(package, 4)


class Maps(nn.Module):
    """Two convolutions between feature maps, pooled at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.one(hidden).relu()
        features: Tensor = (hidden + self.two(hidden)).mean(dim=(2, 3))
        return features


def cnn(out: Path, families: tuple[str, ...]) -> EncoderPackage:
    torch.manual_seed(0)
    sites = {name: Site(8, channel_axis=1) for name in ("one", "two")}
    prefix = nn.Conv2d(3, 8, 4, stride=4)
    return build_encoder(
        prefix, Maps(), sites=sites, image_size=16, name="cnn", out=out, families=families
    )


@pytest.fixture(scope="session")
def encoders(
    tiny_vit: VisionTransformer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EncoderSessions]:
    """A transformer with every family, and a convolutional network with those that fit it."""
    folder = tmp_path_factory.mktemp("families")
    vit = build_vit(
        tiny_vit.state_dict(),
        image_size=16,
        suffix_blocks=2,
        heads=2,
        name="vit",
        out=folder / "vit",
        families=family_names(),
    )
    packages = {"vit": vit, "cnn": cnn(folder / "cnn", CONVOLUTIONAL)}
    return {name: EncoderSessions(package) for name, package in packages.items()}


def fresh(package: EncoderPackage, name: str, rank: int) -> dict[str, Array]:
    return initial_tensors(adapter_family(name), package.manifest.sites, rank, seed=rank)


def moved(package: EncoderPackage, name: str, rank: int) -> dict[str, Array]:
    rng = np.random.default_rng(rank)
    return {
        tensor: value + rng.normal(scale=0.2, size=value.shape).astype(np.float32)
        for tensor, value in fresh(package, name, rank).items()
    }
