"""Merging bundles: what is measured before it is saved, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from adapter_store.bundle import bundle_digest, pack, unpack
from adapter_store.errors import DiskFullError, WrongEncoderError
from edge_agent import importance
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


def test_fisher_merging_weighs_every_number_by_itself(folder: Path) -> None:
    run(folder, "--method", "fisher")
    found = unpack((folder / "out.bundle").read_bytes()).tensors
    one, two = (unpack((folder / f"{name}.bundle").read_bytes()).tensors for name in "ab")
    shares = []
    for name, value in found.items():
        apart = np.abs(two[name] - one[name]) > 0.1
        shares.append(((value - one[name])[apart] / (two[name] - one[name])[apart]).ravel())
    second = np.concatenate(shares)
    assert second.min() >= -0.1  # the codec rounds
    assert second.max() <= 1.1
    assert np.mean(second < 0.3) > 0.1
    assert np.mean(second > 0.7) > 0.1


def test_fisher_information_is_of_each_bundle_s_samples_that_are_not_held_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(_: Any, family: str, change: Any, hidden: Any, likely: Any) -> Any:
        seen.append((family, len(hidden)))
        return {name: np.ones_like(value) for name, value in change.items()}

    monkeypatch.setattr(importance, "diagonal_fisher", recorded)
    run(folder, "--method", "fisher")
    equal = unpack((folder / "out.bundle").read_bytes()).tensors
    assert seen == [("bottleneck", 14), ("bottleneck", 14)]
    monkeypatch.setattr(importance, "_MOST_SAMPLES", 5)
    run(folder, "--method", "fisher")
    assert seen[2:] == [("bottleneck", 5), ("bottleneck", 5)]
    run(folder, "--method", "average")
    average = unpack((folder / "out.bundle").read_bytes()).tensors
    assert all(np.array_equal(equal[name], average[name]) for name in average)


def test_only_fisher_merging_needs_torch_and_says_so_before_anything_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "edge_agent.importance")
    assert "'torch', which is not installed; install driftkeel[train]" in run(
        folder, "--method", "fisher"
    )
    assert not (folder / "out.bundle").exists()
    run(folder, "--method", "average")
    assert (folder / "out.bundle").exists()


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
