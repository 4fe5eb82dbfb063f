"""Encoders whose base features are the prefix's alone: what they are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from exporter.architectures import build_known, build_mobilenet
from exporter.build import build_encoder, build_vit
from exporter.errors import EncoderError
from exporter.mobilenet import mobilenet_from_state_dict
from exporter.package import MANIFEST, EncoderPackage
from exporter.parity import parity
from exporter.sessions import EncoderSessions
from exporter.vit import VisionTransformer
from ood.statistics import l2_normalise
from tests.exporter.conftest import Array, adapter
from tests.exporter.test_mobilenet import SIZE, random_images, random_state


@pytest.fixture(scope="module")
def alone(tiny_vit: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> EncoderPackage:
    return build_vit(
        tiny_vit.state_dict(),
        image_size=16,
        suffix_blocks=1,
        heads=2,
        name="alone",
        out=tmp_path_factory.mktemp("encoder") / "alone",
        base_features="prefix",
    )


def test_base_features_are_what_the_first_blocks_give(
    tiny_vit: VisionTransformer, alone: EncoderPackage, images: Array
) -> None:
    sessions = EncoderSessions(alone)
    features = sessions.base_features(sessions.prefix(images))
    with torch.no_grad():
        first, second, _ = (state.numpy() for state in tiny_vit.hidden_states(torch.tensor(images)))
    wanted = [first[:, 1:].mean(axis=1), second[:, 1:].mean(axis=1), second[:, 0]]
    expected = np.concatenate([l2_normalise(part) for part in wanted], axis=1) / np.sqrt(3)
    assert alone.manifest.feature_parts == (32, 32, 32)
    assert (alone.feature_dim, alone.network_dim, alone.suffix_dim) == (96, 32, 32)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_the_suffix_gives_the_networks_own_output_alone(
    tiny_vit: VisionTransformer, alone: EncoderPackage, images: Array
) -> None:
    sessions = EncoderSessions(alone)
    with torch.no_grad():
        expected = tiny_vit(torch.tensor(images)).numpy()
    np.testing.assert_allclose(sessions.suffix(sessions.prefix(images)), expected, atol=1e-4)


def test_adapters_run_in_every_form(alone: EncoderPackage, images: Array) -> None:
    hidden = EncoderSessions(alone).prefix(images)
    report = parity(alone, "bottleneck", adapter(alone, 4), hidden)
    assert {"fed", "attached", "bank", "standalone"} <= set(report.forms)
    assert all(form.decisions_changed == 0 for form in report.forms.values())


def test_a_samples_base_features_do_not_depend_on_its_neighbours(
    alone: EncoderPackage, images: Array
) -> None:
    sessions = EncoderSessions(alone)
    hidden = sessions.prefix(images)
    single = [sessions.base_features(hidden[row : row + 1]) for row in range(len(hidden))]
    assert np.array_equal(np.concatenate(single), sessions.base_features(hidden))


def test_without_it_base_features_are_the_suffixs(sessions: EncoderSessions, hidden: Array) -> None:
    assert not sessions.package.base_from_prefix
    assert np.array_equal(sessions.base_features(hidden), l2_normalise(sessions.suffix(hidden)))


def test_hidden_values_of_another_shape_are_refused(alone: EncoderPackage) -> None:
    with pytest.raises(EncoderError, match="hidden are float32"):
        EncoderSessions(alone).base_features(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (None, "within the 16 values of its output"),
        ((17,), "within the 16 values of its output"),
        ((8,), r"have length .*, expected 1; end the prefix with"),
    ],
)
def test_parts_that_the_prefix_does_not_give_at_length_one_are_refused(
    tmp_path: Path, parts: tuple[int, ...] | None, problem: str
) -> None:
    prefix = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16))
    suffix = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.raises(EncoderError, match=problem):
        build_encoder(
            prefix,
            suffix,
            sites={"0": 16},
            image_size=8,
            name="toy",
            out=tmp_path / "toy",
            feature_parts=parts,
            base_features="prefix",
        )


def test_a_prefix_without_blocks_has_no_base_features(
    tiny_vit: VisionTransformer, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="3 of 3 blocks in the suffix"):
        build_vit(
            tiny_vit.state_dict(),
            image_size=16,
            suffix_blocks=3,
            heads=2,
            name="none",
            out=tmp_path / "none",
            base_features="prefix",
        )


@pytest.mark.parametrize(("suffix_blocks", "alone"), [(1, True), (2, False)])
def test_where_nobody_says_a_transformer_with_a_deep_prefix_takes_it_alone(
    tiny_vit: VisionTransformer, tmp_path: Path, suffix_blocks: int, alone: bool
) -> None:
    package = build_known(
        tiny_vit.state_dict(),
        image_size=16,
        suffix_blocks=suffix_blocks,
        heads=2,
        name="some",
        out=tmp_path / "some",
    )
    assert package.base_from_prefix == alone


def test_where_nobody_says_a_mobilenet_takes_all_of_itself(tmp_path: Path) -> None:
    net = mobilenet_from_state_dict(random_state(), SIZE)
    package = build_known(
        net.state_dict(), image_size=SIZE, suffix_blocks=4, name="m", out=tmp_path / "m"
    )
    assert not package.base_from_prefix


def test_a_mobilenets_base_features_are_its_taps(tmp_path: Path) -> None:
    net = mobilenet_from_state_dict(random_state(), SIZE)
    package = build_mobilenet(
        net.state_dict(),
        image_size=SIZE,
        suffix_blocks=4,
        name="m",
        out=tmp_path / "m",
        base_features="prefix",
    )
    sessions = EncoderSessions(package)
    images = random_images().numpy()
    hidden = sessions.prefix(images)
    features = sessions.base_features(hidden)
    starts = np.cumsum([0, *package.manifest.feature_parts[:-1]])
    squares = np.add.reduceat(features.astype(np.float64) ** 2, starts, axis=1)
    np.testing.assert_allclose(squares, 1 / len(starts), atol=1e-5)
    with torch.no_grad():
        expected = net(torch.tensor(images)).numpy()
    np.testing.assert_allclose(sessions.suffix(hidden), expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"network_dim": 0}, {"feature_dim": 999, "feature_parts": (999,)}]
)
def test_a_manifest_that_contradicts_itself_is_refused(
    alone: EncoderPackage, tmp_path: Path, changes: dict[str, object]
) -> None:
    for file in alone.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = msgspec.structs.replace(alone.manifest, **changes)
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(EncoderError, match="cannot end with"):
        EncoderPackage.load(tmp_path)
