"""Pulling a bundle: restarts, silence, refusal, and bytes that are not what was promised."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store.blobs import BlobStore
from adapter_store.transfer import DEFAULT_CHUNK_BYTES, Sender
from adapter_store.wire import Chunk, Get, Missing
from edge_agent.episode_events import CandidateFailed, CandidatePulled
from edge_agent.pulling import Puller

DATA = bytes(range(256)) * 1200
DIGEST = hashlib.sha256(DATA).hexdigest()


class World:
    """A puller, its clock, its timers and what it sent."""

    def __init__(self, directory: Path) -> None:
        self.now = 0.0
        self.sent: list[Get] = []
        self.asked: set[int] = set()
        self.timers: list[Callable[[], None]] = []
        self.ends: list[CandidatePulled | CandidateFailed] = []
        self.blobs = BlobStore(directory / "blobs")
        self.puller = Puller(
            directory / "incoming",
            self.blobs,
            self._send,
            lambda _, task: self.timers.append(task),
            silence_s=60.0,
            clock=lambda: self.now,
        )
        self.sender = Sender({DIGEST: DATA}.__getitem__)

    def _send(self, get: Get) -> bool:
        self.sent.append(get)
        self.asked.add(get.offset)
        return True

    def pull(self) -> None:
        self.puller.pull(DIGEST, len(DATA), self.ends.append)

    def answer(self, chunks: int = 1000) -> None:
        while self.sent and chunks:
            answer = self.sender.answer(self.sent.pop(0))
            assert isinstance(answer, Chunk)
            self.puller.chunk(answer)
            chunks -= 1


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_pull_ends_with_the_bundle_in_the_blob_store(world: World) -> None:
    world.pull()
    world.answer()
    assert world.ends == [CandidatePulled(DIGEST)]
    assert world.blobs.get(DIGEST) == DATA


def test_a_restarted_device_asks_only_for_what_is_missing(world: World, tmp_path: Path) -> None:
    world.pull()
    world.answer(chunks=2)
    again = World(tmp_path)
    again.pull()
    again.answer()
    assert again.asked == set(range(2 * DEFAULT_CHUNK_BYTES, len(DATA), DEFAULT_CHUNK_BYTES))
    assert again.ends == [CandidatePulled(DIGEST)]


def test_silence_is_a_failure_for_now_and_what_came_is_kept(world: World) -> None:
    world.pull()
    world.answer(chunks=1)
    world.now = 61.0
    while world.timers:
        world.timers.pop(0)()
    assert [end.for_good for end in world.ends] == [False]
    world.sent.clear()
    world.pull()
    world.answer()
    assert world.ends[-1] == CandidatePulled(DIGEST)


def test_a_bundle_the_catalogue_does_not_give_is_refused_for_good(world: World) -> None:
    world.pull()
    world.puller.missing(Missing(digest=DIGEST, reason="quarantined"))
    assert isinstance(world.ends[0], CandidateFailed)
    assert world.ends[0].for_good
    assert "quarantined" in world.ends[0].reason


def test_bytes_with_another_digest_never_reach_the_blob_store(world: World) -> None:
    world.sender = Sender({DIGEST: DATA[:-1] + b"\x00"}.__getitem__)
    world.pull()
    world.answer()
    assert isinstance(world.ends[0], CandidateFailed)
    assert world.ends[0].for_good
    assert list(world.blobs) == []


@pytest.mark.parametrize("size", [0, 2**40])
def test_an_absurd_size_is_refused_before_anything_is_asked_for(world: World, size: int) -> None:
    world.puller.pull(DIGEST, size, world.ends.append)
    assert isinstance(world.ends[0], CandidateFailed)
    assert world.sent == []


def test_a_cancelled_pull_says_nothing_more(world: World) -> None:
    world.pull()
    world.puller.cancel()
    world.answer()
    assert world.ends == []
