"""What operators can do, what it leaves behind, and what is refused."""

import threading

import msgspec
import pytest

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from adapter_store.trust import verify_statement
from cloud.errors import ConflictError, NotFoundError
from cloud.models import BundleRow


def running(report: wire.Report, bundle: str) -> wire.Report:
    """A report of a device that runs a bundle in generation 2."""
    generations = [msgspec.structs.replace(g, bundles=[bundle]) for g in report.generations]
    return msgspec.structs.replace(report, generations=generations)


def test_a_rollback_wants_the_generation_before_the_running_one(desk, make_report) -> None:
    desk.say("device-a", make_report())
    result = desk.operators.steer("op", "rollback", "device-a")
    assert result["desired"] == {"version": 1, "generation": 1, "pinned": True}
    ((device, desired),) = desk.pushed
    assert (device, desired.version, desired.generation, desired.pinned) == ("device-a", 1, 1, True)
    assert desk.operators.device("device-a")["desired"] == result["desired"]


def test_a_confirmed_rollback_says_what_runs_as_the_device_reported(desk, make_report) -> None:
    desk.say("device-a", make_report())

    def obey(device: str, desired: wire.Desired) -> None:
        report = make_report(sequence=2, desired_version=desired.version, generation=1, pinned=True)
        desk.say(device, report)

    desk.on_push = obey
    result = desk.operators.steer("op", "rollback", "device-a", wait_s=5)
    assert result["confirmed"]
    assert (result["was"], result["generation"], result["problem"]) == (2, 1, "")
    assert result["message"].startswith(
        "device-a runs generation 1 (was 2), pinned, confirmed in 0."
    )


def test_a_rollback_waits_for_a_report_on_another_thread(desk, make_report) -> None:
    desk.say("device-a", make_report())
    pushed = threading.Event()
    desk.on_push = lambda *_: pushed.set()

    def device() -> None:
        assert pushed.wait(20)
        desk.say("device-a", make_report(sequence=2, generation=2, desired_version=0))
        desk.say("device-a", make_report(sequence=3, generation=1, desired_version=1, pinned=True))

    thread = threading.Thread(target=device)
    thread.start()
    result = desk.operators.steer("op", "rollback", "device-a", wait_s=30)
    thread.join()
    assert result["confirmed"]
    assert result["generation"] == 1


def test_a_rollback_that_the_device_cannot_do_is_told(desk, make_report) -> None:
    desk.say("device-a", make_report())
    desk.on_push = lambda device, desired: desk.say(
        device,
        make_report(sequence=2, desired_version=desired.version, problem="generation 1 is damaged"),
    )
    result = desk.operators.steer("op", "rollback", "device-a", wait_s=5)
    assert result["problem"] == "generation 1 is damaged"
    assert "device-a cannot: generation 1 is damaged" in result["message"]


def test_a_problem_that_has_nothing_to_do_with_it_does_not_make_a_rollback_fail(
    desk, make_report
) -> None:
    desk.say("device-a", make_report())
    desk.on_push = lambda device, desired: desk.say(
        device,
        make_report(
            sequence=2,
            desired_version=desired.version,
            generation=1,
            pinned=True,
            problem="training ran out of memory",
        ),
    )
    result = desk.operators.steer("op", "rollback", "device-a", wait_s=5)
    assert result["confirmed"]
    assert result["problem"] == ""


def test_an_offline_device_is_told_when_it_comes_back(desk, make_report) -> None:
    desk.say("device-a", make_report())
    desk.say_raw(wire.presence_topic("device-a"), b"offline")
    result = desk.operators.steer("op", "rollback", "device-a", to=1)
    assert not result["confirmed"]
    assert "device-a is offline: not confirmed yet" in result["message"]
    message = wire.Register(device="device-a", encoder="a" * 64, software="x")
    desired, _ = desk.say("device-a", message)
    assert (desired.version, desired.generation) == (1, 1)


def test_pin_holds_what_runs_and_unpin_lets_go(desk, make_report) -> None:
    desk.say("device-a", make_report())
    assert desk.operators.steer("op", "pin", "device-a")["desired"] == {
        "version": 1,
        "generation": 2,
        "pinned": True,
    }
    assert desk.operators.steer("op", "unpin", "device-a")["desired"] == {
        "version": 2,
        "generation": None,
        "pinned": False,
    }


def test_what_is_wanted_survives_a_restart(config, open_another, make_report) -> None:
    desk = open_another(config)
    desk.say("device-a", make_report())
    desk.operators.steer("op", "rollback", "device-a")
    again = desk.restart()
    desired, _ = again.say("device-a", make_report(sequence=2))
    assert (desired.version, desired.generation, desired.pinned) == (1, 1, True)
    again.store.close()


def test_a_catalogue_restored_from_a_backup_goes_beyond_what_devices_applied(
    desk, make_report
) -> None:
    desk.say("device-a", make_report(desired_version=41))
    assert desk.operators.steer("op", "pin", "device-a")["desired"]["version"] == 42


