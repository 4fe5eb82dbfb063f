from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from adapter_store.bundle import Bundle, Manifest, pack
from adapter_store.errors import WrongEncoderError
from exporter.adapter_files import AttachedAdapter
from exporter.cli import encoder, export
from exporter.derived import DERIVED, derived_names
from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
from exporter.vit import VisionTransformer
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise
from tests.exporter.conftest import Array

ABOUT = {"image_size": "16", "heads": "2", "mean": "0.25", "std": "0.5", "name": "from-file"}


@pytest.fixture
def weights(tiny_vit: VisionTransformer, tmp_path: Path) -> Path:
    save_file(tiny_vit.state_dict(), tmp_path / "w.safetensors", metadata=ABOUT)
    return tmp_path / "w.safetensors"


def test_build_takes_what_the_file_says_of_itself_and_options_win(
    weights: Path, tmp_path: Path
) -> None:
    arguments = ["build", "--weights", weights, "--out", tmp_path / "out", "--suffix-blocks", "1"]
    arguments += ["--mean", "0.1,0.2,0.3", "--dtype", "float16", "--families", "bottleneck,prefix"]
    result = CliRunner().invoke(encoder, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    package = EncoderPackage.load(tmp_path / "out")
    assert package.digest in result.stdout
    assert "capturing the prefix" in result.stderr
    assert package.name == "from-file"
    assert package.manifest.mean == (0.1, 0.2, 0.3)
    assert package.manifest.std == (0.5, 0.5, 0.5)
    assert package.manifest.dtype == "float16"
    assert package.families == ("bottleneck", "prefix")
    assert package.sites == ("blocks.2.attn.mix", "blocks.2.mlp")


def test_inspect_prints_what_a_reader_needs(package: EncoderPackage) -> None:
    result = CliRunner().invoke(encoder, ["inspect", str(package.path)])
    assert result.exit_code == 0
    for expected in (package.digest, "16 x 16 RGB", "6 x 32", "blocks.1.mlp", "bottleneck"):
        assert expected in result.stdout


def test_inspect_json_is_the_manifest_and_the_digest(package: EncoderPackage) -> None:
    result = CliRunner().invoke(encoder, ["inspect", str(package.path), "--json"])
    found = json.loads(result.stdout)
    assert found["digest"] == package.digest
    assert found["manifest"]["feature_dim"] == 64


def test_inspect_refuses_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="not an encoder package"):
        CliRunner().invoke(encoder, ["inspect", str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--mean", "red"], "mean is 'red'"), (["--std", "1,2"], "std is '1,2'")],
)
def test_build_refuses_colours_that_are_no_numbers(
    weights: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = ["build", "--weights", str(weights), "--out", str(tmp_path / "out"), *options]
    with pytest.raises(EncoderError, match=message):
        CliRunner().invoke(encoder, arguments, catch_exceptions=False)


def test_build_refuses_what_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"\x80\x04 not tensors")
    arguments = ["build", "--weights", str(tmp_path / "w.pt"), "--out", str(tmp_path / "out")]
    with pytest.raises(EncoderError, match="not a readable safetensors file"):
        CliRunner().invoke(encoder, arguments, catch_exceptions=False)


def test_build_asks_for_the_image_size_when_nothing_says_it(
    tiny_vit: VisionTransformer, tmp_path: Path
) -> None:
    save_file(tiny_vit.state_dict(), tmp_path / "plain.safetensors")
    arguments = ["--weights", str(tmp_path / "plain.safetensors"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(encoder, ["build", *arguments])
    assert result.exit_code == 2
    assert "--image-size is needed" in result.stderr


def bundle_of(sessions: EncoderSessions, encoder_digest: str, tensors: dict[str, Array]) -> bytes:
    rng = np.random.default_rng(0)
    hidden = sessions.prefix(rng.standard_normal((8, 3, 16, 16), dtype=np.float32))
    features = l2_normalise(sessions.suffix(hidden))
    own = l2_normalise(sessions.suffix(hidden, tensors or None))
    labels = ["a", "b"] * 4
    manifest = Manifest(
        encoder=encoder_digest,
        family="bottleneck" if tensors else "frozen",
        rank=4 if tensors else 0,
        sites=sessions.package.sites if tensors else (),
        labels=("a", "b"),
        task="letters",
        created_at=0.0,
        created_by="test",
        samples=8,
        score_quantiles=tuple(float(value) for value in range(101)),
    )
    base = ClassStatistics.fit(features, labels)
    return pack(
        Bundle(
            manifest=manifest,
            tensors=tensors,
            base=base,
            own=ClassStatistics.fit(own, labels) if tensors else base,
            signature=signature(features, seed=encoder_digest),
        )
    )


@pytest.mark.parametrize("adapted", [True, False])
def test_export_writes_a_bundle_as_a_model_that_runs_alone(
    sessions: EncoderSessions, tensors: dict[str, Array], tmp_path: Path, adapted: bool
) -> None:
    package, given = sessions.package, tensors if adapted else {}
    (tmp_path / "a.bundle").write_bytes(bundle_of(sessions, package.digest, given))
    arguments = ["--encoder", package.path, "--bundle", tmp_path / "a.bundle", "--whole"]
    arguments += ["--out", tmp_path / "model.onnx"]
    result = CliRunner().invoke(export, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    images = np.ones((2, 3, 16, 16), np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    expected = sessions.suffix(sessions.prefix(images), given or None)
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=1e-5)


def test_export_says_how_every_form_compares_and_writes_an_adapter_file(
    sessions: EncoderSessions, tensors: dict[str, Array], tmp_path: Path
) -> None:
    package = sessions.package
    (tmp_path / "a.bundle").write_bytes(bundle_of(sessions, package.digest, tensors))
    arguments = ["--encoder", package.path, "--bundle", tmp_path / "a.bundle"]
    arguments += ["--out", tmp_path, "--form", "adapter-file"]
    result = CliRunner().invoke(export, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    for form in ("fed", "attached", "bank", "standalone"):
        assert f"{form}: differs by" in result.stderr
    assert "folded: not possible: the family 'bottleneck' is not linear" in result.stderr
    (path,) = tmp_path.glob("*.onnx_adapter")
    hidden = sessions.prefix(np.ones((2, 3, 16, 16), np.float32))
    found = AttachedAdapter(sessions, "bottleneck", path).run(hidden)
    np.testing.assert_array_equal(found, sessions.suffix(hidden, tensors))


def test_export_refuses_to_fold_what_is_not_linear(
    sessions: EncoderSessions, tensors: dict[str, Array], tmp_path: Path
) -> None:
    package = sessions.package
    (tmp_path / "a.bundle").write_bytes(bundle_of(sessions, package.digest, tensors))
    arguments = ["--encoder", package.path, "--bundle", tmp_path / "a.bundle"]
    arguments += ["--out", tmp_path / "model.onnx", "--form", "folded"]
    with pytest.raises(EncoderError, match="'bottleneck' is not linear"):
        CliRunner().invoke(export, [str(part) for part in arguments], catch_exceptions=False)
    assert not (tmp_path / "model.onnx").exists()


def test_derive_completes_an_older_package(package: EncoderPackage, tmp_path: Path) -> None:
    older = EncoderPackage.load(Path(shutil.copytree(package.path, tmp_path / "older")))
    (older.path / DERIVED).unlink()
    result = CliRunner().invoke(encoder, ["derive", str(older.path)])
    assert result.exit_code == 0, result.output
    assert derived_names(older) == derived_names(package) != ()
    assert all(name in result.stdout for name in derived_names(package))


def test_export_refuses_a_bundle_for_another_encoder(
    sessions: EncoderSessions, tensors: dict[str, Array], tmp_path: Path
) -> None:
    (tmp_path / "a.bundle").write_bytes(bundle_of(sessions, "0" * 64, tensors))
    arguments = ["--encoder", sessions.package.path, "--bundle", tmp_path / "a.bundle"]
    arguments += ["--out", tmp_path / "model.onnx"]
    with pytest.raises(WrongEncoderError):
        CliRunner().invoke(export, [str(part) for part in arguments], catch_exceptions=False)
    assert not (tmp_path / "model.onnx").exists()
