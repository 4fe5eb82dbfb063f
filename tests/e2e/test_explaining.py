"""Why an alarm fired reaches the operator, over a real broker, whoever was away in between."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Learned
from tests.e2e.harness import KNOWN, SHIFTED_B, Plant, kill
from tests.e2e.waiting import until

pytestmark = pytest.mark.e2e


def test_an_alarm_is_explained_to_the_operator_as_on_the_device(
    plant: Plant, fitted: Path, tmp_path: Path
) -> None:
    """The device alarms while there is no catalogue and is killed before there is one."""
    plant.place("device-b", fitted)
    device = plant.start("device-b")
    device.until_connected()
    device.send(KNOWN.first(48))
    sent = {answer["sample_id"] for answer in device.send(SHIFTED_B)}
    until(lambda: device.sync()["outbox"], "the explanation to be owed", device.child)
    kill(device.child)

    catalogue = plant.start_catalogue()
    device = plant.start("device-b")
    until(lambda: device.sync()["outbox"] == 0, "the debt to be settled", catalogue, device.child)
    asked = ("ood", "explain", "device-b", "1", "--config", str(plant.config("catalogue")))
    kept = json.loads(plant.run(*asked, "--json"))
    own = ("ood", "explain", "1", "--config", str(plant.config("device-b")))
    here = json.loads(plant.run(*own, "--json"))
    # What came after the alarm went on; what raised it stays.
    for name in ("episode", "kind", "seqs", "evidence", "alarm_at", "onset_seq", "alarm_seq"):
        assert kept[name] == here[name], name
    assert kept["kind"] == plant.shell_json("device device-b")["reported"]["episode"]["kind"] != ""
    assert kept["evidence"][-1] >= kept["alarm_at"]
    assert set(kept["examples"]) <= sent

    drawn = tmp_path / "why.svg"
    words = plant.run(*asked, "--plot", str(drawn))
    assert words.splitlines()[: len(kept["words"])] == kept["words"]
    assert drawn.read_text("utf-8").startswith("<?xml")
    assert plant.shell("explain device-b 1") == words
    assert "there are: 1" in plant.refused(*asked[:3], "2", *asked[4:])
    assert "no device 'nobody'" in plant.refused("ood", "explain", "nobody", *asked[3:])
    assert device.failed == 0


def test_what_was_learned_alone_is_explained_later(plant: Plant, learned: Learned) -> None:
    catalogue = plant.start_catalogue()
    plant.place("device-a", learned.state)
    device = plant.start("device-a")
    until(lambda: device.sync()["outbox"] == 0, "the debts to be settled", catalogue, device.child)
    assert "The alarm fired at sample" in plant.shell("explain device-a 1")
