"""Every family on a tiny transformer and, where it fits, on a tiny convolutional network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.build import build_encoder
from exporter.errors import EncoderError
from exporter.families import adapter_family, family_names, truncate
from exporter.package import EncoderPackage, Site
from exporter.parity import parity
from exporter.programs import load_training_program
from exporter.sessions import EncoderSessions
from exporter.vit import VisionTransformer
from tests.exporter.conftest import CONVOLUTIONAL, Array, Maps, cnn, fresh, moved

CASES = [("vit", name) for name in family_names()] + [("cnn", name) for name in CONVOLUTIONAL]
RANK = 3


@pytest.mark.parametrize(("network", "name"), CASES)
def test_fresh_and_absent_tensors_are_the_bare_encoder(
    encoders: dict[str, EncoderSessions], images: Array, network: str, name: str
) -> None:
    sessions = encoders[network]
    hidden = sessions.prefix(images)
    bare = sessions.suffix(hidden, family="bottleneck")
    absent = sessions.suffix(hidden, family=name)
    given = sessions.suffix(hidden, fresh(sessions.package, name, RANK), name)
    np.testing.assert_allclose(absent, bare, atol=1e-6)
    np.testing.assert_allclose(given, bare, atol=1e-6)


@pytest.mark.parametrize(("network", "name"), CASES)
def test_torch_the_runtime_and_the_standalone_graph_agree_at_any_rank(
    encoders: dict[str, EncoderSessions], images: Array, network: str, name: str
) -> None:
    sessions = encoders[network]
    package, hidden = sessions.package, sessions.prefix(images)
    bare = sessions.suffix(hidden, family=name)
    for rank in (1, RANK):
        tensors = moved(package, name, rank)
        assert parity(package, name, tensors, hidden, tolerance=1e-5).largest <= 1e-5
        assert np.abs(sessions.suffix(hidden, tensors, name) - bare).max() > 1e-3
    if adapter_family(name).ranked:
        cut = truncate(adapter_family(name), tensors, 2)
        assert np.isfinite(sessions.suffix(hidden, cut, name)).all()


@pytest.mark.parametrize(("network", "name"), CASES)
def test_gradients_reach_every_tensor_of_every_site(
    encoders: dict[str, EncoderSessions], images: Array, network: str, name: str
) -> None:
    sessions = encoders[network]
    program = load_training_program(sessions.package, name)
    hidden = torch.tensor(sessions.prefix(images))
    tensors = {
        key: torch.tensor(value, requires_grad=True)
        for key, value in moved(sessions.package, name, RANK).items()
    }
    features = program(hidden, tensors)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (features * weights).sum().backward()
    for key, value in tensors.items():
        assert value.grad is not None, key
        assert float(value.grad.abs().max()) > 1e-5, key


@pytest.mark.parametrize("name", family_names())
def test_computing_the_class_token_alone_changes_no_family(
    encoders: dict[str, EncoderSessions], tiny_vit: VisionTransformer, images: Array, name: str
) -> None:
    """The suffix's last block computes one row; the whole encoder, adapted, computes all."""
    sessions = encoders["vit"]
    package, family = sessions.package, adapter_family(name)
    tensors = moved(package, name, RANK)
    hooks = []
    for at, site in package.manifest.sites.items():
        start = f"{at}/"
        params = {
            k.removeprefix(start): torch.tensor(v)
            for k, v in tensors.items()
            if k.startswith(start)
        }
        if not params:
            continue

        def adapt(
            _: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            params: dict[str, Tensor] = params,
            site: Site = site,
        ) -> Tensor:
            return family.apply(inputs[0], output, params, site)

        hooks.append(tiny_vit.get_submodule(at).register_forward_hook(adapt))
    try:
        with torch.no_grad():
            whole = tiny_vit(torch.tensor(images)).numpy()
    finally:
        for hook in hooks:
            hook.remove()
    found = sessions.suffix(sessions.prefix(images), tensors, name)[:, : package.network_dim]
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_package_holds_the_sites_of_its_families_only(
    encoders: dict[str, EncoderSessions], package: EncoderPackage
) -> None:
    assert package.sites == ("blocks.1.mlp", "blocks.2.mlp")
    assert len(encoders["vit"].package.sites) == 20


@pytest.mark.parametrize("name", ["prefix", "ia3"])
def test_a_network_without_attention_is_refused_to_families_that_need_it(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(EncoderError, match=f"{name}.*attaches to sites of kind"):
        cnn(tmp_path / "cnn", (name,))


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(8, channel_axis=1, kind="attention"), "does not take query, key and value"),
        (Site(8, channel_axis=1, kind="query", out_dim=9), r"expected \[2, 9, 4, 4\]"),
        (Site(8, channel_axis=1, kind="query", heads=3), "3 heads for 8 channels"),
    ],
)
def test_a_site_that_is_not_of_its_kind_is_refused(
    tmp_path: Path, site: Site, message: str
) -> None:
    family = "prefix" if site.kind == "attention" else "lora"
    with pytest.raises(EncoderError, match=message):
        build_encoder(
            nn.Conv2d(3, 8, 4, stride=4),
            Maps(),
            sites={"one": site},
            image_size=16,
            name="cnn",
            out=tmp_path / "cnn",
            families=(family,),
        )
