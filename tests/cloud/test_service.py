"""The catalogue as a process, over each broker: its whole work, and what may befall it."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from adapter_store import wire
from adapter_store.cli import driftkeel
from adapter_store.trust import verify_bundle, verify_statement
from cloud.broker import Broker, Kind, start_broker
from tests.cloud.field import CatalogueProcess, FieldDevice, bundle, field

Field = tuple[CatalogueProcess, FieldDevice]


@pytest.fixture
def running(tmp_path: Path, broker: Broker, broker_users: dict[str, str]) -> Iterator[Field]:
    with field(tmp_path, broker, broker_users) as both:
        yield both


def answers(get: wire.Get, chunk: wire.Chunk) -> bool:
    return (chunk.digest, chunk.offset) == (get.digest, get.offset)


def pull(device: FieldDevice, digest: str, size_bytes: int) -> bytes:
    parts = []
    for offset in range(0, size_bytes, 65536):
        get = wire.Get(digest=digest, offset=offset, length=min(65536, size_bytes - offset))
        chunk = device.repeat(get, wire.Chunk, partial(answers, get))
        parts.append(chunk.data)
    return b"".join(parts)


def test_what_one_device_uploads_another_finds_and_pulls_once_it_is_approved(
    running: Field, broker: Broker, broker_users: dict[str, str]
) -> None:
    catalogue, a = running
    data = bundle(1, dim=400)
    digest = a.upload(data)
    with FieldDevice("device-b", (broker.host, broker.port), broker_users["device-b"]) as b:
        b.join()
        get = wire.Get(digest=digest, offset=0, length=100)
        assert b.repeat(get, wire.Missing, lambda m: m.digest == digest).reason == "it is candidate"
        catalogue.client.post("adapters", digest[:8], "approve", body={})
        small = bundle(2)
        near = a.upload(small)
        catalogue.client.post("adapters", near[:8], "approve", body={})
        (candidate,) = b.search(2)
        public_key = catalogue_key(catalogue)
        statement = verify_statement(candidate.statement, candidate.signature, public_key)
        assert statement.digest == near
        verify_bundle(statement, pull(b, near, len(small)))
        assert pull(b, digest, len(data)) == data


def catalogue_key(catalogue: CatalogueProcess) -> str:
    """The public key, as the catalogue printed it where devices' configuration is written."""
    result = CliRunner().invoke(
        driftkeel, ["catalogue", "public-key", "--config", str(catalogue.config)]
    )
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_a_rollback_reaches_the_device_and_is_confirmed_by_its_report(running: Field) -> None:
    catalogue, device = running
    answer = catalogue.client.post("devices", "device-a", "rollback", body={"wait_s": 60})
    assert answer["confirmed"]
    assert (answer["was"], answer["generation"]) == (2, 1)
    assert (device.generation, device.pinned) == (1, True)
    answer = catalogue.client.post("devices", "device-a", "unpin", body={"wait_s": 60})
    assert answer["confirmed"]
    assert not device.pinned


def test_a_device_that_was_away_hears_what_is_wanted_when_it_is_back(
    running: Field, broker: Broker, broker_users: dict[str, str]
) -> None:
    catalogue, device = running
    device.obedient = False
    answer = catalogue.client.post("devices", "device-a", "rollback", body={"wait_s": 0})
    assert not answer["confirmed"]
    device.obedient = True
    report = device.report_message()
    device.repeat(report, wire.Desired, lambda d: d.version == answer["desired"]["version"])
    catalogue.wait_until(
        lambda found: found["devices"][0]["reported"]["desired_version"] == device.version > 0
    )
    assert device.generation == 1


def test_a_device_that_vanishes_is_offline_and_back_when_it_speaks(
    running: Field, broker: Broker, broker_users: dict[str, str]
) -> None:
    catalogue, device = running
    assert catalogue.client.get("devices", "device-a")["online"]
    link = device._link
    assert link._client is not None
    sock = link._client.socket()
    assert isinstance(sock, socket.socket)
    # Cut off without a farewell: the broker tells of it, not the device.
    sock.shutdown(socket.SHUT_RDWR)
    catalogue.wait_until(lambda found: not found["devices"][0]["online"])
    device.wait_connected()
    device.join()
    catalogue.wait_until(lambda found: found["devices"][0]["online"])


FOREIGN = [
    b"",
    b"\x02" + msgspec.msgpack.encode({"id": "a" * 8, "type": "report"}),
    b"\x01not a map",
    b"\x01" + b"\x91" * 3000,
    b"\x01" + msgspec.msgpack.encode({"id": "a" * 8, "type": "exec"}),
    b"\x01" + bytes(wire.MAX_MESSAGE_BYTES - 1),
]


def test_malformed_messages_are_audited_and_do_no_harm(running: Field) -> None:
    catalogue, device = running
    for payload in FOREIGN:
        device.say_bytes(payload)
    device.say(
        wire.Register(device="device-b", encoder="f" * 64, software="in somebody else's name")
    )
    refused = catalogue.refusals(len(FOREIGN) + 1)
    assert {entry["who"] for entry in refused} == {"device-a"}
    assert "protocol version 2" in refused[1]["detail"]
    assert "device-b" in refused[-1]["detail"]
    assert [row["name"] for row in catalogue.client.get("devices")] == ["device-a"]
    device.join()


