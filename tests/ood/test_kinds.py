from __future__ import annotations

import numpy as np
import pytest

from ood.errors import OodError
from ood.frames import frame_facts
from ood.kinds import Kind, diagnose
from ood.known import Known
from ood.statistics import ClassStatistics, l2_normalise

DIM, CLASSES = 24, 6
CENTRES = np.random.default_rng(7).normal(size=(CLASSES + 3, DIM))


def samples(which: range | list[int], n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    of = rng.choice(list(which), n)
    return CENTRES[of] + 0.25 * rng.normal(size=(n, DIM)), [f"c{k}" for k in of]


def known(frames: bool = False) -> Known:
    fit, labels = samples(range(CLASSES), 400, 0)
    held, _ = samples(range(CLASSES), 200, 1)
    facts = frame_facts(pictures(60, 3)) if frames else ()
    return Known([ClassStatistics.fit(l2_normalise(fit), labels)], l2_normalise(held), facts)


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)


def test_compact_groups_far_from_every_class_are_new_classes_with_representatives() -> None:
    window, labels = samples(range(CLASSES, CLASSES + 3), 90, 2)
    found = diagnose(l2_normalise(window), known())
    assert found.kind is Kind.NEW_CLASSES
    assert len(found.clusters) == 3
    for cluster in found.clusters:
        assert len({labels[row] for row in cluster.representatives}) == 1
        assert cluster.distance > 1.5


def test_known_classes_that_all_moved_alike_are_a_domain_shift() -> None:
    window, _ = samples(range(CLASSES), 90, 2)
    moved = window + 1.2 * np.random.default_rng(3).normal(size=DIM)
    found = diagnose(l2_normalise(moved), known())
    assert found.kind is Kind.DOMAIN_SHIFT
    assert found.evidence


def test_known_classes_in_other_proportions_are_a_prior_change() -> None:
    window, _ = samples([0, 0, 0, 1], 64, 2)
    found = diagnose(l2_normalise(window), known())
    assert found.kind is Kind.PRIOR_CHANGE
    assert "'c0'" in found.evidence[1]


def test_frozen_frames_are_a_sensor_fault_whatever_the_features_say() -> None:
    window, _ = samples(range(CLASSES), 40, 2)
    frozen = frame_facts(np.repeat(pictures(1, 5), 40, axis=0))
    found = diagnose(l2_normalise(window), known(frames=True), frozen)
    assert found.kind is Kind.SENSOR_FAULT
    assert "39 frozen" in found.evidence[0]


def test_frames_that_were_refused_are_a_sensor_fault() -> None:
    window, _ = samples(range(CLASSES), 40, 2)
    assert diagnose(l2_normalise(window), known(), refused=30).kind is Kind.SENSOR_FAULT


def test_one_sample_is_unclear() -> None:
    window, _ = samples(range(CLASSES), 1, 2)
    assert diagnose(l2_normalise(window), known()).kind is Kind.UNCLEAR


def test_constant_features_and_one_known_class_give_a_diagnosis() -> None:
    constant = np.full((40, DIM), 0.2)
    one = Known([ClassStatistics.fit(constant, ["a"] * 40)], constant)
    assert diagnose(constant, one).kind in set(Kind)
    assert diagnose(-constant, one).kind in set(Kind)
    assert diagnose(constant, known()).kind in set(Kind)


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(OodError, match="NaN"):
        diagnose(np.full((20, DIM), np.nan), known())
    with pytest.raises(OodError, match="dimension 3"):
        diagnose(np.zeros((20, 3)), known())
    with pytest.raises(OodError, match="2 frames for 20"):
        diagnose(np.zeros((20, DIM)), known(), frame_facts(pictures(2, 0)))
