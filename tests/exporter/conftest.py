"""A tiny encoder package with random weights, built once, and an adapter that changes it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from exporter.build import build_vit
from exporter.families import adapter_family, initial_tensors
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
from exporter.vit import VisionTransformer

Array = npt.NDArray[np.float32]


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
