"""Blobs are there whole or not at all, and a failing disk changes nothing."""

import contextlib
import errno
import hashlib

import pytest

from adapter_store.blobs import BlobStore, write_durably
from adapter_store.errors import CorruptBundleError, DiskFullError, StoreError


def test_a_blob_is_named_by_its_content(tmp_path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    digest = blobs.put(b"hello")
    assert digest == hashlib.sha256(b"hello").hexdigest()
    assert blobs.has(digest)
    assert blobs.get(digest) == b"hello"
    assert list(blobs) == [digest]


def test_keeping_the_same_bytes_again_writes_nothing(tmp_path) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"hello")
    before = blobs.path(digest).stat().st_ino
    assert blobs.put(b"hello") == digest
    assert blobs.path(digest).stat().st_ino == before


def test_a_damaged_blob_is_refused_and_can_be_put_again(tmp_path) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"hello")
    blobs.path(digest).write_bytes(b"hellO")
    with pytest.raises(CorruptBundleError, match="damaged on disk"):
        blobs.get(digest)
    blobs.put(b"hello")
    assert blobs.get(digest) == b"hello"


def test_a_missing_blob_is_named(tmp_path) -> None:
    with pytest.raises(StoreError, match="aaaaaaaaaaaa is not on this disk"):
        BlobStore(tmp_path).get("a" * 64)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_nothing_but_a_digest_becomes_a_path(tmp_path, name) -> None:
    blobs = BlobStore(tmp_path)
    for use in (blobs.get, blobs.has, blobs.delete, blobs.path):
        with pytest.raises(StoreError, match="is no SHA-256 digest"):
            use(name)


def test_deleting_twice_is_fine(tmp_path) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"hello")
    blobs.delete(digest)
    blobs.delete(digest)
    assert not blobs.has(digest)


def test_what_a_power_cut_left_is_removed_at_the_next_start(tmp_path) -> None:
    digest = BlobStore(tmp_path).put(b"hello")
    leftover = tmp_path / digest[:2] / f".{digest}.1.2.tmp"
    leftover.write_bytes(b"hel")
    assert list(BlobStore(tmp_path)) == [digest]
    assert not leftover.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_step_keeps_the_old_file_whole(
    tmp_path, disk, contents, code
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    for step in range(1, 20):
        with disk.failing(step, code), contextlib.suppress(DiskFullError):
            write_durably(path, b"new")
        assert contents(tmp_path) in ({"file": b"old"}, {"file": b"new"})
        if not disk.failed:
            break
        write_durably(path, b"old")
    assert step > 3
    assert contents(tmp_path) == {"file": b"new"}


def test_a_blob_that_could_not_be_written_leaves_nothing(tmp_path, disk, contents) -> None:
    blobs = BlobStore(tmp_path)
    for step in range(1, 20):
        with disk.failing(step):
            try:
                digest = blobs.put(b"hello")
            except DiskFullError:
                assert set(contents(tmp_path).values()) <= {b"hello"}
        if not disk.failed:
            break
    assert step > 4
    assert blobs.get(digest) == b"hello"


def test_a_store_that_is_only_read_leaves_alone_what_another_process_is_writing(tmp_path) -> None:
    root = tmp_path / "blobs"
    digest = BlobStore(root).put(b"here")
    under_way = root / digest[:2] / f".{digest}.1.1.tmp"
    under_way.write_bytes(b"half")
    assert BlobStore(root, recover=False).get(digest) == b"here"
    assert under_way.exists()
    BlobStore(root)
    assert not under_way.exists()
