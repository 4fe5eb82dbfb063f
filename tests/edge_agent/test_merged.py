"""Merging bundles: what is measured before it is saved, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from adapter_store.bundle import bundle_digest, pack, unpack
from adapter_store.errors import DiskFullError, WrongEncoderError
from edge_agent.errors import TrainingDataError
from edge_agent.merge_cli import METHODS, merge
from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from tests.edge_agent.conftest import MakeBundle, striped

FIRST, SECOND = (0, 1), (1, 4)


@pytest.fixture
def folder(tmp_path: Path, make_bundle: MakeBundle) -> Path:
    """Two bundles that share a class, and samples of each."""
    for name, classes, seed in (("a", FIRST, 1), ("b", SECOND, 2)):
        (tmp_path / f"{name}.bundle").write_bytes(make_bundle(classes, adapter=seed))
        images, labels = striped(classes, 10, seed=seed + 10)
        np.savez(tmp_path / f"{name}.npz", x=images, y=np.array(labels))
    return tmp_path


def run(folder: Path, *options: str, names: str = "ab", data: str = "ab") -> str:
    arguments = [str(folder / f"{name}.bundle") for name in names]
    for name in data:
        arguments += ["--data", str(folder / f"{name}.npz")]
    arguments += ["--out", str(folder / "out.bundle"), *options]
    result = CliRunner().invoke(merge, arguments, catch_exceptions=False)
    return result.output


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_bundle_that_knows_both_tasks(folder: Path, method: str) -> None:
    options = ["--weight", "1", "--weight", "2"] if method == "weighted" else []
    output = run(folder, "--method", method, *options)
    data = (folder / "out.bundle").read_bytes()
    made = unpack(data)
    parents = [bundle_digest((folder / f"{name}.bundle").read_bytes()) for name in "ab"]
    assert made.manifest.labels == ("stripes-0", "stripes-1", "stripes-4")
    assert made.manifest.parents == tuple(sorted(parents))
    assert made.manifest.rank == (8 if method == "side-by-side" else 4)
    assert made.manifest.samples == sum(made.base.counts) == 96
    assert made.manifest.metrics["held_out_samples"] == 12
    assert bundle_digest(data) in output


def test_the_report_tells_the_adapter_s_part_from_the_statistics(folder: Path) -> None:
    output = run(folder)
    for word in ("no adapter", "all installed", "merge's statistics", "the rank holds 100.0 %"):
        assert word in output
    # Stripes are easy for the statistics, so a random adapter cannot hide behind a bad base.
    rows = [line for line in output.splitlines() if "│ test" in line]
    assert len(rows) == 2
    assert all("100.0" in row for row in rows)


def test_the_same_merge_gives_the_same_adapter(folder: Path) -> None:
    run(folder, "--method", "dare", "--seed", "7")
    first = unpack((folder / "out.bundle").read_bytes())
    run(folder, "--method", "dare", "--seed", "7")
    again = unpack((folder / "out.bundle").read_bytes())
    assert all(np.array_equal(first.tensors[name], again.tensors[name]) for name in first.tensors)


def test_a_bundle_of_another_encoder_is_refused(folder: Path) -> None:
    bundle = unpack((folder / "b.bundle").read_bytes())
    manifest = msgspec.structs.replace(bundle.manifest, encoder="0" * 64)
    (folder / "b.bundle").write_bytes(
        pack(type(bundle)(manifest, bundle.tensors, bundle.base, bundle.own, bundle.signature))
    )
    with pytest.raises(WrongEncoderError, match="bundle is for encoder 000000000000"):
        run(folder)
    assert not (folder / "out.bundle").exists()


def test_a_bundle_without_an_adapter_is_refused_by_its_task(
    folder: Path, make_bundle: MakeBundle
) -> None:
    (folder / "b.bundle").write_bytes(make_bundle(SECOND))
    with pytest.raises(EncoderError, match="'test' has no adapter to merge"):
        run(folder)


def test_samples_that_are_not_the_bundle_s_are_refused_by_their_class(folder: Path) -> None:
    with pytest.raises(TrainingDataError, match="its samples have no class 'stripes-0'"):
        run(folder, data="ba")


def test_every_bundle_needs_its_samples_and_one_is_not_enough(folder: Path) -> None:
    assert "2 bundles need as many --data; found 1" in run(folder, data="a")
    with pytest.raises(TrainingDataError, match="at least two bundles"):
        run(folder, names="a", data="a")


def test_files_that_cannot_be_read_or_written_are_named(folder: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"cannot read .*c\.bundle"):
        run(folder, names="ac")
    with pytest.raises(DiskFullError, match="cannot write"):
        run(folder, "--out", str(folder / "missing" / "out.bundle"))


def test_families_that_differ_are_refused_by_name(
    folder: Path, package: EncoderPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = unpack((folder / "b.bundle").read_bytes())
    manifest = msgspec.structs.replace(bundle.manifest, family="lora")
    other = type(bundle)(manifest, bundle.tensors, bundle.base, bundle.own, bundle.signature)
    (folder / "b.bundle").write_bytes(pack(other))
    interface = package.interface()
    both = msgspec.structs.replace(
        interface, families={**interface.families, "lora": interface.families["bottleneck"]}
    )
    monkeypatch.setattr(EncoderPackage, "interface", lambda _: both)
    with pytest.raises(EncoderError, match="'test' is of the family 'lora', the first of 'bottle"):
        run(folder)
