from __future__ import annotations

import numpy as np
import pytest

from ood.frames import frame_facts
from ood.known import Known
from ood.measures import FEATURE_MEASURES, LOOK_MEASURES, measures
from ood.statistics import ClassStatistics, l2_normalise

DIM, CLASSES = 24, 6
CENTRES = np.random.default_rng(7).normal(size=(CLASSES + 3, DIM))


def samples(which: range, n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    of = rng.choice(list(which), n)
    return CENTRES[of] + 0.25 * rng.normal(size=(n, DIM)), [f"c{k}" for k in of]


def pictures(n: int, seed: int, noise: float = 0.0) -> np.ndarray:
    """Smooth pictures, with noise of so many grey levels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 200, (n, 3, 3, 3))
    smooth = np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)
    return np.clip(smooth + noise * rng.normal(size=smooth.shape), 0, 255).astype(np.uint8)


def known(frames: int = 60) -> Known:
    fit, labels = samples(range(CLASSES), 400, 0)
    held, _ = samples(range(CLASSES), 200, 1)
    facts = frame_facts(pictures(frames, 3)) if frames else ()
    return Known([ClassStatistics.fit(l2_normalise(fit), labels)], l2_normalise(held), facts)


def window(which: range, moved: float = 0.0) -> np.ndarray:
    found, _ = samples(which, 90, 2)
    return l2_normalise(found + moved * np.random.default_rng(3).normal(size=DIM))


def test_known_classes_that_moved_keep_their_arrangement_and_new_ones_have_another() -> None:
    world = known()
    moved = measures(window(range(CLASSES), 1.2), world)
    new = measures(window(range(CLASSES, CLASSES + 3)), world)
    assert moved["foreign"] > 0.8
    assert new["foreign"] > 0.8
    for name in ("alignment", "far_alignment", "margin", "covariance"):
        assert moved[name] > new[name], name


def test_known_samples_lie_where_their_classes_do() -> None:
    found = measures(window(range(CLASSES)), known())
    assert found["alignment"] > 0.9
    assert found["covariance"] > 0.9
    assert abs(found["margin"]) < 0.2
    assert found["displacement"] == pytest.approx(np.log(0.01))


def test_noise_shows_in_the_look_and_clean_pictures_show_none() -> None:
    world, rows = known(), window(range(CLASSES))
    clean = measures(rows, world, frame_facts(pictures(90, 4)))
    noisy = measures(rows, world, frame_facts(pictures(90, 4, noise=20.0)))
    assert set(clean) == {*FEATURE_MEASURES, *LOOK_MEASURES}
    assert noisy["look_noise"] > clean["look_noise"] + 1.0
    assert noisy["look_scale"] > clean["look_scale"]


@pytest.mark.parametrize("frames", [0, 19])
def test_without_enough_known_frames_the_look_says_nothing(frames: int) -> None:
    found = measures(window(range(CLASSES)), known(frames), frame_facts(pictures(90, 4)))
    assert set(found) == set(FEATURE_MEASURES)


def test_facts_of_the_first_version_say_nothing_about_the_look() -> None:
    facts = frame_facts(pictures(90, 4))
    facts[5] = type(facts[5]).from_bytes(facts[5].to_bytes()[:40])
    assert set(measures(window(range(CLASSES)), known(), facts)) == set(FEATURE_MEASURES)


def test_the_order_of_samples_changes_nothing() -> None:
    world, rows = known(), window(range(CLASSES), 0.5)
    shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
    assert measures(rows, world) == pytest.approx(measures(shuffled, world), abs=1e-5)


def test_one_class_one_dimension_and_constant_features_are_measured() -> None:
    one = Known([ClassStatistics.fit(np.ones((9, 1)), ["a"] * 9)], np.ones((9, 1)))
    values = measures(np.full((16, 1), -1.0), one)
    assert np.isfinite(list(values.values())).all()
