"""Bundles on their way to the catalogue: in turn, over restarts, and nothing kept of bad ones."""

import msgspec
import pytest

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from adapter_store.errors import DiskFullError
from adapter_store.transfer import DEFAULT_CHUNK_BYTES, Sender


def offer_of(data: bytes) -> wire.Offer:
    return wire.Offer(digest=bundle_digest(data), size_bytes=len(data))


def incoming(desk) -> list[str]:
    return sorted(path.name for path in (desk.config.state_dir / "incoming").glob("*"))


def gets(replies) -> list[wire.Get]:
    return [reply for reply in replies if isinstance(reply, wire.Get)]


def test_an_offered_bundle_becomes_a_candidate(desk, make_bundle, encoder) -> None:
    desk.register()
    data = make_bundle(1, task="night shift")
    result = desk.upload(data)
    assert (result.digest, result.stored, result.reason) == (bundle_digest(data), True, "")
    (adapter,) = desk.operators.adapters()
    assert adapter["status"] == "candidate"
    assert adapter["digest"] == bundle_digest(data)
    assert adapter["size_bytes"] == len(data)
    assert (adapter["encoder"], adapter["family"]) == (encoder, "frozen")
    assert (adapter["labels"], adapter["task"]) == (["cat", "dog"], "night shift")
    assert (adapter["uploaded_by"], adapter["created_by"]) == ("device-a", "device-a")
    assert desk.store.blobs.get(bundle_digest(data)) == data
    assert incoming(desk) == []
    assert [entry for entry in desk.log() if entry[1] == "upload"] == [
        ("device-a", "upload", bundle_digest(data), "ok")
    ]


def test_offering_what_is_stored_is_answered_at_once(desk, make_bundle) -> None:
    desk.register()
    desk.upload(make_bundle(1))
    for device in ("device-a", "device-b"):
        (result,) = desk.say(device, offer_of(make_bundle(1)))
        assert result.stored


def test_repeating_an_offer_under_way_asks_for_nothing_twice(desk, make_bundle) -> None:
    desk.register()
    data = make_bundle(1)
    first = desk.say("device-a", offer_of(data))
    assert len(gets(first)) == 1
    assert desk.say("device-a", offer_of(data)) == []
    ((_, result),) = desk.serve("device-a", first, data)
    assert result.stored


@pytest.mark.parametrize("size_bytes", [0, 16 * 1024 * 1024 + 1, 2**53])
def test_an_offer_of_an_absurd_size_is_refused_before_a_byte_is_asked_for(desk, size_bytes) -> None:
    (result,) = desk.say("device-a", wire.Offer(digest="a" * 64, size_bytes=size_bytes))
    assert not result.stored
    assert str(size_bytes) in result.reason
    assert incoming(desk) == []
    assert desk.log()[-1] == ("device-a", "upload", "a" * 64, "refused")


def test_bytes_that_are_no_bundle_are_refused_and_nothing_is_kept(desk) -> None:
    desk.register()
    result = desk.upload(b"not a bundle at all")
    assert not result.stored
    assert result.reason
    assert desk.operators.adapters() == []
    assert incoming(desk) == []
    assert list(desk.store.blobs) == []
    assert desk.log()[-1][3] == "refused"


def test_a_truncated_bundle_is_refused(desk, make_bundle) -> None:
    desk.register()
    result = desk.upload(make_bundle(1)[:-20])
    assert not result.stored
    assert list(desk.store.blobs) == []


def test_bytes_that_do_not_have_the_offered_digest_are_refused(desk, make_bundle) -> None:
    desk.register()
    data = make_bundle(1)
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    ((_, result),) = desk.serve("device-a", desk.say("device-a", offer_of(data)), flipped)
    assert not result.stored
    assert incoming(desk) == []
    assert desk.upload(data).stored


def test_a_bundle_for_an_encoder_that_no_device_runs_is_refused(desk, make_bundle) -> None:
    desk.register()
    result = desk.upload(make_bundle(1, encoder="7" * 64))
    assert not result.stored
    assert "encoder" in result.reason
    desk.register("device-b", encoder="7" * 64)
    assert desk.upload(make_bundle(1, encoder="7" * 64)).stored


