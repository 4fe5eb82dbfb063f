"""A transfer ends with the whole bundle whatever the link does to it, or says why not."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store import wire
from adapter_store.errors import (
    CorruptBundleError,
    DiskFullError,
    StoreError,
    TransferError,
    WireError,
)
from adapter_store.partial import Download, PartialFile, sweep
from adapter_store.transfer import MAX_TRANSFER_BYTES, Receiver, Sender

DATA = random.Random(0).randbytes(1000)
DIGEST = hashlib.sha256(DATA).hexdigest()


def receiver(size: int = len(DATA), **options: object) -> Receiver:
    return Receiver(
        DIGEST, size, rng=random.Random(1), **{"chunk_bytes": 64, "window": 4, **options}
    )


def sender() -> Sender:
    return Sender({DIGEST: DATA}.__getitem__)


def chunk(get: wire.Get) -> wire.Chunk:
    answer = sender().answer(get)
    assert isinstance(answer, wire.Chunk)
    return answer


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, len(DATA)),
    chunk_bytes=st.integers(1, 300),
    window=st.integers(1, 9),
    loss=st.floats(0, 0.6),
)
def test_loss_duplication_and_reordering_only_delay(
    seed: int, size: int, chunk_bytes: int, window: int, loss: float
) -> None:
    rng = random.Random(seed)
    data = DATA[:size]
    digest = hashlib.sha256(data).hexdigest()
    answers = Sender({digest: data}.__getitem__)
    side = Receiver(
        digest,
        size,
        rng=rng,
        chunk_bytes=chunk_bytes,
        window=window,
    )
    kept = bytearray(size)
    pending: list[tuple[float, wire.Chunk]] = []
    now = 0.0
    while not side.complete:
        asked = side.requests(now)
        assert len(asked) <= window
        for get in asked:
            for _ in range(rng.choice([1, 1, 2])):
                answer = answers.answer(get)
                assert isinstance(answer, wire.Chunk)
                if rng.random() >= loss:
                    pending.append((now + rng.uniform(0, 5), answer))
        again_at = side.next_at()
        assert again_at is not None
        assert again_at > now
        pending.sort(key=lambda item: item[0])
        if pending and pending[0][0] <= again_at:
            now, arrived = pending.pop(0)
            piece = side.accept(arrived, now)
            if piece is not None:
                kept[arrived.offset : arrived.offset + len(piece)] = piece
        else:
            now = again_at
    assert bytes(kept) == data
    assert not side.failed
    assert side.received_bytes == size
    assert side.requests(now) == []
    assert side.next_at() is None


@given(st.integers(1, len(DATA)), st.integers(1, 300), st.integers(1, 9))
def test_a_good_link_is_asked_for_every_byte_once(size: int, chunk_bytes: int, window: int) -> None:
    side = receiver(size, chunk_bytes=chunk_bytes, window=window)
    asked: list[wire.Get] = []
    while not side.complete:
        gets = side.requests(0.0)
        assert 1 <= len(gets) <= window
        asked += gets
        for get in gets:
            piece = DATA[get.offset : get.offset + get.length]
            message = wire.Chunk(digest=DIGEST, offset=get.offset, size_bytes=size, data=piece)
            assert side.accept(message, 0.0) == piece
    covered = [offset for get in asked for offset in range(get.offset, get.offset + get.length)]
    assert covered == list(range(size))


def test_the_window_limits_what_is_under_way() -> None:
    side = receiver(window=3)
    assert len(side.requests(0.0)) == 3
    assert side.requests(0.1) == []


def test_silence_is_met_with_growing_patience_and_a_smaller_window() -> None:
    side = receiver(window=4, timeout_s=2.0)
    waits, counts, now = [], [len(side.requests(0.0))], 0.0
    for _ in range(40):
        at = side.next_at()
        assert at is not None
        waits.append(at - now)
        now = at
        counts.append(len(side.requests(now)))
    assert counts[0] == 4
    assert counts[-1] == 1
    assert waits[0] >= 2.0
    assert 60.0 <= waits[-1] <= 75.0


def test_after_silence_however_long_the_transfer_goes_on() -> None:
    side = receiver()
    for hour in range(100):
        side.requests(3600.0 * hour)
    while not side.complete:
        for get in side.requests(3600.0 * 100):
            side.accept(chunk(get), 3600.0 * 100)
    assert not side.failed


def test_a_new_connection_asks_again_at_once() -> None:
    side = receiver()
    first = side.requests(0.0)
    assert side.requests(0.1) == []
    side.reconnected()
    assert [g.offset for g in side.requests(0.1)] == [g.offset for g in first]


def test_missing_ends_it() -> None:
    side = receiver()
    (get, *_) = side.requests(0.0)
    side.missing(wire.Missing(digest="f" * 64, reason="another bundle"))
    assert not side.failed
    side.missing(wire.Missing(digest=DIGEST, reason="quarantined"))
    assert side.failed == "quarantined"
    assert side.requests(100.0) == []
    assert side.accept(chunk(get), 100.0) is None


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "f" * 64},
        {"size_bytes": len(DATA) + 1},
        {"offset": 1},
        {"offset": len(DATA)},
        {"data": b"short"},
        {"data": DATA[:65]},
    ],
)
def test_a_chunk_that_does_not_fit_is_passed_over(change: dict[str, object]) -> None:
    fields = {"digest": DIGEST, "offset": 0, "size_bytes": len(DATA), "data": DATA[:64]}
    side = receiver()
    side.requests(0.0)
    assert side.accept(wire.Chunk(**{**fields, **change}), 0.1) is None
    assert side.received_bytes == 0
    assert side.accept(wire.Chunk(**fields), 0.1) == DATA[:64]
    assert side.accept(wire.Chunk(**fields), 0.1) is None


@pytest.mark.parametrize("size", [0, -1, MAX_TRANSFER_BYTES + 1])
def test_an_absurd_size_is_refused_before_anything_is_allocated(size: int, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="bytes"):
        receiver(size)
    with pytest.raises(TransferError, match="bytes"):
        Download(tmp_path, DIGEST, size, rng=random.Random(0))
    assert not list(tmp_path.iterdir())


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 400)), max_size=8))
def test_what_is_held_is_not_asked_for_again(held: list[tuple[int, int]]) -> None:
    side = receiver(held=held, window=1000)
    have = {byte for offset, length in held for byte in range(offset, offset + length)}
    asked = {get.offset: get.length for get in side.requests(0.0)}
    for offset in range(0, len(DATA), 64):
        whole = set(range(offset, min(offset + 64, len(DATA)))) <= have
        assert (offset not in asked) == whole


def test_a_request_for_what_is_not_there_is_answered_missing() -> None:
    def refuse(digest: str) -> bytes:
        raise StoreError(f"bundle {digest[:4]} is not on this disk")

    get = wire.Get(digest=DIGEST, offset=0, length=10)
    answer = Sender(refuse).answer(get)
    assert isinstance(answer, wire.Missing)
    assert "not on this disk" in answer.reason
    beyond = sender().answer(wire.Get(digest=DIGEST, offset=len(DATA), length=10))
    assert isinstance(beyond, wire.Missing)


def test_a_request_past_the_end_gets_what_there_is() -> None:
    answer = chunk(wire.Get(digest=DIGEST, offset=990, length=100))
    assert answer.data == DATA[990:]
    assert answer.size_bytes == len(DATA)


def test_the_sender_reads_a_bundle_once_and_keeps_few() -> None:
    reads: list[str] = []

    def read(digest: str) -> bytes:
        reads.append(digest)
        return bytes(100)

    side = Sender(read, cache_bytes=150)
    for digest in ["a" * 64, "a" * 64, "b" * 64, "a" * 64]:
        side.answer(wire.Get(digest=digest, offset=0, length=1))
    assert [digest[0] for digest in reads] == ["a", "b", "a"]
    side.forget("a" * 64)
    side.answer(wire.Get(digest="a" * 64, offset=0, length=1))
    assert len(reads) == 4


def test_every_message_of_a_transfer_fits_the_protocol() -> None:
    for get in receiver().requests(0.0):
        answer = chunk(get)
        assert wire.decode_up(wire.encode(get)) == get
        assert wire.decode_down(wire.encode(answer)) == answer
    with pytest.raises(WireError):
        wire.decode_up(wire.encode(wire.Get(digest=DIGEST, offset=0, length=2**30)))


# On disk -----------------------------------------------------------------------------------------


def download(directory: Path, **options: object) -> Download:
    return Download(
        directory,
        DIGEST,
        len(DATA),
        rng=random.Random(1),
        **{"chunk_bytes": 64, "window": 4, **options},
    )


def run(side: Download, most: int = 1000) -> None:
    """Answer requests until it is complete, or so many chunks came."""
    while not side.complete:
        for get in side.requests(0.0):
            if not most:
                return
            assert side.accept(chunk(get), 0.0)
            most -= 1


def test_a_download_gives_the_bundle(tmp_path: Path) -> None:
    side = download(tmp_path)
    with pytest.raises(TransferError, match="0 of 1000 bytes"):
        side.finish()
    run(side)
    assert side.finish() == DATA
    side.discard()
    assert not list(tmp_path.iterdir())


@given(cuts=st.lists(st.integers(0, 6), max_size=6), chunk_bytes=st.sampled_from([50, 64, 100]))
@settings(deadline=None)
def test_a_download_survives_restarts(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], chunk_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("partial")
    brought = 0
    for cut in cuts:
        side = download(directory)
        assert side.received_bytes == brought
        run(side, cut)
        brought = side.received_bytes
    side = download(directory, chunk_bytes=chunk_bytes)
    run(side)
    assert side.finish() == DATA
    assert download(directory).complete


def test_a_chunk_torn_by_a_power_cut_is_fetched_again(tmp_path: Path) -> None:
    run(download(tmp_path), 5)
    part = tmp_path / f"{DIGEST}.part"
    torn = bytearray(part.read_bytes())
    torn[64:70] = bytes(6)
    part.write_bytes(torn)
    journal = tmp_path / f"{DIGEST}.ranges"
    journal.write_text(journal.read_text() + "[320, 6", "ascii")
    side = download(tmp_path)
    assert side.received_bytes == 4 * 64
    assert side.requests(0.0)[0].offset == 64
    side.reconnected()
    run(side)
    assert side.finish() == DATA


@given(st.binary(max_size=200), st.binary(max_size=200))
@settings(deadline=None)
def test_whatever_the_partial_files_hold_the_bundle_comes_out_right(
    tmp_path_factory: pytest.TempPathFactory, part: bytes, journal: bytes
) -> None:
    directory = tmp_path_factory.mktemp("partial")
    (directory / f"{DIGEST}.part").write_bytes(part)
    (directory / f"{DIGEST}.ranges").write_bytes(b"[1000]\n" + journal)
    side = download(directory)
    run(side)
    assert side.finish() == DATA


def test_what_was_kept_under_another_size_is_thrown_away(tmp_path: Path) -> None:
    run(download(tmp_path), 5)
    assert PartialFile(tmp_path, DIGEST, len(DATA) - 1).ranges == []
    assert download(tmp_path).received_bytes == 0


def test_bytes_of_another_digest_are_named_and_thrown_away(tmp_path: Path) -> None:
    side = download(tmp_path)
    while not side.complete:
        for get in side.requests(0.0):
            answer = chunk(get)
            lie = wire.Chunk(
                digest=DIGEST,
                offset=get.offset,
                size_bytes=len(DATA),
                data=bytes(len(answer.data)),
            )
            side.accept(lie, 0.0)
    with pytest.raises(CorruptBundleError, match="thrown away"):
        side.finish()
    assert not list(tmp_path.iterdir())
    assert download(tmp_path).received_bytes == 0


def test_a_full_disk_is_named_and_costs_one_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = download(tmp_path)
    run(side, 3)
    real_open = Path.open

    def full(path: Path, *arguments: object, **options: object) -> object:
        if path.suffix == ".part":
            raise OSError(28, "No space left on device")
        return real_open(path, *arguments, **options)

    side.reconnected()
    get = side.requests(0.0)[0]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DiskFullError, match="No space left"):
            side.accept(chunk(get), 0.0)
    assert side.received_bytes == 3 * 64
    side.reconnected()
    run(side)
    assert side.finish() == DATA


def test_a_digest_that_is_no_digest_makes_no_file(tmp_path: Path) -> None:
    for name in ["", "../evil", "A" * 64, "a" * 64 + "\n"]:
        with pytest.raises(TransferError, match="no SHA-256"):
            PartialFile(tmp_path / "inner", name, 10)
    assert not list(tmp_path.rglob("*"))


def test_sweep_removes_what_is_not_kept(tmp_path: Path) -> None:
    run(download(tmp_path), 2)
    PartialFile(tmp_path, "a" * 64, 10)
    (tmp_path / "notes.txt").write_text("mine")
    sweep(tmp_path, keep={DIGEST})
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{DIGEST}.part",
        f"{DIGEST}.ranges",
        "notes.txt",
    }
    sweep(tmp_path / "nowhere")
