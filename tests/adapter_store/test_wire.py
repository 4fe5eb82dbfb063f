"""Whatever arrives is a valid message or a WireError, and documentation names every message."""

import contextlib
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store import wire
from adapter_store.errors import WireError
from adapter_store.explanation import Explanation, Group

PROTOCOL_PAGE = Path(__file__).parents[2] / "docs" / "wire-protocol.md"

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
texts = st.text(max_size=40)
counts = st.integers(0, 2**53)
ids = st.text("0123456789abcdef", min_size=32, max_size=32)
finite = st.floats(allow_nan=False, allow_infinity=False)
generations = st.builds(
    wire.GenerationSummary,
    number=counts,
    digest=digests,
    reason=texts,
    created_at=finite,
    bundles=st.lists(digests, max_size=3),
)
episodes = st.builds(wire.EpisodeSummary, number=counts, state=texts, detail=texts, kind=texts)
shares = st.floats(0, 1)
explanations = st.builds(
    Explanation,
    episode=counts,
    kind=texts,
    words=st.lists(texts, min_size=1, max_size=3).map(tuple),
    bins=st.just((0.0, 0.5, 1.0)),
    known=st.tuples(shares, shares),
    shifted=st.tuples(shares, shares),
    seqs=st.just((1, 2)),
    evidence=st.tuples(shares, shares),
    alarm_at=st.floats(0, 1e9),
    onset_seq=counts,
    alarm_seq=counts,
    nearest=st.lists(st.tuples(texts, shares), max_size=2).map(tuple),
    examples=st.lists(ids, max_size=2).map(tuple),
    groups=st.lists(
        st.builds(
            Group, size=counts, sample_ids=st.tuples(ids), nearest=texts, distance=st.floats(0, 9)
        ),
        max_size=2,
    ).map(tuple),
)
candidates = st.builds(
    wire.Candidate,
    statement=st.binary(max_size=60),
    signature=st.binary(max_size=64),
    similarity=st.floats(0, 1),
)
both_ways: list[st.SearchStrategy[Any]] = [
    st.builds(wire.Get, id=ids, digest=digests, offset=counts, length=st.integers(1, 2**18)),
    st.builds(
        wire.Chunk,
        id=ids,
        digest=digests,
        offset=counts,
        size_bytes=counts,
        data=st.binary(max_size=99),
    ),
    st.builds(wire.Missing, id=ids, digest=digests, reason=texts),
    st.builds(wire.Ack, id=ids, of=ids, ok=st.booleans(), reason=texts),
]
up_messages = st.one_of(
    *both_ways,
    st.builds(wire.Register, id=ids, device=names, encoder=digests, software=texts),
    st.builds(
        wire.Report,
        id=ids,
        device=names,
        sequence=counts,
        desired_version=counts,
        generation=counts,
        generation_digest=digests,
        pinned=st.booleans(),
        generations=st.lists(generations, max_size=3),
        episode=st.none() | episodes,
        counters=st.dictionaries(texts, finite, max_size=3),
        problem=texts,
    ),
    st.builds(
        wire.Search,
        id=ids,
        encoder=digests,
        signature=st.binary(max_size=99),
        limit=st.integers(1, 20),
        exclude=st.lists(digests, max_size=3),
    ),
    st.builds(wire.Offer, id=ids, digest=digests, size_bytes=counts),
    st.builds(wire.Explained, id=ids, explanation=explanations),
)
down_messages = st.one_of(
    *both_ways,
    st.builds(
        wire.Desired,
        id=ids,
        version=counts,
        generation=st.none() | counts,
        pinned=st.booleans(),
    ),
    st.builds(wire.SearchResult, id=ids, of=ids, candidates=st.lists(candidates, max_size=3)),
    st.builds(wire.OfferResult, id=ids, digest=digests, stored=st.booleans(), reason=texts),
)


def decode_both(payload: bytes) -> None:
    """Decode in both directions; anything but a message or a WireError fails the test."""
    for decode in (wire.decode_up, wire.decode_down):
        with contextlib.suppress(WireError):
            assert isinstance(decode(payload), wire.Message)


