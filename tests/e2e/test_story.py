"""The main job, over each kind of broker: learn, upload, approve, pull, roll back, return."""

from pathlib import Path

import pytest

from cloud.broker import Kind
from examples.demo.digits import NEW
from tests.e2e.conftest import MakePlant
from tests.e2e.harness import SHIFTED, SHIFTED_B, WORLD_A, WORLD_B
from tests.e2e.waiting import until

pytestmark = pytest.mark.e2e


def test_what_one_device_learns_another_pulls_and_can_be_rolled_back(
    make_plant: MakePlant, broker_kind: Kind, fitted: Path
) -> None:
    plant = make_plant(broker_kind)
    catalogue = plant.start_catalogue()
    plant.place("device-a", fitted)
    plant.place("device-b", fitted)
    a = plant.start("device-a")
    new = WORLD_A.probe.only(NEW)
    assert a.accuracy(new) == 0.0

    a.shift(SHIFTED, labels=60)
    a.until_generation(2)
    assert a.accuracy(new) >= 0.7
    assert a.status()["trainings"] == 1
    (bundle,) = until(lambda: plant.bundles("candidate"), "the upload", catalogue, a.child)
    assert bundle["uploaded_by"] == "device-a"
    assert sorted(bundle["labels"]) == [str(k) for k in NEW]

    plant.shell(f"approve {bundle['digest'][:12]} --reason 'looks right'")
    b = plant.start("device-b")
    first = b.predictions()
    b.shift(SHIFTED_B)
    b.until_generation(2)
    assert b.status()["trainings"] == 0
    assert bundle["digest"] in {x["digest"] for x in b.status()["generation"]["bundles"]}
    assert b.accuracy(WORLD_B.probe.only(NEW)) >= 0.6
    second = b.predictions()

    back = plant.shell_json("rollback device-b --wait 60")
    assert (back["confirmed"], back["generation"], back["problem"]) == (True, 1, "")
    assert b.predictions() == first
    forth = plant.shell_json("rollback device-b --to 2 --wait 60")
    assert (forth["confirmed"], forth["generation"]) == (True, 2)
    assert b.predictions() == second

    b.child.stop()
    told = plant.shell_json("rollback device-b --wait 0")
    assert not told["confirmed"]
    b = plant.start("device-b")
    until(lambda: b.generation == 1, "device B to do what it was told while it was away", b.child)
    assert b.predictions() == first
    reported = until(
        lambda: (r := plant.shell_json("device device-b")["reported"])["generation"] == 1 and r,
        "device B's report",
        catalogue,
    )
    assert reported["pinned"]
    assert a.failed == b.failed == 0
