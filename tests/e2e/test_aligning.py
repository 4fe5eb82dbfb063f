"""A camera is replaced and labels come late: aligned at once, learned later, by real processes."""

from pathlib import Path

import pytest

from examples.demo.digits import FIRST
from tests.e2e.harness import KNOWN, LABELS, WORLD_A, Plant, kill
from tests.e2e.waiting import until

pytestmark = pytest.mark.e2e

CAMERA = WORLD_A.stream.only(FIRST).through_new_camera()


def test_a_device_aligns_until_labels_come_and_its_operator_sees_it(
    plant: Plant, fitted: Path
) -> None:
    plant.start_catalogue()
    plant.place("device-a", fitted)
    device = plant.start("device-a")
    device.send(KNOWN.first(48))
    answers = device.send(CAMERA.first(96))
    until(lambda: device.generation == 2, "device A to align", device.child)
    aligned, old = device.predictions(), device.accuracy(WORLD_A.probe.only(FIRST))
    assert old >= 0.9

    kill(device.child)
    device = plant.start("device-a")
    assert device.status()["generation"]["aligned"]
    assert device.predictions() == aligned
    device.until_connected()
    reported = until(
        lambda: (r := plant.shell_json("device device-a")["reported"])["generation"] == 2 and r,
        "device A's report",
        device.child,
    )
    assert reported["episode"]["state"] == "waiting_for_labels"
    assert "aligned, waiting for labels" in reported["episode"]["detail"]

    device.label(answers[: LABELS + 24], CAMERA)
    device.until_generation(3)
    assert not device.status()["generation"]["aligned"]
    assert device.accuracy(WORLD_A.probe.only(FIRST).through_new_camera()) >= 0.7
    assert device.failed == 0
