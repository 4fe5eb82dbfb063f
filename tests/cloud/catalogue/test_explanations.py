"""What devices explain is kept, bounded, made readable, and shown to operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select

from adapter_store import wire
from adapter_store.errors import DiskFullError
from adapter_store.explanation import Explanation
from cloud.errors import NotFoundError
from cloud.explanations import KEPT
from cloud.models import ExplanationRow
from cloud.printable import printable
from tests.adapter_store.explained import DOCUMENT, sent

UP = wire.up_topic("device-a")


def explained(episode: int = 3, **changes: Any) -> wire.Explained:
    document = DOCUMENT | {"episode": episode} | changes
    return wire.Explained(
        id=f"explanation-{episode}", explanation=msgspec.convert(document, Explanation)
    )


def test_an_explanation_is_kept_acknowledged_and_found_again_after_a_restart(desk) -> None:
    message = explained()
    (ack,) = desk.say("device-a", message)
    assert (ack.of, ack.ok) == (message.id, True)
    assert desk.operators.explanation("device-a", 3) == DOCUMENT
    again = desk.restart()
    assert again.operators.explanation("device-a", 3) == DOCUMENT
    again.store.close()


def test_explaining_twice_is_explaining_once_and_the_newest_counts(desk) -> None:
    desk.say("device-a", explained())
    (ack,) = desk.say("device-a", explained(kind="domain shift"))
    assert ack.ok
    assert desk.operators.explanation("device-a", 3)["kind"] == "domain shift"
    with desk.store.reading() as session:
        assert session.scalar(select(func.count()).select_from(ExplanationRow)) == 1


def test_only_the_newest_of_a_device_stay_and_others_are_left_alone(desk) -> None:
    desk.say("device-b", explained(1))
    for number in range(1, KEPT + 4):
        desk.unix_time += 1
        desk.say("device-a", explained(number))
    assert desk.operators.explanation("device-b", 1)["episode"] == 1
    for gone in (1, 2, 3):
        with pytest.raises(NotFoundError, match="there are: 4, 5"):
            desk.operators.explanation("device-a", gone)
    assert desk.operators.explanation("device-a", 4)["episode"] == 4


def test_a_device_that_counts_from_1_again_is_believed(desk) -> None:
    for number in range(100, 100 + KEPT):
        desk.say("device-a", explained(number))
    desk.unix_time += 1
    desk.say("device-a", explained(1))
    assert desk.operators.explanation("device-a", 1)["episode"] == 1


def test_nothing_that_a_terminal_acts_on_is_kept(desk) -> None:
    evil = "\x1b]0;owned\x07\u202e\n" * 10
    group = DOCUMENT["groups"][0] | {"nearest": evil}
    desk.say(
        "device-a",
        explained(words=[evil], kind="\x1b[2J", nearest=[[evil, 0.5]], groups=[group]),
    )
    found = desk.operators.explanation("device-a", 3)
    texts = [found["kind"], *found["words"], found["nearest"][0][0], found["groups"][0]["nearest"]]
    assert all(text == printable(text) for text in texts)
    assert msgspec.convert(found, Explanation).text().isascii()


def test_a_hostile_document_is_refused_noted_and_leaves_nothing(desk) -> None:
    assert desk.say_raw(UP, sent(evidence=[0.5, float("nan"), 1.0])) == []
    assert desk.log() == [("device-a", "message", UP, "refused")]
    assert desk.operators.devices() == []


def test_it_is_not_acknowledged_while_the_disk_is_full(desk, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise DiskFullError("no space left")

    monkeypatch.setattr("cloud.handlers.keep", full)
    assert desk.say("device-a", explained()) == []
    monkeypatch.undo()
    (ack,) = desk.say("device-a", explained())
    assert ack.ok


def test_what_is_not_there_is_named(desk) -> None:
    with pytest.raises(NotFoundError, match="no device 'device-a'"):
        desk.operators.explanation("device-a", 1)
    desk.register()
    with pytest.raises(NotFoundError, match=r"no explanation of episode 1 .* there are: none"):
        desk.operators.explanation("device-a", 1)


def test_a_database_of_the_version_before_keeps_its_devices(desk, config, open_another) -> None:
    desk.register()
    path = Path(config.state_dir) / "catalogue.db"
    with desk.store.writing() as session:
        connection = session.connection()
        connection.exec_driver_sql("DROP TABLE explanations")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    desk.store.close()
    assert path.exists()
    upgraded = open_another(config)
    assert upgraded.operators.device("device-a")["online"]
    upgraded.say("device-a", explained())
    assert json.loads(json.dumps(upgraded.operators.explanation("device-a", 3))) == DOCUMENT
    upgraded.store.close()
