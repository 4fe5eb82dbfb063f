from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adapter_store.bundle import check_compatible, unpack
from adapter_store.errors import WrongEncoderError
from exporter.attach import attach
from exporter.build import build_encoder
from exporter.derive import derive
from exporter.errors import EncoderError
from exporter.package import (
    PREFIX_GRAPH,
    QUANTISED_KEY,
    SUFFIX_KEY,
    EncoderPackage,
    Site,
    default_encoder_package,
)
from exporter.parity import parity
from exporter.programs import reference_features
from exporter.quantise import quantise, relative_difference
from exporter.quantise_methods import METHODS
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, adapter, moved
from tests.exporter.test_attach import run
from tests.exporter.test_cli import bundle_of

INTEGERS = (np.dtype("int8"), np.dtype("uint8"))


@pytest.fixture(scope="module", params=["int8", "int8-static", "int4"])
def quantised(
    request: pytest.FixtureRequest,
    package: EncoderPackage,
    images: Array,
    tmp_path_factory: pytest.TempPathFactory,
) -> EncoderPackage:
    out = tmp_path_factory.mktemp("quantised") / "tiny"
    return quantise(package, out, method=request.param, images=images)


class Filters(nn.Module):
    """A convolution for each channel and one that mixes them, as mobile networks have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.each = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(nn.functional.relu6(self.each(maps)))
        return mixed


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> EncoderPackage:
    torch.manual_seed(0)
    return build_encoder(
        nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU6(), Filters(8)),
        nn.Sequential(Filters(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        sites={"0": Site(8, channel_axis=1)},
        image_size=16,
        name="cnn",
        out=tmp_path_factory.mktemp("encoder") / "cnn",
    )


def test_a_quantised_encoder_is_another_one_and_says_which_it_came_from(
    package: EncoderPackage, quantised: EncoderPackage
) -> None:
    made = quantised.manifest.quantised
    assert made is not None
    assert made.original == package.digest != quantised.digest
    assert quantised.name == f"tiny-{made.method}"
    assert 0 < made.difference < 0.5
    assert quantised.manifest.sites == package.manifest.sites
    assert quantised.interface().families == package.interface().families


def test_the_manifests_new_fields_leave_other_digests_as_they_were(
    package: EncoderPackage,
) -> None:
    text = (package.path / "manifest.json").read_text()
    assert "quantised" not in text
    assert "rows_per_run" not in text
    # The shipped package was built before the fields were there.
    assert default_encoder_package().digest.startswith("44c54f14")


def test_products_with_constant_weights_become_integers_and_are_handed_over_as_such(
    package: EncoderPackage, quantised: EncoderPackage
) -> None:
    for graph in quantised.manifest.graphs:
        weights = quantised.graph_weights(graph)
        integers = [v for k, v in weights.items() if k.startswith(QUANTISED_KEY)]
        assert any(value.dtype in INTEGERS and value.ndim >= 2 for value in integers)
        matrices = [v for v in weights.values() if v.ndim == 2 and v.dtype == np.float32]
        assert not any(min(value.shape) > 16 for value in matrices)
        assert len(quantised.read(graph)) < 100_000
    sizes = [
        sum(v.nbytes for v in encoder.graph_weights(PREFIX_GRAPH).values())
        for encoder in (quantised, package)
    ]
    # The patch embedding, a convolution, is half of this small network.
    assert sizes[0] < 0.7 * sizes[1]


def test_the_features_stay_near_the_originals(
    sessions: EncoderSessions, quantised: EncoderPackage, images: Array, tensors: dict[str, Array]
) -> None:
    found = EncoderSessions(quantised)
    hidden = sessions.prefix(images)
    for given in (None, tensors):
        original = sessions.suffix(hidden, given)
        features = found.suffix(found.prefix(images), given)
        assert relative_difference(features, original) < 0.4
        assert not np.array_equal(features, original)


def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(
    quantised: EncoderPackage, images: Array
) -> None:
    """A neighbour of large values would widen the scale of activations for all."""
    found = EncoderSessions(quantised)
    loud = np.concatenate([images[:2], 50 * images[2:3], images[3:]])
    for given in (None, adapter(quantised, 4)):
        together = found.suffix(found.prefix(loud), given)
        for row, features in zip(loud, together, strict=True):
            alone = found.suffix(found.prefix(row[None]), given)
            assert np.array_equal(alone[0], features)


@pytest.mark.parametrize("rank", [1, 16])
def test_adapters_of_any_rank_keep_their_own_precision(
    quantised: EncoderPackage, images: Array, rank: int
) -> None:
    found = EncoderSessions(quantised)
    hidden = found.prefix(images)
    given = adapter(quantised, rank)
    # A change far below one step of int8 arrives: the tensors were not rounded.
    nudged = {name: value * np.float32(1 + 1e-5) for name, value in given.items()}
    assert not np.array_equal(found.suffix(hidden, given), found.suffix(hidden, nudged))
    neutral = {k: v if "down" in k else np.zeros_like(v) for k, v in given.items()}
    assert np.array_equal(found.suffix(hidden, neutral), found.suffix(hidden))


def test_training_has_the_originals_suffix(
    package: EncoderPackage, quantised: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    expected = reference_features(package, "bottleneck", hidden, tensors)
    found = reference_features(quantised, "bottleneck", hidden, tensors)
    assert np.array_equal(found, expected)
    assert quantised.weights(SUFFIX_KEY).keys() == package.weights(SUFFIX_KEY).keys()


def test_a_bundle_of_the_original_is_refused(
    sessions: EncoderSessions, quantised: EncoderPackage, tensors: dict[str, Array]
) -> None:
    """Its class statistics are of other numbers."""
    bundle = unpack(bundle_of(sessions, sessions.package.digest, tensors))
    check_compatible(bundle, sessions.package.interface())
    with pytest.raises(WrongEncoderError):
        check_compatible(bundle, quantised.interface())
    own = unpack(bundle_of(EncoderSessions(quantised), quantised.digest, tensors))
    check_compatible(own, quantised.interface())


def test_exports_of_it_agree_with_what_it_serves(
    quantised: EncoderPackage, images: Array, tensors: dict[str, Array], tmp_path: Path
) -> None:
    found = EncoderSessions(quantised)
    hidden = found.prefix(images)
    assert parity(quantised, "bottleneck", tensors, hidden).largest < 1e-4
    path = attach(quantised, tensors, tmp_path / "whole.onnx", whole=True)
    expected = found.suffix(hidden[:1], tensors)
    np.testing.assert_allclose(run(path, images=images[:1]), expected, atol=1e-5)


def test_it_is_neither_folded_into_nor_banked(quantised: EncoderPackage) -> None:
    with pytest.raises(EncoderError, match="is quantised: its adapters can only be fed"):
        derive(quantised, pytest.fail)


def test_the_same_images_make_the_same_encoder(
    package: EncoderPackage, quantised: EncoderPackage, images: Array, tmp_path: Path
) -> None:
    assert quantised.manifest.quantised is not None
    method = quantised.manifest.quantised.method
    again = quantise(package, tmp_path / "again", method=method, images=images)
    assert again.digest == quantised.digest


def test_half_precision_serves_with_adapters_in_single(
    package: EncoderPackage,
    sessions: EncoderSessions,
    images: Array,
    tensors: dict[str, Array],
    tmp_path: Path,
) -> None:
    found = EncoderSessions(quantise(package, tmp_path / "half", method="float16"))
    expected = sessions.suffix(sessions.prefix(images), tensors)
    features = found.suffix(found.prefix(images), tensors)
    assert features.dtype == np.float32
    assert relative_difference(features, expected) < 0.01


def test_a_float16_suffix_that_scatters_runs_here_and_in_a_file_of_its_own(
    encoders: dict[str, EncoderSessions], images: Array, tmp_path: Path
) -> None:
    """No CPU provider adds up entries in float16, and a file needs its nodes in order."""
    whole = encoders["vit"]
    half = quantise(whole.package, tmp_path / "half", method="float16")
    tensors = moved(half, "sparse", 3)
    hidden = EncoderSessions(half).prefix(images)
    report = parity(half, "sparse", tensors, hidden, forms=("fed", "standalone"), tolerance=0.01)
    assert not report.left_out
    found = EncoderSessions(half).suffix(hidden, tensors, "sparse")
    assert relative_difference(found, whole.suffix(hidden, tensors, "sparse")) < 0.01


def test_convolutions_become_integers_but_for_the_first(
    cnn: EncoderPackage, images: Array, tmp_path: Path
) -> None:
    made = quantise(cnn, tmp_path / "cnn", method="int8-static", images=images)
    stem = made.graph_weights(PREFIX_GRAPH)["prefix.0.weight"]
    assert stem.dtype == np.float32
    before, after = EncoderSessions(cnn), EncoderSessions(made)
    given = adapter(cnn, 2)
    for tensors in (None, given):
        original = before.suffix(before.prefix(images), tensors)
        features = after.suffix(after.prefix(images), tensors)
        assert 0 < relative_difference(features, original) < 0.1


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"method": "int3"}, "no method 'int3'"),
    ({"method": "int8-static"}, "give images"),
    ({"images": np.empty((0, 3, 16, 16), np.float32)}, "no image"),
    ({"images": np.zeros((1, 3, 8, 8), np.float32)}, "images are"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    package: EncoderPackage, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    call: Callable[..., object] = quantise
    with pytest.raises(EncoderError, match=message):
        call(package, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_network_of_convolutions_is_told_which_method_it_needs(
    cnn: EncoderPackage, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="convolutions need int8-static"):
        quantise(cnn, tmp_path / "out")


def test_a_quantised_encoder_is_not_quantised_again(
    quantised: EncoderPackage, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match="quantised already"):
        quantise(quantised, tmp_path / "out")


def test_an_encoder_that_would_be_another_one_is_refused(
    package: EncoderPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.quantise._LARGEST_DIFFERENCE", 1e-6)
    with pytest.raises(EncoderError, match="use another method"):
        quantise(package, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantising_leaves_the_processs_logging_alone(
    package: EncoderPackage, tmp_path: Path
) -> None:
    """A module of ONNX Runtime's sets it up on import."""
    code = (
        "import logging, sys; from pathlib import Path\n"
        "from exporter.package import EncoderPackage; from exporter.quantise import quantise\n"
        "quantise(EncoderPackage.load(Path(sys.argv[1])), Path(sys.argv[2]), method='int4')\n"
        "assert not logging.getLogger().handlers"
    )
    command = [sys.executable, "-c", code, str(package.path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_offers_every_method() -> None:
    from exporter.quantise_cli import quantise_command  # noqa: PLC0415

    option = next(entry for entry in quantise_command.params if entry.name == "method")
    assert list(option.type.to_info_dict()["choices"]) == list(METHODS)