def test_a_bundle_of_a_device_that_came_before_this_database_is_accepted(desk, make_bundle) -> None:
    desk.register("device-b", encoder="7" * 64)
    assert desk.upload(make_bundle(1), "device-a").stored


def test_a_bundle_whose_signature_is_of_another_encoder_is_refused(desk, make_bundle) -> None:
    desk.register()
    result = desk.upload(make_bundle(1, seed="another"))
    assert not result.stored
    assert "signature" in result.reason


def test_an_offer_taken_back_ends(desk, make_bundle) -> None:
    desk.register()
    data = make_bundle(1)
    desk.say("device-a", offer_of(data))
    digest = bundle_digest(data)
    assert desk.say("device-b", wire.Missing(digest=digest)) == []
    (result,) = desk.say("device-a", wire.Missing(digest=digest, reason="pruned"))
    assert not result.stored
    assert "pruned" in result.reason
    assert desk.uploads.progress() == []
    assert incoming(desk) == []


def test_chunks_of_another_device_are_not_taken(desk, make_bundle) -> None:
    desk.register()
    data = make_bundle(1)
    (get,) = gets(desk.say("device-a", offer_of(data)))
    chunk = Sender(lambda _: data).answer(get)
    assert desk.say("device-b", chunk) == []
    assert desk.operators.adapters() == []
    assert desk.say("device-a", chunk)[0].stored


def test_an_upload_goes_on_after_a_restart_where_it_was(config, open_another, make_bundle) -> None:
    desk = open_another(config)
    desk.register()
    # What it is does not matter before it is whole.
    big = make_bundle(1) + bytes(5 * DEFAULT_CHUNK_BYTES)
    offer = offer_of(big)
    replies = gets(desk.say("device-a", offer))
    sender = Sender(lambda _: big)
    desk.say("device-a", sender.answer(replies[0]))
    held = desk.uploads.progress()[0]["received_bytes"]
    assert held == DEFAULT_CHUNK_BYTES

    again = desk.restart()
    asked = [m for _, m in again.uploads.tick(0.0) if isinstance(m, wire.Get)]
    assert again.uploads.progress()[0]["received_bytes"] == held
    assert 0 not in {get.offset for get in asked}
    again.store.close()


