"""Sums that were kept with a generation give the same answers, and are never trusted blindly."""

from typing import Any

import numpy as np
import pytest

from adapter_store.generation import PREPARED
from edge_agent import installer
from edge_agent.agent import Agent
from edge_agent.prepared import Prepared
from edge_agent.serving import Serving
from exporter.sessions import EncoderSessions


@pytest.fixture
def number(install: Any, make_bundle: Any) -> int:
    made: int = install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))
    return made


def loaded(agent: Agent, number: int) -> tuple[Serving, list[str]]:
    """A generation as it is loaded, and the bundles that were read for it."""
    generation = agent.state.generations.get(number)
    reads: list[str] = []
    read = type(generation).bundle_bytes

    def noted(self: Any, digest: str) -> bytes:
        reads.append(digest)
        return read(self, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(generation), "bundle_bytes", noted)
        serving = installer.load_generation(
            generation, agent.sessions, settings=installer.Settings(1e6, 4)
        )
    return serving, reads


def test_loading_reads_no_bundle_that_no_sample_needs(agent: Agent, number: int) -> None:
    _, reads = loaded(agent, number)
    assert len(reads) <= 1  # the noise it is checked with may look like the adapter's classes


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_without_the_sums_the_answers_are_the_same(
    agent: Agent, number: int, make_images: Any, damage: str
) -> None:
    quick, _ = loaded(agent, number)
    path = agent.state.generations.get(number).path / PREPARED
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-9] if damage == "cut" else data[:-1] + b"\x7f")
    slow, reads = loaded(agent, number)
    assert set(reads) == set(agent.state.generations.get(number).manifest.bundles)
    images, _ = make_images((0, 1, 2, 3, 4, 5), 4, seed=5)
    assert quick.predict(images) == slow.predict(images)
    assert quick.describe() == slow.describe()


def test_sums_of_another_encoder_or_version_are_not_used(
    sessions: EncoderSessions, agent: Agent, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sessions.package.digest
    kept = agent.state.generations.get(number).prepared()
    assert kept is not None
    assert Prepared.from_bytes(kept, encoder=digest) is not None
    assert Prepared.from_bytes(kept, encoder="0" * 64) is None
    assert Prepared.from_bytes(b"nothing", encoder=digest) is None
    monkeypatch.setattr("edge_agent.prepared._FORMAT", 2)
    assert Prepared.from_bytes(kept, encoder=digest) is None


def test_what_was_written_is_read_again_to_the_last_bit(agent: Agent, number: int) -> None:
    encoder = agent.package.digest
    bundles = loaded(agent, number)[0].bundles
    made = Prepared.of(bundles)
    again = Prepared.from_bytes(made.to_bytes(encoder=encoder), encoder=encoder)
    assert again is not None
    assert again.summaries == made.summaries
    for ours, theirs in ((again.base, made.base), (again.own, made.own)):
        assert ours.entries == theirs.entries
        assert np.array_equal(ours.means, theirs.means)
        assert np.array_equal(ours.counts, theirs.counts)
        assert np.array_equal(ours.scatter, theirs.scatter)
