"""What the catalogue makes of what devices say, message by message."""

import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from adapter_store.errors import DiskFullError
from adapter_store.trust import verify_bundle, verify_statement

UP = wire.up_topic("device-a")


def kinds(replies):
    return [type(reply).__name__ for reply in replies]


def test_a_device_that_registers_hears_what_is_wanted_of_it(desk, encoder) -> None:
    message = wire.Register(device="device-a", encoder=encoder, software="driftkeel 1")
    desired, ack = desk.say("device-a", message)
    assert (desired.version, desired.generation, desired.pinned) == (0, None, False)
    assert ack == wire.Ack(id=ack.id, of=message.id)
    device = desk.operators.device("device-a")
    assert device["online"]
    assert (device["encoder"], device["software"]) == (encoder, "driftkeel 1")


def test_registering_twice_is_registering_once(desk, encoder) -> None:
    message = wire.Register(device="device-a", encoder=encoder, software="x")
    first = desk.say("device-a", message)
    before = desk.operators.devices(), desk.log()
    assert kinds(desk.say("device-a", message)) == kinds(first)
    assert (desk.operators.devices(), desk.log()) == before


@pytest.mark.parametrize("kind", ["register", "report"])
def test_a_message_in_another_devices_name_is_refused_and_audited(
    desk, make_report, encoder, kind
) -> None:
    message = (
        wire.Register(device="device-b", encoder=encoder, software="x")
        if kind == "register"
        else make_report("device-b")
    )
    (ack,) = desk.say("device-a", message)
    assert not ack.ok
    assert "device-b" in ack.reason
    assert desk.operators.devices() == []
    assert desk.log() == [("device-a", "message", UP, "refused")]


def test_a_report_is_kept_and_acknowledged(desk, make_report) -> None:
    desk.register()
    message = make_report(sequence=7, counters={"samples": 3.0})
    assert kinds(desk.say("device-a", message)) == ["Ack"]
    assert desk.operators.device("device-a")["reported"]["counters"] == {"samples": 3.0}


def test_a_report_that_was_overtaken_changes_nothing(desk, make_report) -> None:
    desk.register()
    desk.say("device-a", make_report(sequence=9, generation=2))
    assert kinds(desk.say("device-a", make_report(sequence=8, generation=1))) == ["Ack"]
    assert desk.operators.device("device-a")["reported"]["generation"] == 2


def test_a_device_that_lost_its_state_is_believed_again_after_registering(
    desk, make_report
) -> None:
    desk.register()
    desk.say("device-a", make_report(sequence=9_000_000, desired_version=4))
    desk.register()
    desk.say("device-a", make_report(sequence=1, desired_version=4, generation=1))
    assert desk.operators.device("device-a")["reported"]["generation"] == 1


def test_a_device_that_lost_its_state_while_the_catalogue_was_away_is_believed_after_a_minute(
    desk, make_report
) -> None:
    desk.say("device-a", make_report(sequence=9_000_000))
    desk.say("device-a", make_report(sequence=1, generation=1))
    assert desk.operators.device("device-a")["reported"]["generation"] == 2
    desk.unix_time += 61
    desk.say("device-a", make_report(sequence=2, generation=1))
    assert desk.operators.device("device-a")["reported"]["generation"] == 1


