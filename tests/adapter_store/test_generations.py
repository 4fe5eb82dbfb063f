"""A power cut or a failing disk at any instant leaves the old or the new generation, whole."""

import errno
import shutil

import numpy as np
import pytest

from adapter_store.blobs import BlobStore
from adapter_store.errors import DiskFullError, GenerationError, StoreError
from adapter_store.generation import GenerationManifest
from adapter_store.generations import GenerationStore

CALIBRATION = np.arange(12, dtype=np.float16).reshape(4, 3)


@pytest.fixture
def blobs(tmp_path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def store(tmp_path, blobs) -> GenerationStore:
    return GenerationStore(tmp_path, blobs, keep=3)


def make(store, blobs, name, *, parent=None):
    manifest = GenerationManifest(
        number=0,
        encoder="e" * 64,
        bundles=sorted([blobs.put(name.encode()), blobs.put(b"shared")], reverse=True),
        parent=parent,
        reason=name,
        created_at=1.0,
        router={"max_rounds": 4},
        metrics={"accuracy": 0.5},
    )
    return store.create(manifest, CALIBRATION)


def reopened(tmp_path) -> GenerationStore:
    return GenerationStore(tmp_path, BlobStore(tmp_path / "blobs"), keep=3)


def test_a_created_generation_reads_back_and_does_not_run(tmp_path, store, blobs) -> None:
    made = make(store, blobs, "one")
    again = reopened(tmp_path).get(1)
    assert (made.number, again.manifest, again.digest) == (1, made.manifest, made.digest)
    assert again.manifest.bundles == sorted(again.manifest.bundles)
    assert np.array_equal(again.calibration_features(), CALIBRATION)
    assert again.calibration_features().dtype == np.float16
    assert {again.bundle_bytes(d) for d in again.manifest.bundles} == {b"one", b"shared"}
    assert store.current() is None


def test_an_alignment_is_part_of_its_generation_and_of_no_other(tmp_path, store, blobs) -> None:
    plain = make(store, blobs, "one")
    arrays = {"gain": np.arange(3, dtype=np.float32), "known_mean": np.ones(3, np.float32)}
    made = store.create(plain.manifest, CALIBRATION, arrays)
    again = reopened(tmp_path).get(made.number)
    assert (plain.manifest.aligned, again.manifest.aligned) == (False, True)
    assert plain.alignment() == {}
    assert again.alignment().keys() == arrays.keys()
    assert all(np.array_equal(again.alignment()[name], array) for name, array in arrays.items())
    assert np.array_equal(again.calibration_features(), CALIBRATION)
    path = again.path / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(GenerationError, match="damaged"):
        again.alignment()


def test_activation_survives_a_restart_and_rolling_back_is_activating_an_older_one(
    tmp_path, store, blobs
) -> None:
    make(store, blobs, "one")
    make(store, blobs, "two", parent=1)
    for number in (1, 2, 1, 2):
        store.activate(number)
        assert store.current().number == number
        again = reopened(tmp_path)
        assert again.current().number == number
        assert again.recovered is None


def test_a_generation_that_is_not_there_cannot_be_activated(store, blobs) -> None:
    make(store, blobs, "one")
    store.activate(1)
    with pytest.raises(GenerationError, match="generation 7 is not on this device; it has 1"):
        store.activate(7)
    assert store.current().number == 1


def test_a_generation_that_is_not_whole_cannot_be_activated(store, blobs) -> None:
    make(store, blobs, "one")
    store.activate(1)
    second = make(store, blobs, "two")
    blobs.delete(next(d for d in second.manifest.bundles if blobs.get(d) == b"two"))
    with pytest.raises(StoreError, match="not on this disk"):
        store.activate(2)
    assert store.current().number == 1


def test_a_generation_needs_its_bundles_and_finite_calibration(store, blobs) -> None:
    manifest = GenerationManifest(
        number=0, encoder="e" * 64, bundles=["a" * 64], parent=None, reason="", created_at=0.0
    )
    with pytest.raises(StoreError, match="not on this disk"):
        store.create(manifest, CALIBRATION)
    fine = GenerationManifest(
        number=0, encoder="e" * 64, bundles=[], parent=None, reason="", created_at=0.0
    )
    for bad in (CALIBRATION * np.float16(np.nan), CALIBRATION[:0], CALIBRATION[0]):
        with pytest.raises(GenerationError, match="expected finite"):
            store.create(fine, bad)
    assert store.list() == []


@pytest.mark.parametrize("file", ["manifest.json", "calibration.safetensors", "manifest.sha256"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_current_generation_falls_back_and_says_so(
    tmp_path, store, blobs, file, how
) -> None:
    for name in ("one", "two", "three"):
        make(store, blobs, name)
    for number in (1, 3):
        store.activate(number)
    damaged = tmp_path / "generations" / "000003" / file
    data = damaged.read_bytes()
    if how == "remove":
        damaged.unlink()
    else:
        damaged.write_bytes(
            data[: len(data) // 2] if how == "truncate" else bytes([data[0] ^ 1]) + data[1:]
        )
    again = reopened(tmp_path)
    # Two is newer and whole, but it never ran here: one did.
    assert again.current().number == 1
    assert "generation 3" in again.recovered
    assert "generation 1 is used instead" in again.recovered
    assert reopened(tmp_path).recovered is None
    assert make(again, blobs, "four").number == 4


def test_an_unreadable_pointer_falls_back_to_the_newest_whole_generation(
    tmp_path, store, blobs
) -> None:
    for name in ("one", "two"):
        make(store, blobs, name)
    store.activate(1)
    (tmp_path / "current").write_bytes(b"\x00\xff")
    again = reopened(tmp_path)
    assert again.current().number == 2
    assert "unreadable" in again.recovered


def test_a_device_with_no_whole_generation_says_so(tmp_path, store, blobs) -> None:
    make(store, blobs, "one")
    store.activate(1)
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(GenerationError, match="no other generation"):
        reopened(tmp_path)


def test_half_written_generations_and_pointers_are_removed_at_the_next_start(
    tmp_path, store, blobs
) -> None:
    make(store, blobs, "one")
    store.activate(1)
    shutil.copytree(tmp_path / "generations/000001", tmp_path / "generations/.new-000002")
    (tmp_path / "generations/.new-000002/manifest.json").write_bytes(b"{")
    (tmp_path / ".current.1.2.tmp").write_bytes(b"2")
    again = reopened(tmp_path)
    assert [g.number for g in again.list()] == [1]
    assert not (tmp_path / "generations/.new-000002").exists()
    assert not (tmp_path / ".current.1.2.tmp").exists()
    assert again.recovered is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_creating_leaves_nothing(
    tmp_path, store, disk, contents, code
) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    make(store, blobs, "one")
    store.activate(1)
    blobs.put(b"two")
    before = contents(tmp_path)
    for step in range(1, 40):
        with disk.failing(step, code):
            try:
                make(store, blobs, "two")
            except DiskFullError:
                after = contents(tmp_path)
                # Only the last sync may fail with the generation in place, whole.
                assert after == before or store.get(2).check() is None
        if not disk.failed:
            break
        shutil.rmtree(tmp_path / "generations/000002", ignore_errors=True)
    assert step > 8
    assert reopened(tmp_path).current().number == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_activating_keeps_the_old_one(
    tmp_path, store, blobs, disk, code
) -> None:
    make(store, blobs, "one")
    make(store, blobs, "two")
    store.activate(1)
    for step in range(1, 20):
        with disk.failing(step, code):
            try:
                store.activate(2)
            except DiskFullError:
                assert store.current().number == 1
                assert reopened(tmp_path).current().number == 1
        if not disk.failed:
            break
    assert step > 3
    assert store.current().number == 2
    assert not list(tmp_path.glob(".current*"))


def test_pruning_keeps_the_active_its_parent_the_newest_and_the_protected(store, blobs) -> None:
    for number in range(1, 10):
        make(store, blobs, f"bundle {number}", parent=number - 1 or None)
    store.activate(3)
    candidate = blobs.put(b"on trial")
    stray = blobs.put(b"of no use")
    store.prune(protect={5}, protect_blobs={candidate})
    assert [g.number for g in store.list()] == [2, 3, 5, 7, 8, 9]
    for generation in store.list():
        generation.check()
    assert blobs.has(candidate)
    assert not blobs.has(stray)
    assert len(list(blobs)) == 6 + 1 + 1


def test_numbers_are_never_used_twice(tmp_path, blobs) -> None:
    store = GenerationStore(tmp_path, blobs, keep=0)
    for name in ("one", "two", "three"):
        make(store, blobs, name)
    store.activate(1)
    store.prune()
    assert [g.number for g in store.list()] == [1, 3]
    assert make(reopened(tmp_path), blobs, "four").number == 4


def test_a_power_cut_while_pruning_leaves_no_half_generation(tmp_path, store, blobs) -> None:
    for name in ("one", "two"):
        make(store, blobs, name)
    store.activate(2)
    (tmp_path / "generations/000001").rename(tmp_path / "generations/.new-000001")
    (tmp_path / "generations/.new-000001/manifest.json").unlink()
    again = reopened(tmp_path)
    assert [g.number for g in again.list()] == [2]
    assert not (tmp_path / "generations/.new-000001").exists()


def test_the_previous_generation_is_the_parent_or_else_the_next_older_one(store, blobs) -> None:
    make(store, blobs, "one")
    make(store, blobs, "two", parent=1)
    make(store, blobs, "three", parent=1)
    make(store, blobs, "four")
    assert store.previous_of(3).number == 1
    assert store.previous_of(4).number == 3
    assert store.previous_of(1) is None
    with pytest.raises(GenerationError, match="generation 9"):
        store.previous_of(9)


def test_a_bundle_of_another_generation_is_not_handed_out(store, blobs) -> None:
    made = make(store, blobs, "one")
    with pytest.raises(GenerationError, match="is not in generation 1"):
        made.bundle_bytes(blobs.put(b"other"))
