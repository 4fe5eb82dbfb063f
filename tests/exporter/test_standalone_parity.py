"""What may differ between a model and a device, and what may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.errors import ParityError
from exporter.standalone_parity import Answers, compared
from ood.calibration import Calibration

CALIBRATION = Calibration(np.linspace(0.0, 1.0, 100))
SCORES = np.array([0.105, 0.505])


def outputs(**changes: Any) -> dict[str, NDArray[Any]]:
    """A model's outputs that are the device's, but for what is changed."""
    found = {
        "label": np.array([0, 1]),
        "probabilities": np.array([[0.8, 0.2], [0.3, 0.7]], np.float32),
        "adapter": np.array([-1, 0]),
        "ood_score": SCORES.astype(np.float32),
        "ood_p_value": CALIBRATION.p_values(SCORES).astype(np.float32),
        "base_evidence": np.array([[10.0, 2.0], [0.0, 1.0]], np.float32),
    }
    return found | changes


DEVICE = Answers(
    label=np.array([0, 1]),
    probability=np.array([0.8, 0.7]),
    adapter=np.array([-1, 0]),
    score=SCORES,
    evidence={"base_evidence": np.array([[10.0, 2.0], [0.0, np.nan]])},
)


def test_a_model_that_says_the_same_passes_and_the_report_says_so() -> None:
    report = compared("noise", DEVICE, outputs(), CALIBRATION)
    assert (report.samples, report.labels_changed, report.adapters_changed) == (2, 0, 0)
    assert report.adapted == 1
    assert report.probability.largest < 1e-6
    said = list(report.lines())
    assert said[0].startswith("noise: probabilities differ by")
    assert any("scores differ" in line for line in said)
    assert any("log-likelihoods differ" in line for line in said)


def test_what_was_not_asked_is_not_compared() -> None:
    evidence = np.array([[10.0, 2.0], [0.0, 9e9]], np.float32)
    report = compared("noise", DEVICE, outputs(base_evidence=evidence), CALIBRATION)
    assert report.evidence is not None
    assert report.evidence.largest < 1e-6


def test_a_tie_may_be_decided_otherwise_and_is_counted() -> None:
    tied = np.array([[0.5001, 0.4999], [0.3, 0.7]], np.float32)
    device = replace(DEVICE, label=np.array([1, 1]), probability=np.array([0.5, 0.7]))
    report = compared("noise", device, outputs(probabilities=tied), CALIBRATION)
    assert report.labels_changed == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": np.array([[0.79, 0.21], [0.3, 0.7]])}, "probability differs"),
        ({"probabilities": np.full((2, 2), np.nan)}, "probability differs"),
        ({"ood_score": SCORES + 0.01}, "OOD score differs"),
        (
            {"ood_p_value": CALIBRATION.p_values(SCORES) * [1.0, 0.5]},
            "p-value is not the device's for 1 of 2",
        ),
        ({"ood_p_value": np.full(2, np.nan)}, "p-value is not the device's for 2 of 2"),
        ({"base_evidence": np.array([[10.1, 2.0], [0.0, 1.0]])}, "base evidence differs"),
        ({"base_evidence": np.full((2, 2), np.nan)}, "base evidence differs"),
    ],
)
def test_what_differs_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        compared("noise", DEVICE, outputs(**changes), CALIBRATION)


def test_a_p_value_may_step_where_a_score_is_within_its_tolerance_of_the_next() -> None:
    # One of the calibration's scores is 0.5050505: the device's is below, the model's above.
    device = replace(DEVICE, score=np.array([0.105, 0.50505]))
    near = np.array([0.105, 0.505051])
    changed = outputs(ood_score=near, ood_p_value=CALIBRATION.p_values(near))
    assert changed["ood_p_value"][1] != CALIBRATION.p_values(device.score)[1]
    compared("noise", device, changed, CALIBRATION)


def test_without_a_score_none_is_compared() -> None:
    found = {k: v for k, v in outputs().items() if not k.startswith("ood")}
    assert compared("noise", DEVICE, found, None).score is None