def raw(**fields: object) -> bytes:
    return b"\x01" + msgspec.msgpack.encode(fields)


OFFER = {"type": "offer", "id": "0" * 32, "digest": "0" * 64, "size_bytes": 1}


@given(up_messages)
def test_what_a_device_says_arrives_as_it_was_said(message: wire.UpMessage) -> None:
    assert wire.decode_up(wire.encode(message)) == message


@given(down_messages)
def test_what_the_catalogue_says_arrives_as_it_was_said(message: wire.DownMessage) -> None:
    assert wire.decode_down(wire.encode(message)) == message


def test_every_message_has_an_id_of_its_own() -> None:
    assert wire.Missing(digest="0" * 64).id != wire.Missing(digest="0" * 64).id


def test_the_largest_chunk_fits_a_message() -> None:
    chunk = wire.Chunk(
        digest="f" * 64, offset=2**53, size_bytes=2**53, data=bytes(wire.MAX_CHUNK_BYTES)
    )
    assert wire.decode_up(wire.encode(chunk)) == chunk


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b"", "empty"),
        (bytes(wire.MAX_MESSAGE_BYTES + 1), "over the limit"),
        (b"\x02" + wire.encode(wire.Missing(digest="0" * 64))[1:], "version 2"),
        (b"\x01", "does not fit"),
        (b"\x01\xc1", "does not fit"),
        (b"{}", "version 123"),
        (raw(), "does not fit"),
        (raw(type="offer"), "does not fit"),
        (raw(**{**OFFER, "type": "eval"}), "does not fit"),
        (raw(**{**OFFER, "type": None}), "does not fit"),
        (raw(**{**OFFER, "id": "short"}), "id"),
        (raw(**{**OFFER, "digest": "0" * 63}), "digest"),
        (raw(**{**OFFER, "digest": "A" * 64}), "digest"),
        (raw(**{**OFFER, "digest": "../" + "0" * 61}), "digest"),
        (raw(**{**OFFER, "size_bytes": -1}), "size_bytes"),
        (raw(**{**OFFER, "size_bytes": 2**60}), "size_bytes"),
        (raw(**{**OFFER, "size_bytes": "1"}), "size_bytes"),
        (raw(**{**OFFER, "size_bytes": 1.5}), "size_bytes"),
        (raw(**OFFER) + b"\x00", "does not fit"),
        (raw(**OFFER)[:-1], "does not fit"),
        (b"\x01" + b"\x91" * 100_000, "does not fit"),
        (b"\x01\xdf\xff\xff\xff\xff", "does not fit"),
        (b"\x01\xc6\xff\xff\xff\xff", "does not fit"),
    ],
)
def test_a_bad_message_is_refused_and_named(payload: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=re.escape(complaint)):
        wire.decode_up(payload)


@pytest.mark.parametrize(
    "message",
    [
        {**OFFER, "type": "get", "offset": 0, "length": wire.MAX_CHUNK_BYTES + 1},
        {**OFFER, "type": "get", "offset": 0, "length": 0},
        {**OFFER, "type": "search", "encoder": "0" * 64, "signature": bytes(8193)},
        {**OFFER, "type": "search", "encoder": "0" * 64, "signature": b"", "limit": 21},
        {**OFFER, "type": "missing", "reason": "x" * 2001},
        {**OFFER, "type": "register", "device": "a/b", "encoder": "0" * 64, "software": ""},
        {**OFFER, "type": "register", "device": "+", "encoder": "0" * 64, "software": ""},
    ],
)
def test_a_field_out_of_bounds_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(WireError):
        wire.decode_up(raw(**message))


@pytest.mark.parametrize(
    "message",
    [
        {**OFFER, "digest": "0" * 64 + "\n"},
        {**OFFER, "type": "register", "device": "a\n", "encoder": "0" * 64, "software": ""},
    ],
)
def test_a_name_with_a_newline_behind_it_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(WireError):
        wire.decode_up(raw(**message))


def test_unknown_fields_are_for_newer_versions_and_are_passed_over() -> None:
    assert isinstance(wire.decode_up(raw(**OFFER, colour="blue")), wire.Offer)


