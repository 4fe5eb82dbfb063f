"""Of thousands of classes those near a sample decide how foreign it is."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ood.combined import CombinedScore
from ood.detector import Detector
from ood.errors import OodError
from ood.mixture import Mixture
from ood.nearby import NearbyScore
from ood.shortlist import Shortlist
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

DIM, CLASSES = 24, 300


def drawn(centres: NDArray[np.float64], each: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    rows = np.repeat(centres, each, axis=0)
    return l2_normalise(rows + 0.2 * rng.normal(size=rows.shape))


@pytest.fixture(scope="module")
def centres() -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(size=(CLASSES, DIM))


@pytest.fixture(scope="module")
def known(centres: NDArray[np.float64]) -> ClassStatistics:
    labels = [f"class {k:03d}" for k in range(CLASSES) for _ in range(12)]
    return ClassStatistics.fit(drawn(centres, 12, 1), labels)


@pytest.fixture(scope="module")
def foreign() -> NDArray[np.float32]:
    return l2_normalise(np.random.default_rng(9).normal(size=(200, DIM)))


def test_a_list_of_everything_gives_the_default_score(known, centres, foreign) -> None:
    head = GaussianHead.from_statistics([known])
    reference, parts = drawn(centres[:60], 1, 2), (8, 16)
    every = Shortlist(head, candidates=CLASSES, directions=DIM)
    ours = NearbyScore(head, every, reference, parts=parts).score(foreign)
    whole = CombinedScore(head, reference, parts=parts).score(foreign)
    assert np.allclose(ours, whole, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="module")
def detector(known, centres) -> Detector:
    return Detector.fit([known], drawn(centres, 1, 3), false_alarm_every=1000, parts=(8, 16))


def test_a_device_with_many_classes_has_it(detector, known) -> None:
    assert isinstance(detector.scorer, NearbyScore)
    few = ClassStatistics.fit(np.eye(4), list("aabb"))
    small = Detector.fit([few], np.tile(np.eye(4), (25, 1)), false_alarm_every=1000)
    assert isinstance(small.scorer, CombinedScore)


def test_it_tells_foreign_samples_from_known_ones(detector, centres, foreign) -> None:
    test = drawn(centres, 1, 4)
    assert np.median(detector.score(foreign)) > np.quantile(detector.score(test), 0.95)
    assert abs(float(np.mean(detector.p_values(detector.score(test)))) - 0.5) < 0.1


def test_what_was_seen_already_gives_the_same_scores(detector, foreign) -> None:
    seen = detector.mixture.evidence(foreign)
    assert np.array_equal(detector.score(foreign, seen), detector.score(foreign))


def test_a_sample_scores_alone_as_in_a_batch_to_the_last_bit(detector, foreign) -> None:
    alone = np.concatenate([detector.score(row[None]) for row in foreign[:20]])
    assert np.array_equal(alone, detector.score(foreign)[:20])


def test_a_short_list_scores_almost_as_a_list_of_everything(known, centres, foreign) -> None:
    head, reference = GaussianHead.from_statistics([known]), drawn(centres[:60], 1, 2)
    rows = np.vstack([drawn(centres, 1, 5), foreign])
    ours = NearbyScore(head, Shortlist(head, candidates=40), reference).score(rows)
    whole = CombinedScore(head, reference).score(rows)
    assert np.corrcoef(ours, whole)[0, 1] > 0.99


def test_parts_that_do_not_add_up_are_refused(known) -> None:
    head = GaussianHead.from_statistics([known])
    with pytest.raises(OodError, match=r"parts \[8, 8\] do not add up to dimension 24"):
        NearbyScore(head, Shortlist(head), head.means[:9], parts=(8, 8))


def test_nothing_is_held_for_every_pair_of_components(known) -> None:
    head = Mixture.from_statistics([known]).head
    score = NearbyScore(head, Shortlist(head), l2_normalise(head.means[:90]))
    held = [value for value in vars(score).values() if isinstance(value, np.ndarray)]
    assert max(array.size for array in held) <= CLASSES * DIM