def test_a_device_that_is_behind_is_told_again_with_every_report(desk, make_report) -> None:
    desk.say("device-a", make_report())
    desk.operators.steer("op", "rollback", "device-a")
    for sequence in (2, 3):
        desired, _ = desk.say("device-a", make_report(sequence=sequence))
        assert (desired.version, desired.generation, desired.pinned) == (1, 1, True)
    assert kinds(desk.say("device-a", make_report(sequence=4, desired_version=1))) == ["Ack"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_report_with_a_number_that_is_none_is_refused(desk, make_report, number) -> None:
    (ack,) = desk.say("device-a", make_report(counters={"samples": number}))
    assert not ack.ok
    assert desk.operators.devices() == []


def test_presence_follows_the_last_will(desk) -> None:
    topic = wire.presence_topic("device-a")
    for payload, online in (
        (b"online", True),
        (b"offline", False),
        (b"online", True),
        (b"", False),
    ):
        assert desk.say_raw(topic, payload) == []
        assert desk.operators.device("device-a")["online"] is online


def test_a_search_finds_the_approved_bundles_nearest_first(
    desk, make_bundle, make_signature, encoder
) -> None:
    desk.register()
    near, far = desk.approved(make_bundle(1)), desk.approved(make_bundle(2))
    desk.upload(make_bundle(1, task="never approved"))
    packed = make_signature(1).to_bytes()
    search = wire.Search(encoder=encoder, signature=packed)
    (result,) = desk.say("device-a", search)
    assert result.of == search.id
    (candidate,) = result.candidates
    assert candidate.similarity > 0.9
    key = desk.store.key.public_key
    statement = verify_statement(candidate.statement, candidate.signature, key)
    assert statement.digest == near
    verify_bundle(statement, make_bundle(1))
    (result,) = desk.say(
        "device-a", wire.Search(encoder=encoder, signature=packed, exclude=[near, far])
    )
    assert result.candidates == []


def test_a_search_never_crosses_encoders(desk, make_bundle, make_signature) -> None:
    desk.register()
    desk.approved(make_bundle(1))
    other = "1" * 64
    message = wire.Search(encoder=other, signature=make_signature(1, encoder=other).to_bytes())
    (result,) = desk.say("device-a", message)
    assert result.candidates == []


def test_a_search_takes_no_more_than_its_limit(desk, make_bundle, make_signature, encoder) -> None:
    desk.register()
    for task in ("one", "two", "three"):
        desk.approved(make_bundle(1, task=task))
    message = wire.Search(encoder=encoder, signature=make_signature(1).to_bytes(), limit=2)
    (result,) = desk.say("device-a", message)
    assert len(result.candidates) == 2
    near = [candidate.similarity for candidate in result.candidates]
    assert near == sorted(near, reverse=True)


@pytest.mark.parametrize("packed", [b"", b"garbage", bytes(8192)])
def test_a_search_with_a_signature_that_is_none_is_refused(desk, encoder, packed) -> None:
    (ack,) = desk.say("device-a", wire.Search(encoder=encoder, signature=packed))
    assert not ack.ok
    assert "signature" in ack.reason


def test_a_search_with_another_encoders_signature_is_refused(desk, make_signature, encoder) -> None:
    packed = make_signature(1, encoder="2" * 64).to_bytes()
    (ack,) = desk.say("device-a", wire.Search(encoder=encoder, signature=packed))
    assert not ack.ok


def test_only_approved_bundles_are_given(desk, make_bundle) -> None:
    desk.register()
    data = make_bundle(1)
    digest = bundle_digest(data)
    get = wire.Get(digest=digest, offset=10, length=100)
    said = {"none": desk.say("device-b", get)}
    desk.upload(data)
    said["candidate"] = desk.say("device-b", get)
    for action in ("approve", "quarantine", "retire"):
        desk.operators.judge("op", action, digest)
        said[action] = desk.say("device-b", get)
    (chunk,) = said.pop("approve")
    assert (chunk.data, chunk.offset, chunk.size_bytes) == (data[10:110], 10, len(data))
    for when, (missing,) in said.items():
        assert isinstance(missing, wire.Missing), when
        assert missing.reason


def test_a_bundle_damaged_on_the_disk_is_never_given(desk, make_bundle) -> None:
    desk.register()
    digest = desk.approved(make_bundle(1))
    path = desk.store.blobs.path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (answer,) = desk.say("device-b", wire.Get(digest=digest, offset=0, length=10))
    assert isinstance(answer, wire.Missing)
    assert "damaged" in answer.reason


@pytest.mark.parametrize(
    ("topic", "payload", "says"),
    [
        (UP, b"", "empty"),
        (UP, b"\x02rest", "version 2"),
        (UP, b"\x01garbage", "does not fit"),
        (UP, b"\x01" + msgspec.msgpack.encode({"type": "frobnicate", "id": "12345678"}), "fit"),
        (UP, b"\x01" + b"\x91" * 5000, "does not fit"),
        (UP, b"\x01" + bytes(wire.MAX_MESSAGE_BYTES), "over the limit"),
        (UP, wire.encode(wire.Desired(id="12345678", version=1)), "does not fit"),
        (wire.presence_topic("device-a"), b"perhaps", "presence"),
        ("driftkeel/v1/up/..", b"", "topic"),
        ("somewhere/else", b"x", "topic"),
        (wire.down_topic("device-a"), b"\x01garbage", "does not fit"),
    ],
)
def test_a_message_that_is_none_is_counted_audited_and_forgotten(
    desk, topic, payload, says
) -> None:
    assert desk.say_raw(topic, payload) == []
    assert desk.handlers.statistics()["messages_refused"] == 1
    (entry,) = desk.store.log()
    assert says in entry["detail"]
    assert desk.operators.devices() == []


def test_a_flood_of_bad_messages_does_not_flood_the_audit_log(desk) -> None:
    for _ in range(500):
        desk.say_raw(UP, b"\x01garbage")
    assert desk.handlers.statistics()["messages_refused"] == 500
    assert len(desk.store.log()) == 10
    desk.monotonic += 61
    desk.say_raw(UP, b"\x01garbage")
    assert "and 490 more" in desk.store.log()[-1]["detail"]


def test_one_devices_flood_does_not_hide_anothers_refusal(desk) -> None:
    for _ in range(50):
        desk.say_raw(UP, b"")
    desk.say_raw(wire.up_topic("device-b"), b"")
    assert desk.log()[-1][0] == "device-b"


def test_when_the_disk_is_full_nothing_is_acknowledged(desk, make_report, monkeypatch) -> None:
    desk.say("device-a", make_report(sequence=1))

    def full(*_: object) -> None:
        raise DiskFullError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(desk.store, "writing", full)
        assert desk.say("device-a", make_report(sequence=2)) == []
    assert kinds(desk.say("device-a", make_report(sequence=2))) == ["Ack"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(payload=st.binary(max_size=300), version=st.sampled_from([b"", b"\x01"]))
def test_no_bytes_break_the_handlers(desk, payload, version) -> None:
    desk.say_raw(UP, version + payload)
    desk.say_raw(wire.presence_topic("device-a"), payload)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_message_breaks_the_handlers_nor_the_operators_view(desk, make_report, data) -> None:
    text = st.text(max_size=40)
    number = st.one_of(st.floats(), st.integers(0, 2**53).map(float))
    message = data.draw(
        st.one_of(
            st.builds(
                make_report,
                sequence=st.integers(0, 2**53),
                desired_version=st.integers(0, 2**53),
                generation=st.integers(0, 2**53),
                problem=text,
                counters=st.dictionaries(text, number, max_size=3),
            ),
            st.builds(
                wire.Register,
                device=st.sampled_from(["device-a", "device-b"]),
                encoder=st.just("3" * 64),
                software=text,
            ),
            st.builds(wire.Missing, digest=st.just("4" * 64), reason=text),
            st.builds(wire.Offer, digest=st.just("5" * 64), size_bytes=st.integers(0, 2**53)),
        )
    )
    desk.say_raw(UP, wire.encode(message))
    for device in desk.operators.devices():
        desk.operators.device(device["name"])
    desk.operators.adapters()
    desk.store.log()