def test_a_message_over_the_limit_never_ends_the_catalogue(
    running: Field, broker: Broker, broker_users: dict[str, str]
) -> None:
    """Either the broker throws the sender out, or the catalogue refuses what it got."""
    catalogue, device = running
    client = device._link._client
    assert client is not None
    client.publish(wire.up_topic("device-a"), bytes(wire.MAX_MESSAGE_BYTES * 4), qos=1)
    device.wait_connected()
    device.join()
    assert catalogue.client.get("devices", "device-a")["online"]


def test_an_upload_survives_a_killed_catalogue(running: Field) -> None:
    catalogue, device = running
    data = bundle(3, dim=600)
    # The first chunk arrives, the rest never leaves the device before the kill.
    device.answering.clear()
    digest = device.offer(data)
    get = device.hears(wire.Get)
    device.say(device._sender.answer(get))
    ranges = catalogue.state / "incoming" / f"{digest}.ranges"
    # What it answers next was handled after the chunk.
    device.repeat(device.report_message(), wire.Ack, lambda _: len(ranges.read_bytes()) > 20)
    catalogue.kill()
    assert ranges.exists()
    device._heard.clear()
    device.answering.set()
    catalogue.start()
    # It was written down that the device owes this bundle: no second offer is needed.
    assert device.hears(wire.OfferResult).stored
    asked = {m.offset for m in device._heard if isinstance(m, wire.Get)}
    assert asked, "the rest was asked for"
    assert get.offset not in asked, "what had come was not asked for again"
    (adapter,) = catalogue.client.get("adapters")
    assert adapter["digest"] == digest
    assert list((catalogue.state / "incoming").iterdir()) == []


def test_everything_acknowledged_is_there_after_a_kill(running: Field) -> None:
    catalogue, device = running
    digest = device.upload(bundle(4))
    catalogue.client.post("adapters", digest, "approve", body={"reason": "tried it"})
    device.obedient = False
    catalogue.client.post("devices", "device-a", "rollback", body={"wait_s": 0})
    before = catalogue.client.get("log")
    catalogue.kill()
    catalogue.start()
    assert catalogue.client.get("log") == before
    assert catalogue.client.get("adapters", digest)["status"] == "approved"
    assert catalogue.client.get("devices", "device-a")["desired"]["generation"] == 1


def test_the_catalogue_waits_for_a_broker_that_is_down_and_outlives_one_that_goes_away(
    tmp_path: Path, broker_kind: Kind, broker_users: dict[str, str]
) -> None:
    with start_broker(tmp_path / "first", broker_users, kind=broker_kind) as broker:
        where = (broker.host, broker.port)
    with CatalogueProcess(tmp_path / "catalogue", where, broker_users["catalogue"]) as catalogue:
        # Operators are served without it, and what they want is kept.
        assert catalogue.client.get("devices") == []
        with FieldDevice("device-a", where, broker_users["device-a"], waits=False) as device:
            for attempt in range(2):
                with start_broker(
                    tmp_path / f"again-{attempt}", broker_users, port=where[1], kind=broker_kind
                ):
                    device.wait_connected()
                    device.join()
                    device.upload(bundle(10 + attempt))
    assert len(set(device.bundles)) == 2


def test_a_second_catalogue_on_the_same_state_is_refused(running: Field) -> None:
    catalogue, _ = running
    second = CatalogueProcess(catalogue.config.parent, ("127.0.0.1", 1), "")
    second.state = catalogue.state
    with pytest.raises(AssertionError, match="is in use by process"):
        second.start()
    second.__exit__()
    assert catalogue.client.get("devices")


def test_it_ends_in_order_when_told_to_and_says_nowhere_that_it_listens(running: Field) -> None:
    catalogue, _ = running
    assert (catalogue.state / "http.json").exists()
    assert catalogue.stop() == 0
    assert not (catalogue.state / "http.json").exists()
    assert "Traceback" not in catalogue.log


def test_key_and_token_are_readable_by_their_owner_only(running: Field) -> None:
    catalogue, _ = running
    for name in ("catalogue.key", "operator.token"):
        assert stat.S_IMODE(os.stat(catalogue.state / name).st_mode) == 0o600  # noqa: PTH116


def test_a_backup_taken_while_it_runs_can_be_started(
    running: Field, broker: Broker, broker_users: dict[str, str], tmp_path: Path
) -> None:
    """The commands of docs/catalogue.md, in their order."""
    catalogue, device = running
    digest = device.upload(bundle(5))
    catalogue.client.post("adapters", digest, "approve", body={})
    before = catalogue.client.get("adapters")
    where = (broker.host, broker.port)
    restored = CatalogueProcess(tmp_path / "restored", where, broker_users["catalogue"])
    restored.state.mkdir()
    with (
        closing(sqlite3.connect(catalogue.state / "catalogue.db")) as source,
        closing(sqlite3.connect(restored.state / "catalogue.db")) as copy,
    ):
        source.backup(copy)
    shutil.copytree(catalogue.state / "blobs", restored.state / "blobs")
    for name in ("catalogue.key", "operator.token"):
        shutil.copy2(catalogue.state / name, restored.state / name)
    key = catalogue_key(catalogue)
    device.upload(bundle(6))
    catalogue.kill()
    with restored:
        assert restored.client.get("adapters") == before
        assert catalogue_key(restored) == key
        device.join()
        (candidate,) = device.search(5)
        assert verify_statement(candidate.statement, candidate.signature, key).digest == digest


def test_a_database_from_a_newer_version_is_refused_unchanged(running: Field) -> None:
    catalogue, _ = running
    assert catalogue.stop() == 0
    path = catalogue.state / "catalogue.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(AssertionError, match=r"'9999'.*install the version that wrote it"):
        catalogue.start()
    assert path.read_bytes() == before
