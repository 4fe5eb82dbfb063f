"""Searches see what the database holds: after an upload, a judgement, and a restart."""

from sqlalchemy import update

from adapter_store import wire
from cloud.models import BundleRow


def _found(desk, signature, encoder) -> int:
    message = wire.Search(encoder=encoder, signature=signature.to_bytes())
    (result,) = desk.say("device-a", message)
    return len(result.candidates)


def test_a_bundle_is_found_while_it_is_approved(desk, make_bundle, make_signature, encoder) -> None:
    desk.register()
    digest = desk.approved(make_bundle(1))
    assert _found(desk, make_signature(1), encoder) == 1
    desk.operators.judge("op", "quarantine", digest)
    assert _found(desk, make_signature(1), encoder) == 0
    desk.operators.judge("op", "approve", digest)
    assert _found(desk, make_signature(1), encoder) == 1


def test_a_restart_finds_the_same(desk, make_bundle, make_signature, encoder) -> None:
    desk.register()
    desk.approved(make_bundle(1))
    again = desk.restart()
    assert _found(again, make_signature(1), encoder) == 1
    again.store.close()


def test_a_signature_of_an_older_release_does_not_spoil_the_start(
    desk, make_bundle, make_signature, encoder
) -> None:
    desk.register()
    desk.approved(make_bundle(1))
    old = desk.approved(make_bundle(1, task="older"))
    with desk.store.writing() as session:
        session.execute(
            update(BundleRow).where(BundleRow.digest == old).values(signature=b"DKS1" + bytes(9))
        )
    again = desk.restart()
    assert _found(again, make_signature(1), encoder) == 1
    again.store.close()