def test_an_upload_that_was_whole_at_the_restart_is_stored(
    config, open_another, make_bundle, monkeypatch
) -> None:
    desk = open_another(config)
    desk.register()
    data = make_bundle(1)
    (get,) = gets(desk.say("device-a", offer_of(data)))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(desk.store.blobs, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        desk.say("device-a", Sender(lambda _: data).answer(get))
    again = desk.restart()
    ((device, result),) = again.uploads.tick(0.0)
    assert device == "device-a"
    assert result.stored
    assert again.operators.adapters()[0]["digest"] == bundle_digest(data)
    assert incoming(again) == []
    again.store.close()


def test_a_restart_sweeps_what_belongs_to_no_upload(config, open_another) -> None:
    desk = open_another(config)
    directory = desk.config.state_dir / "incoming"
    directory.mkdir(exist_ok=True)
    (directory / f"{'9' * 64}.part").write_bytes(b"x")
    again = desk.restart()
    assert incoming(again) == []
    again.store.close()


def test_a_full_disk_puts_an_upload_off_and_loses_nothing(desk, make_bundle, monkeypatch) -> None:
    desk.register()
    data = make_bundle(1)
    (get,) = gets(desk.say("device-a", offer_of(data)))

    def full(_: bytes) -> str:
        raise DiskFullError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(desk.store.blobs, "put", full)
        assert desk.say("device-a", Sender(lambda _: data).answer(get)) == []
        assert desk.uploads.tick(1.0) == []
    ((_, result),) = desk.uploads.tick(6.0)
    assert result.stored


def test_a_device_uploads_one_bundle_at_a_time(desk, make_bundle) -> None:
    desk.register()
    first, second = make_bundle(1), make_bundle(2)
    replies = desk.say("device-a", offer_of(first))
    assert desk.say("device-a", offer_of(second)) == []
    said = []
    waiting = list(replies)
    held = {bundle_digest(first): first, bundle_digest(second): second}
    sender = Sender(held.__getitem__)
    while waiting:
        message = waiting.pop(0)
        if isinstance(message, wire.Get):
            waiting += desk.say("device-a", sender.answer(message))
        else:
            said.append(message)
    assert [result.digest for result in said] == list(held)
    assert all(result.stored for result in said)


def test_only_so_many_devices_upload_at_once(config, open_another, make_bundle) -> None:
    catalogue = msgspec.structs.replace(config.catalogue, max_uploads=2)
    desk = open_another(msgspec.structs.replace(config, catalogue=catalogue))
    asked = [len(gets(desk.say(f"device-{i}", offer_of(make_bundle(i))))) for i in range(4)]
    assert asked == [1, 1, 0, 0]
    desk.store.close()


def test_a_silent_device_gives_up_its_turn_and_goes_on_when_it_is_back(
    config, open_another, make_bundle, make_report
) -> None:
    catalogue = msgspec.structs.replace(config.catalogue, max_uploads=1)
    desk = open_another(msgspec.structs.replace(config, catalogue=catalogue))
    assert gets(desk.say("device-a", offer_of(make_bundle(1))))
    assert not gets(desk.say("device-b", offer_of(make_bundle(2))))
    turn = desk.uploads.tick(31.0)
    assert {device for device, _ in turn} == {"device-b"}
    desk.monotonic = 32.0
    desk.serve("device-b", [message for _, message in turn], make_bundle(2))
    replies = desk.say("device-a", make_report())
    assert len(gets(replies)) == 1
    ((_, result),) = desk.serve("device-a", gets(replies), make_bundle(1))
    assert result.stored
    desk.store.close()


def test_a_bundle_whose_device_vanished_is_taken_from_another(desk, make_bundle) -> None:
    data = make_bundle(1)
    desk.say("device-a", offer_of(data))
    assert desk.say("device-b", offer_of(data)) == []
    desk.uploads.tick(31.0)
    desk.monotonic = 32.0
    assert desk.upload(data, "device-b").stored
    assert desk.operators.adapters()[0]["uploaded_by"] == "device-b"


def test_a_device_cannot_owe_without_end(desk) -> None:
    for number in range(100):
        desk.say("device-a", wire.Offer(digest=f"{number:064x}", size_bytes=100_000))
    assert len(desk.uploads.progress()) == 32
    assert desk.handlers.statistics()["offers_put_off"] == 68
    assert gets(desk.say("device-b", wire.Offer(digest="f" * 64, size_bytes=100_000)))


def test_what_was_asked_for_before_a_reconnection_is_asked_for_again(desk, make_bundle) -> None:
    (get,) = gets(desk.say("device-a", offer_of(make_bundle(1))))
    assert desk.uploads.tick(0.5) == []
    ((device, again),) = desk.uploads.reconnected(1.0)
    assert device == "device-a"
    assert (again.digest, again.offset, again.length) == (get.digest, get.offset, get.length)


def test_a_bundle_that_two_devices_offer_is_asked_for_once_and_both_hear_that_it_is_stored(
    desk, make_bundle
) -> None:
    desk.register()
    desk.register("device-b")
    data = make_bundle(1)
    asked = desk.say("device-a", offer_of(data))
    assert desk.say("device-b", offer_of(data)) == []
    sent = []
    for get in gets(asked):
        chunk = Sender(lambda _: data).answer(get)
        sent += desk.handlers.received(
            wire.up_topic("device-a"), wire.encode(chunk), desk.monotonic
        )
    assert [(name, reply.stored) for name, reply in sent] == [
        ("device-a", True),
        ("device-b", True),
    ]


def test_a_lie_about_a_bundle_is_not_held_against_who_offers_the_true_one(
    desk, make_bundle
) -> None:
    desk.register()
    desk.register("device-b")
    data = make_bundle(1)
    (get,) = gets(desk.say("device-a", offer_of(data)))
    assert desk.say("device-b", offer_of(data)) == []
    lie = wire.Chunk(digest=get.digest, offset=0, size_bytes=len(data), data=bytes(len(data)))
    (result,) = desk.say("device-a", lie)
    assert not result.stored
    assert desk.upload(data, "device-b").stored
