"""A device and a scripted catalogue over a real broker: state, commands, search, pull, offers."""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from adapter_store import wire
from adapter_store.bundle import bundle_digest, unpack
from adapter_store.explanation import Explanation
from adapter_store.mqtt import Link
from adapter_store.transfer import Sender
from adapter_store.trust import CatalogueKey, Statement
from cloud.broker import Broker, start_broker
from edge_agent.agent import Agent
from edge_agent.conductor import Conductor
from edge_agent.config import CatalogueSection, Config, LearnerSection, MqttSection, SearchSection
from edge_agent.episode import Policy, open_episode
from tests.adapter_store.explained import DOCUMENT

WAIT_S = 60.0
DEVICE = "device-a"


class Catalogue:
    """Says what the test tells it to; answers searches and ranges from what it holds."""

    def __init__(self, broker: Broker, key: CatalogueKey, *, answers: bool = True) -> None:
        self.key = key
        self.bundles: dict[str, bytes] = {}
        self.heard: queue.Queue[wire.UpMessage] = queue.Queue()
        self.presence: queue.Queue[bytes] = queue.Queue()
        self.answers = answers
        self.answers_searches = True
        self._sender = Sender(self.bundles.__getitem__)
        self.link = Link(
            host=broker.host,
            port=broker.port,
            client_id="catalogue",
            username="catalogue",
            password="c",
            subscriptions=[wire.ALL_UP, wire.ALL_PRESENCE],
            on_message=self._on_message,
        )
        self.link.start()
        assert self.link.wait_connected(WAIT_S)

    def say(self, message: wire.DownMessage) -> None:
        assert self.link.publish(wire.down_topic(DEVICE), wire.encode(message))

    def hear(self, wanted: Callable[[wire.UpMessage], bool]) -> wire.UpMessage:
        deadline = time.monotonic() + WAIT_S
        while True:
            message = self.heard.get(timeout=max(0.01, deadline - time.monotonic()))
            if wanted(message):
                return message

    def report(self, wanted: Callable[[wire.Report], bool]) -> wire.Report:
        message = self.hear(lambda m: isinstance(m, wire.Report) and wanted(m))
        assert isinstance(message, wire.Report)
        return message

    def _on_message(self, topic: str, payload: bytes) -> None:
        if "/presence/" in topic:
            self.presence.put(payload)
            return
        message = wire.decode_up(payload)
        self.heard.put(message)
        if not self.answers:
            return
        if isinstance(message, wire.Search) and self.answers_searches:
            self.say(wire.SearchResult(of=message.id, candidates=self._candidates(message)))
        elif isinstance(message, wire.Get):
            self.say(self._sender.answer(message))

    def _candidates(self, search: wire.Search) -> list[wire.Candidate]:
        found = []
        for digest, data in self.bundles.items():
            manifest = unpack(data).manifest
            statement = Statement(
                digest=digest,
                size_bytes=len(data),
                encoder=manifest.encoder,
                family=manifest.family,
                labels=manifest.labels,
                status="approved",
                issued_at=0.0,
            )
            blob, signed = self.key.sign(statement)
            found.append(wire.Candidate(statement=blob, signature=signed, similarity=0.9))
        return [c for c in found if c.statement and not search.exclude.count(c.statement.hex())]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    started = start_broker(tmp_path_factory.mktemp("broker"), {"catalogue": "c", DEVICE: "d"})
    yield started
    started.stop()


@pytest.fixture
def catalogue(broker: Broker, tmp_path: Path) -> Iterator[Catalogue]:
    peer = Catalogue(broker, CatalogueKey.load_or_create(tmp_path / "key"))
    yield peer
    peer.link.stop()


@pytest.fixture
def config(config: Config, broker: Broker, catalogue: Catalogue) -> Config:
    return msgspec.structs.replace(
        config,
        mqtt=MqttSection(host=broker.host, port=broker.port, username=DEVICE, password="d"),
        catalogue=CatalogueSection(public_key=catalogue.key.public_key),
        learner=LearnerSection(enabled=False),
        search=SearchSection(timeout_s=20.0),
    )


@contextlib.contextmanager
def running(agent: Agent, config: Config, **settings: float) -> Iterator[Conductor]:
    conductor = Conductor(agent, config, **settings)  # type: ignore[arg-type]
    conductor.start()
    try:
        yield conductor
    finally:
        conductor.stop()