REPORT = {
    "type": "report",
    "id": "0" * 32,
    "device": "a",
    "sequence": 1,
    "desired_version": 0,
    "generation": 1,
    "generation_digest": "0" * 64,
    "pinned": False,
    "generations": [],
    "episode": {"number": 3, "state": "seeking", "detail": "domain shift: asking"},
}


def test_an_episode_of_an_older_device_has_no_kind_and_is_read() -> None:
    report = wire.decode_up(raw(**REPORT))
    assert isinstance(report, wire.Report)
    assert report.episode == wire.EpisodeSummary(
        number=3, state="seeking", detail="domain shift: asking", kind=""
    )


def test_an_older_catalogue_reads_an_episode_with_a_kind() -> None:
    class Older(msgspec.Struct):
        number: int
        state: str
        detail: str = ""

    said = wire.EpisodeSummary(number=3, state="seeking", detail="asking", kind="domain shift")
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=Older)
    assert (read.number, read.state, read.detail) == (3, "seeking", "asking")


@given(up_messages)
def test_the_wrong_direction_is_refused(message: wire.UpMessage) -> None:
    if not isinstance(message, wire.DownMessage):
        with pytest.raises(WireError):
            wire.decode_down(wire.encode(message))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    decode_both(noise)
    decode_both(b"\x01" + noise)


@given(st.one_of(up_messages, down_messages), st.data())
def test_a_damaged_message_is_refused_or_still_valid(message: Any, data: st.DataObject) -> None:
    damaged = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    decode_both(bytes(damaged))
    decode_both(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | digests,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
tags = st.sampled_from([str(kind.__struct_config__.tag) for kind in get_args(wire.AnyMessage)])
fields = st.sampled_from(
    sorted({name for kind in get_args(wire.AnyMessage) for name in kind.__struct_fields__})
)


@given(tags, st.dictionaries(fields, plain))
def test_any_values_in_any_fields_are_a_message_or_refused(
    tag: str, values: dict[str, object]
) -> None:
    decode_both(raw(**{**values, "type": tag}))


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "é", "-a", "a" * 65, "a\n", "a\x00"])
def test_a_name_that_is_no_topic_level_is_refused(name: str) -> None:
    for topic in (wire.up_topic, wire.down_topic, wire.presence_topic):
        with pytest.raises(WireError):
            topic(name)


@given(names)
def test_a_topic_gives_its_device_back(name: str) -> None:
    for topic in (wire.up_topic, wire.down_topic, wire.presence_topic):
        assert wire.device_of(topic(name)) == name


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "driftkeel/v1/up/",
        "driftkeel/v1/up/+",
        "driftkeel/v1/up/a/b",
        "driftkeel/v2/up/a",
        "driftkeel/v1/sideways/a",
        "$SYS/up/a",
    ],
)
def test_a_foreign_topic_is_refused(topic: str) -> None:
    with pytest.raises(WireError):
        wire.device_of(topic)


def test_the_protocol_page_lists_exactly_the_messages_and_their_fields() -> None:
    page = PROTOCOL_PAGE.read_text(encoding="utf-8")
    described = {
        name: (ways, set(re.findall(r"`(\w+)`", listed)))
        for name, ways, listed in re.findall(
            r"^\| `(\w+)` \| (up|down|up, down) \| ([^|]*) \|", page, re.MULTILINE
        )
    }
    actual = {}
    for kind in get_args(wire.AnyMessage):
        ways = [
            way
            for way, union in (("up", wire.UpMessage), ("down", wire.DownMessage))
            if kind in get_args(union)
        ]
        actual[kind.__struct_config__.tag] = (
            ", ".join(ways),
            set(kind.__struct_fields__) - {"id"},
        )
    assert described == actual


def test_the_protocol_page_gives_the_limits_in_force() -> None:
    page = PROTOCOL_PAGE.read_text(encoding="utf-8")
    assert f"{wire.MAX_MESSAGE_BYTES:,} bytes" in page
    assert f"{wire.MAX_CHUNK_BYTES:,} bytes" in page
    for topic in (wire.up_topic("x"), wire.down_topic("x"), wire.presence_topic("x")):
        assert topic.removesuffix("x") + "NAME" in page
