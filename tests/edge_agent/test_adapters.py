"""Adapters come from disk when they are needed, and the least recently used leaves memory first."""

from typing import Any

import pytest

from adapter_store.bundle import bundle_digest, unpack
from adapter_store.errors import WrongEncoderError
from edge_agent.adapters import Adapters, StoredBundles
from edge_agent.decision import OwnHeads
from edge_agent.serving import Serving
from exporter.sessions import EncoderSessions
from ood.pooled import Pooled


class Shelf:
    """Bundles by digest, as a disk that notes what was read and can lose a file."""

    def __init__(self, bundles: list[bytes]) -> None:
        self.files = {bundle_digest(data): data for data in bundles}
        self.reads: list[str] = []

    def read(self, digest: str) -> bytes:
        self.reads.append(digest)
        try:
            return self.files[digest]
        except KeyError:
            raise FileNotFoundError(f"no bundle {digest[:12]}") from None


@pytest.fixture
def shelf(make_bundle: Any) -> Shelf:
    return Shelf([make_bundle((0, 1), adapter=1), make_bundle((2, 3), adapter=2)])


def stored(shelf: Shelf, sessions: EncoderSessions) -> StoredBundles:
    return StoredBundles(shelf.read, list(shelf.files), sessions.package.interface())


def adapters(shelf: Shelf, sessions: EncoderSessions, capacity: int) -> Adapters:
    own = Pooled(unpack(shelf.files[digest]).own for digest in sorted(shelf.files))
    return Adapters(sessions, stored(shelf, sessions), OwnHeads(own), capacity=capacity)


def test_an_adapter_in_memory_is_not_read_again(shelf, sessions) -> None:
    held = adapters(shelf, sessions, capacity=2)
    first, second = sorted(shelf.files)
    for digest in (first, second, first, second):
        assert held.get(digest).labels == unpack(shelf.files[digest]).manifest.labels
    assert shelf.reads == [first, second]


def test_the_least_recently_used_adapter_leaves_first(shelf, sessions, make_bundle) -> None:
    third = make_bundle((4, 5), adapter=3)
    shelf.files[bundle_digest(third)] = third
    held = adapters(shelf, sessions, capacity=2)
    a, b, c = sorted(shelf.files)
    for digest in (a, b, a, c, a, b):
        held.get(digest)
    assert shelf.reads == [a, b, c, b]


def test_a_bundle_that_was_lost_is_missed_until_it_is_back(shelf, sessions, caplog) -> None:
    held = adapters(shelf, sessions, capacity=1)
    digest = min(shelf.files)
    data = shelf.files.pop(digest)
    assert [held.get(digest) for _ in range(3)] == [None, None, None]
    assert len(caplog.messages) == 1
    shelf.files[digest] = data
    assert held.get(digest) is not None


def test_a_bundle_of_another_encoder_is_refused_when_it_is_read(shelf, sessions) -> None:
    interface = sessions.package.interface()
    other = type(interface)(
        digest="0" * 64,
        feature_dim=interface.feature_dim,
        sites=interface.sites,
        families=interface.families,
        network_dim=interface.network_dim,
    )
    bundles = StoredBundles(shelf.read, list(shelf.files), other)
    with pytest.raises(WrongEncoderError):
        bundles[min(shelf.files)]
    with pytest.raises(KeyError):
        bundles["f" * 64]


def serving_of(shelf: Shelf, sessions: EncoderSessions, calibration: Any, memory: int) -> Serving:
    return Serving(
        sessions,
        stored(shelf, sessions),
        calibration,
        number=1,
        false_alarm_every=1e4,
        max_rounds=4,
        adapters_in_memory=memory,
    )


def test_answers_do_not_depend_on_how_many_adapters_fit_in_memory(
    shelf, sessions, calibration, make_images
) -> None:
    images, _ = make_images((0, 1, 2, 3), 6, seed=4)
    few, all_of_them = (serving_of(shelf, sessions, calibration, n).predict(images) for n in (1, 9))
    assert few == all_of_them
    assert any(answer.adapter for answer in few)


def test_a_sample_whose_adapter_is_lost_is_answered_by_the_base_space(
    shelf, sessions, calibration, make_images, caplog
) -> None:
    serving = serving_of(shelf, sessions, calibration, 1)
    shelf.files.clear()
    images, labels = make_images((0, 1, 2, 3), 6, seed=4)
    answers = serving.predict(images)
    right = [answer.label == label for answer, label in zip(answers, labels, strict=True)]
    assert sum(right) > len(right) / 2
    assert sum("left out of answers" in message for message in caplog.messages) == 2
