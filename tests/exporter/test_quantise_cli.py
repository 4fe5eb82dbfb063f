from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.cli import encoder
from exporter.errors import EncoderError, PreprocessError
from exporter.package import EncoderPackage


def invoke(*arguments: object) -> str:
    words = ["quantise", *(str(part) for part in arguments)]
    result = CliRunner().invoke(encoder, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def folder_of_images(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / name)
    return path


def test_it_says_what_it_made_and_inspect_says_what_it_is(
    package: EncoderPackage, tmp_path: Path
) -> None:
    images = folder_of_images(tmp_path / "images")
    out = tmp_path / "out"
    told = invoke(package.path, "--out", out, "--method", "int8-static", "--images", images)
    made = EncoderPackage.load(out)
    assert made.digest in told
    assert f"from        {package.digest}" in told
    shown = CliRunner().invoke(encoder, ["inspect", str(out)]).stdout
    assert f"int8-static, from {package.digest}" in shown


def test_an_array_serves_as_images_and_the_name_is_taken(
    package: EncoderPackage, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    invoke(
        package.path,
        *("--out", tmp_path / "out", "--images", tmp_path / "images.npy", "--name", "small"),
    )
    assert EncoderPackage.load(tmp_path / "out").name == "small"


def test_images_that_are_none_are_refused_by_name(package: EncoderPackage, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match="holds no image"):
        invoke(package.path, "--out", tmp_path / "out", "--images", tmp_path / "empty")
    with pytest.raises(EncoderError, match="cannot read"):
        invoke(package.path, "--out", tmp_path / "out", "--images", tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(PreprocessError, match=r"notes.txt: .* no image"):
        invoke(package.path, "--out", tmp_path / "out", "--images", tmp_path / "notes.txt")
    assert not (tmp_path / "out").exists()
