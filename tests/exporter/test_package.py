from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import EncoderError
from exporter.package import (
    MANIFEST,
    PREFIX_KEY,
    SUFFIX_KEY,
    WEIGHTS,
    EncoderPackage,
    default_encoder_package,
)

FILES = [WEIGHTS, "prefix.onnx", "suffix-bottleneck.onnx", "suffix-bottleneck.pt2.gz"]


@pytest.fixture
def copied(package: EncoderPackage, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.path, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_copy_is_the_same_encoder(package: EncoderPackage, copied: Path) -> None:
    loaded = EncoderPackage.load(copied)
    assert loaded.digest == package.digest
    assert loaded.manifest == package.manifest


def test_the_digest_does_not_depend_on_how_the_manifest_is_spaced(
    package: EncoderPackage, copied: Path
) -> None:
    edit(copied)
    assert EncoderPackage.load(copied).digest == package.digest


def test_the_digest_covers_what_the_manifest_says(package: EncoderPackage, copied: Path) -> None:
    edit(copied, mean=[0.1, 0.2, 0.3])
    assert EncoderPackage.load(copied).digest != package.digest


def test_the_interface_says_what_a_bundle_must_fit(package: EncoderPackage) -> None:
    interface = package.interface()
    assert interface.digest == package.digest
    assert interface.feature_dim == 64
    assert interface.sites == ("blocks.1.mlp", "blocks.2.mlp")
    shapes = interface.families["bottleneck"]
    assert shapes["blocks.2.mlp/down.weight"] == ("rank", 32)
    assert shapes["blocks.2.mlp/up.weight"] == (32, "rank")
    assert len(shapes) == 8


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_by_the_file_s_name(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(EncoderError, match=name):
        EncoderPackage.load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_refused_by_its_name(copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    with pytest.raises(EncoderError, match=name):
        EncoderPackage.load(copied)
    (copied / name).unlink()
    with pytest.raises(EncoderError, match=name):
        EncoderPackage.load(copied)


def test_a_file_damaged_after_loading_is_refused(copied: Path) -> None:
    loaded = EncoderPackage.load(copied)
    (copied / WEIGHTS).write_bytes(b"x" * loaded.manifest.files[WEIGHTS].size)
    with pytest.raises(EncoderError, match=WEIGHTS):
        loaded.weights(PREFIX_KEY)


def test_another_format_is_refused_with_both_numbers(copied: Path) -> None:
    edit(copied, format=99, something_new=1)
    with pytest.raises(EncoderError, match=r"format 99.*reads 1"):
        EncoderPackage.load(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0, 1, 1]}, "standard deviation"),
        ({"feature_dim": 0}, "size"),
        ({"rows_per_run": 0}, "size"),
        ({"quantised": {"method": "int8"}}, "original"),
        ({"files": {}}, "does not list"),
        ({"files": {"../secret": {"sha256": "", "size": 0}}}, "secret"),
        ({"families": {}}, "family"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    copied: Path, changes: dict[str, object], message: str
) -> None:
    edit(copied, **changes)
    with pytest.raises(EncoderError, match=message):
        EncoderPackage.load(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b'{"format":"one"}'])
def test_a_foreign_manifest_is_refused(copied: Path, content: bytes) -> None:
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(EncoderError, match="not an encoder manifest"):
        EncoderPackage.load(copied)


def test_a_directory_without_a_manifest_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="not an encoder package"):
        EncoderPackage.load(tmp_path)


def test_weights_are_stored_once_and_read_as_float32(package: EncoderPackage) -> None:
    prefix, suffix = package.weights(PREFIX_KEY), package.weights(SUFFIX_KEY)
    assert "prefix.pos_embed" in prefix
    assert "suffix.norm.weight" in suffix
    assert {value.dtype for value in (*prefix.values(), *suffix.values())} == {np.dtype("float32")}
    stored = sum(value.nbytes for value in (*prefix.values(), *suffix.values()))
    others = sum(package.manifest.files[name].size for name in FILES[1:])
    assert stored <= package.manifest.files[WEIGHTS].size < stored + 8192
    assert others < 100_000


def test_an_unknown_family_is_refused(package: EncoderPackage) -> None:
    with pytest.raises(EncoderError, match=r"'lora'.*bottleneck"):
        package.family("lora")


def test_the_shipped_encoder_is_whole_and_within_eight_megabytes() -> None:
    shipped = default_encoder_package()
    assert shipped.image_size == 64
    assert len(shipped.sites) == 3
    assert sum(path.stat().st_size for path in shipped.path.iterdir()) <= 8 << 20


def test_the_shipped_encoder_is_unpacked_from_an_installation_that_is_an_archive(
    package: EncoderPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        for path in package.path.iterdir():
            archive.write(path, f"exporter/data/default_encoder/{path.name}")
    inside = zipfile.Path(tmp_path / "site.zip", "exporter/")
    monkeypatch.setattr("exporter.package.files", lambda _: inside)
    assert default_encoder_package(tmp_path / "cache").digest == package.digest
    with pytest.raises(EncoderError, match="give a cache directory"):
        default_encoder_package()


def test_the_shipped_encoder_runs_without_torch_and_onnx() -> None:
    script = """
import sys
import numpy as np
from exporter.package import default_encoder_package
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions
sessions = EncoderSessions(default_encoder_package())
pixels = prepare(np.full((2, 8, 8, 3), 200, np.uint8), sessions.package)
features = sessions.suffix(sessions.prefix(pixels))
assert features.shape == (2, sessions.package.feature_dim)
assert np.isfinite(features).all()
assert not {"torch", "onnx", "onnxscript"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