def stream(agent: Agent, images: np.ndarray) -> None:
    for start in range(0, len(images), 8):
        agent.predict(images[start : start + 8])


def until(probe: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_device_registers_and_reports_what_runs(agent, config, catalogue, install) -> None:
    number = install()
    with running(agent, config):
        register = catalogue.hear(lambda m: isinstance(m, wire.Register))
        assert register.encoder == agent.package.digest
        report = catalogue.report(lambda _: True)
        assert (report.generation, report.desired_version, report.pinned) == (number, 0, False)
        assert report.generation_digest == agent.state.generations.get(number).digest
        assert catalogue.presence.get(timeout=WAIT_S) == b"online"
    assert catalogue.presence.get(timeout=WAIT_S) == b"offline"


def test_reports_are_numbered_upwards_over_restarts(agent, config, catalogue, install) -> None:
    install()
    last = 0
    for _ in range(2):
        with running(agent, config):
            report = catalogue.report(lambda _: True)
            assert report.sequence > last
            last = report.sequence


def test_a_rollback_is_obeyed_reported_and_kept(
    agent, config, catalogue, install, make_bundle
) -> None:
    install()
    install(make_bundle((0, 1, 2)), make_bundle((3, 4)))
    with running(agent, config):
        catalogue.report(lambda r: r.generation == 2)
        wanted = wire.Desired(version=5, generation=1, pinned=True)
        catalogue.say(wanted)
        catalogue.hear(lambda m: isinstance(m, wire.Ack) and m.of == wanted.id)
        assert agent.serving.number == 1
        report = catalogue.report(lambda r: r.desired_version == 5)
        assert (report.generation, report.pinned, report.problem) == (1, True, "")
        # Late and repeated wishes change nothing.
        stale = wire.Desired(version=4, generation=2)
        for message in (stale, wanted):
            catalogue.say(message)
            catalogue.hear(lambda m, of=message.id: isinstance(m, wire.Ack) and m.of == of)
        assert agent.serving.number == 1
    with running(agent, config):
        report = catalogue.report(lambda _: True)
        assert (report.generation, report.desired_version, report.pinned) == (1, 5, True)


def test_a_generation_that_is_gone_is_reported_and_the_running_one_stays(
    agent, config, catalogue, install
) -> None:
    install()
    with running(agent, config):
        catalogue.report(lambda _: True)
        catalogue.say(wire.Desired(version=1, generation=99))
        report = catalogue.report(lambda r: r.desired_version == 1)
        assert report.generation == 1
        assert "99" in report.problem


def test_malformed_messages_are_counted_and_do_no_harm(agent, config, catalogue, install) -> None:
    install()
    with running(agent, config) as conductor:
        catalogue.report(lambda _: True)
        for payload in (b"", b"\x01", b"\x02abc", b"\x01" + b"\xff" * 50, b"x" * 1000):
            assert catalogue.link.publish(wire.down_topic(DEVICE), payload)
        unasked = [
            wire.Chunk(digest="a" * 64, offset=0, size_bytes=3, data=b"abc"),
            wire.Missing(digest="a" * 64),
            wire.SearchResult(of="0" * 32, candidates=[]),
            wire.OfferResult(digest="a" * 64, stored=True),
            wire.Ack(of="0" * 32),
        ]
        for message in unasked:
            catalogue.say(message)
        catalogue.say(wire.Desired(version=1, pinned=True))
        assert catalogue.report(lambda r: r.desired_version == 1).pinned
        assert conductor.status()["sync"]["counters"]["malformed"] == 5


def test_a_fitting_bundle_is_found_pulled_tried_and_installed_without_training(  # noqa: PLR0917 (fixtures)
    agent, config, catalogue, install, make_bundle, make_images
) -> None:
    install()
    data = make_bundle((3, 4, 5))
    catalogue.bundles[bundle_digest(data)] = data
    with running(agent, config) as conductor:
        catalogue.report(lambda _: True)
        stream(agent, make_images((0, 1, 2), 20, seed=5)[0])
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        report = catalogue.report(lambda r: r.episode is not None and r.episode.state == "closed")
        assert report.generation == 2
        assert bundle_digest(data) in report.generations[-1].bundles
        status = conductor.status()
        assert status["trainings"] == 0
        assert "from the catalogue" in status["episode"]["detail"]
    answers = agent.predict(make_images((3, 4, 5), 3, seed=9)[0], probe=True)
    assert {a.label for a in answers} == {"stripes-3", "stripes-4", "stripes-5"}


def test_a_pinned_device_waits_and_goes_on_when_unpinned(  # noqa: PLR0917 (fixtures)
    agent, config, catalogue, install, make_bundle, make_images
) -> None:
    install()
    data = make_bundle((3, 4, 5))
    catalogue.bundles[bundle_digest(data)] = data
    with running(agent, config):
        catalogue.report(lambda _: True)
        catalogue.say(wire.Desired(version=1, pinned=True))
        catalogue.report(lambda r: r.pinned)
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        report = catalogue.report(lambda r: r.episode is not None and r.episode.state == "seeking")
        assert "pinned" in report.episode.detail
        assert report.generation == 1
        catalogue.say(wire.Desired(version=2, pinned=False))
        report = catalogue.report(lambda r: r.episode is not None and r.episode.state == "closed")
        assert report.generation == 2


def test_bundles_another_key_vouches_for_are_not_even_pulled(  # noqa: PLR0917 (fixtures)
    agent, config, catalogue, install, make_bundle, make_images, tmp_path
) -> None:
    install()
    data = make_bundle((3, 4, 5))
    catalogue.bundles[bundle_digest(data)] = data
    catalogue.key = CatalogueKey.load_or_create(tmp_path / "thief")
    with running(agent, config) as conductor:
        catalogue.report(lambda _: True)
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        report = catalogue.report(
            lambda r: r.episode is not None and r.episode.state == "waiting_for_labels"
        )
        assert report.generation == 1
        assert conductor.status()["sync"]["counters"]["untrusted"] == 1
    assert not agent.state.blobs.has(bundle_digest(data))


def test_a_registration_is_repeated_until_the_catalogue_acknowledges_it(
    agent, config, catalogue, install
) -> None:
    install()
    with running(agent, config, report_every_s=0.1):
        first = catalogue.hear(lambda m: isinstance(m, wire.Register))
        again = catalogue.hear(lambda m: isinstance(m, wire.Register))
        assert again == first
        catalogue.say(wire.Ack(of=first.id))
        # Once the acknowledgement is in, reports come alone.
        kinds = [type(catalogue.hear(lambda _: True)) for _ in range(12)]
        assert kinds[-4:] == [wire.Report] * 4


def test_a_bundle_approved_later_is_found_by_searching_on(  # noqa: PLR0917 (fixtures)
    agent, config, catalogue, install, make_bundle, make_images
) -> None:
    install()
    often = msgspec.structs.replace(config.search, repeat_s=0.1)
    with running(agent, msgspec.structs.replace(config, search=often)):
        catalogue.report(lambda _: True)
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        catalogue.report(
            lambda r: r.episode is not None and r.episode.state == "waiting_for_labels"
        )
        data = make_bundle((3, 4, 5))
        catalogue.bundles[bundle_digest(data)] = data
        assert catalogue.report(lambda r: r.generation == 2)


def test_an_answer_counts_though_the_search_was_due_again_before_it_came(  # noqa: PLR0917 (fixtures)
    agent, config, catalogue, install, make_bundle, make_images
) -> None:
    install()
    data = make_bundle((3, 4, 5))
    often = msgspec.structs.replace(config.search, repeat_s=0.05)
    slow = msgspec.structs.replace(config, search=often)
    with running(agent, slow, report_every_s=0.2):
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        catalogue.report(
            lambda r: r.episode is not None and r.episode.state == "waiting_for_labels"
        )
        catalogue.answers_searches = False
        asked = [catalogue.hear(lambda m: isinstance(m, wire.Search))]
        for _ in range(5):
            catalogue.report(lambda _: True)
        while not catalogue.heard.empty():
            asked.append(catalogue.heard.get())
        last = [message for message in asked if isinstance(message, wire.Search)][-1]
        for _ in range(5):
            catalogue.report(lambda _: True)
        catalogue.bundles[bundle_digest(data)] = data
        found = catalogue._candidates(last)
        catalogue.say(wire.SearchResult(of=last.id, candidates=found))
        assert catalogue.report(lambda r: r.generation == 2)


def test_an_offer_is_owed_until_acknowledged_and_its_ranges_are_given(
    agent, config, catalogue, install, make_bundle
) -> None:
    install()
    data = make_bundle((3, 4))
    digest = agent.state.blobs.put(data)
    private = agent.state.blobs.put(make_bundle((5, 6)))
    conductor = Conductor(agent, config)
    conductor._sync.offer(digest)
    conductor.start()
    try:
        offer = catalogue.hear(lambda m: isinstance(m, wire.Offer))
        assert (offer.digest, offer.size_bytes) == (digest, len(data))
        catalogue.say(wire.Get(digest=digest, offset=100, length=1000))
        chunk = catalogue.hear(lambda m: isinstance(m, wire.Chunk))
        assert (chunk.data, chunk.size_bytes) == (data[100:1100], len(data))
        catalogue.say(wire.Get(digest=private, offset=0, length=10))
        assert catalogue.hear(lambda m: isinstance(m, wire.Missing)).digest == private
        assert len(agent.state.outbox) == 1
        result = wire.OfferResult(digest=digest, stored=True)
        catalogue.say(result)
        catalogue.hear(lambda m: isinstance(m, wire.Ack) and m.of == result.id)
        assert len(agent.state.outbox) == 0
    finally:
        conductor.stop()


def test_an_episode_is_explained_once_and_the_explanation_owed_until_acknowledged(
    agent, config, catalogue, install, make_images
) -> None:
    install()
    with running(agent, config):
        catalogue.report(lambda _: True)
        stream(agent, make_images((0, 1, 2), 20, seed=5)[0])
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        first = catalogue.hear(lambda m: isinstance(m, wire.Explained))
        report = catalogue.report(lambda r: r.episode is not None and r.episode.kind != "")
        assert first.explanation.episode == report.episode.number == 1
        assert first.explanation.kind == report.episode.kind
        assert max(first.explanation.evidence) >= first.explanation.alarm_at
        assert len(wire.encode(first)) < 16 * 1024
    with running(agent, config):
        again = catalogue.hear(lambda m: isinstance(m, wire.Explained))
        assert again == first
        catalogue.say(wire.Ack(of=first.id))
        catalogue.report(lambda _: True)
    assert len(agent.state.outbox) == 0
    with running(agent, config, report_every_s=0.1):
        heard = [catalogue.hear(lambda _: True) for _ in range(8)]
        assert not any(isinstance(message, wire.Explained) for message in heard)


def test_a_device_that_was_killed_before_it_could_explain_does_so_after_the_restart(
    agent, config, catalogue, install, make_images
) -> None:
    install()
    offline = msgspec.structs.replace(config, mqtt=None)
    with running(agent, offline) as conductor:
        stream(agent, make_images((0, 1, 2), 20, seed=5)[0])
        stream(agent, make_images((3, 4, 5), 30, seed=6)[0])
        until(lambda: (conductor.status()["episode"] or {}).get("kind"))
    assert len(agent.state.outbox) == 0
    with running(agent, config):
        assert catalogue.hear(lambda m: isinstance(m, wire.Explained)).explanation.episode == 1


def test_an_episode_that_cannot_be_explained_any_more_is_given_up(
    agent, config, catalogue, install, caplog
) -> None:
    number = install()
    episode = open_episode(
        4, now=1.0, alarm_seq=9, onset_seq=5, generation=number, pinned=False, policy=Policy()
    )
    closed = {**episode.to_dict(), "stage": "closed", "outcome": "passed"}
    agent.state.episodes.save(closed)
    for _ in range(2):
        with running(agent, config):
            catalogue.report(lambda _: True)
            until(lambda: agent.state.settings.get("explained") == 4)
    assert caplog.text.count("episode 4 cannot be explained: the journal no longer holds") == 1


def test_few_explanations_are_owed_at_once_and_the_newest_are(agent, config, install) -> None:
    install()
    conductor = Conductor(agent, config)
    for number in range(1, 41):
        conductor._sync.explain(msgspec.convert(DOCUMENT | {"episode": number}, Explanation))
    owed = [wire.decode_up(o.message).explanation.episode for o in agent.state.outbox.messages()]
    assert owed == list(range(25, 41))