@pytest.mark.parametrize(
    "case",
    [
        ("rollback", "device-z", None, NotFoundError, "no device 'device-z'; known devices: dev"),
        ("pin", "", None, NotFoundError, "no device ''"),
        ("rollback", "device-a", 7, ConflictError, "has no generation 7; it reports 1, 2"),
        ("rollback", "fresh", None, ConflictError, "has not reported yet what it runs"),
        ("pin", "fresh", None, ConflictError, "has not reported yet what it runs"),
        ("rollback", "first", None, ConflictError, "runs generation 1 and keeps no older one"),
    ],
)
def test_what_cannot_be_done_is_refused_and_audited(desk, make_report, case) -> None:
    action, name, to, error, says = case
    desk.say("device-a", make_report())
    desk.say("first", make_report("first", generation=1))
    desk.register("fresh")
    before = [device["desired"] for device in desk.operators.devices()]
    with pytest.raises(error, match=says):
        desk.operators.steer("eve", action, name, to=to)
    assert desk.log() == [("eve", action, name, "refused")]
    assert [device["desired"] for device in desk.operators.devices()] == before
    assert desk.pushed == []


def test_approving_signs_a_statement_that_devices_believe(desk, make_bundle) -> None:
    desk.register()
    digest = desk.approved(make_bundle(1))
    with desk.store.reading() as session:
        row = session.get(BundleRow, digest)
        blob, signed = row.statement, row.statement_signature
    statement = verify_statement(blob, signed, desk.store.key.public_key)
    assert statement.digest == digest
    assert statement.labels == ("cat", "dog")


def test_quarantine_takes_the_statement_away_and_names_who_runs_it(
    desk, make_bundle, make_report
) -> None:
    desk.register()
    digest = desk.approved(make_bundle(1))
    desk.say("device-b", running(make_report("device-b"), digest))
    row = desk.operators.judge("op", "quarantine", digest[:8], "misreads zeros")
    assert (row["status"], row["run_by"]) == ("quarantined", ["device-b"])
    assert desk.store.log()[-1]["detail"] == "misreads zeros"
    with desk.store.reading() as session:
        assert session.get(BundleRow, digest).statement is None
    assert desk.operators.judge("op", "approve", digest)["status"] == "approved"


def test_what_is_retired_stays_so(desk, make_bundle) -> None:
    desk.register()
    digest = desk.approved(make_bundle(1))
    desk.operators.judge("op", "retire", digest)
    with pytest.raises(ConflictError, match="retired and stays so"):
        desk.operators.judge("op", "approve", digest)
    assert desk.operators.adapter(digest)["status"] == "retired"


def test_a_bundle_damaged_on_the_disk_is_not_approved(desk, make_bundle) -> None:
    desk.register()
    desk.upload(make_bundle(1))
    digest = bundle_digest(make_bundle(1))
    desk.store.blobs.path(digest).write_bytes(b"?")
    with pytest.raises(ConflictError, match="damaged"):
        desk.operators.judge("op", "approve", digest)
    assert desk.operators.adapter(digest)["status"] == "candidate"
    assert desk.log()[-1] == ("op", "approve", digest, "refused")


def test_an_ambiguous_or_unknown_id_is_refused(desk, make_bundle) -> None:
    desk.register()
    digests = []
    for number in range(17):
        desk.upload(make_bundle(number))
        digests.append(bundle_digest(make_bundle(number)))
    first = [digest[0] for digest in digests]
    shared = next(letter for letter in first if first.count(letter) > 1)
    with pytest.raises(NotFoundError, match="several adapters begin with"):
        desk.operators.judge("op", "approve", shared)
    for unknown in ("", "x", "%", "_", digests[0] + "0"):
        with pytest.raises(NotFoundError, match="no adapter"):
            desk.operators.judge("op", "approve", unknown)
    assert desk.operators.adapter(digests[0].upper()[:20])["digest"] == digests[0]


def test_adapters_are_listed_by_status(desk, make_bundle) -> None:
    desk.register()
    approved = desk.approved(make_bundle(1))
    desk.upload(make_bundle(2))
    assert [a["digest"] for a in desk.operators.adapters("approved")] == [approved]
    assert len(desk.operators.adapters()) == 2
    assert desk.operators.counts()["adapters_candidate"] == 1
    with pytest.raises(ConflictError, match="no status 'new'; use one of candidate"):
        desk.operators.adapters("new")


def test_text_in_the_audit_log_cannot_move_a_terminal(desk, make_bundle) -> None:
    desk.register()
    desk.upload(make_bundle(1))
    desk.operators.judge("op\x1b[2J", "approve", bundle_digest(make_bundle(1)), "a\nb\ud800")
    entry = desk.store.log()[-1]
    assert entry["who"] == "op\\x1b[2J"
    assert entry["detail"] == "a\\nb\\ud800"
