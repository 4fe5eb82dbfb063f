"""The detector of a generation: quiet at home, quick abroad, the same after a restart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ood.alarm import Alarm, AlarmState
from ood.calibration import fits
from ood.detector import Detector
from ood.errors import OodError
from ood.projection import gaussian_matrix
from ood.scores import MahalanobisScore
from ood.statistics import ClassStatistics, l2_normalise


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits through a fixed random layer, shuffled; enough of an encoder to test with."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    layer = gaussian_matrix(64, 128, seed="layer", purpose="test")
    features = np.maximum(data.images.reshape(-1, 64)[order] / 16 @ layer, 0)
    return l2_normalise(features), data.target[order]


@pytest.fixture(scope="module")
def detector(digits: tuple[np.ndarray, np.ndarray]) -> Detector:
    features, target = digits
    known = features[target < 5]
    labels = [str(digit) for digit in target[target < 5]]
    statistics = ClassStatistics.fit(known[:300], labels[:300])
    return Detector.fit([statistics], known[300:450], false_alarm_every=1e6)


def _watch(
    detector: Detector, state: AlarmState, features: np.ndarray
) -> tuple[AlarmState, Alarm | None]:
    return detector.update(state, detector.score(features), detector.nearest(features))


def test_known_digits_raise_no_alarm_and_new_ones_do(digits, detector) -> None:
    features, target = digits
    home = features[target < 5][450:]
    abroad = features[target >= 5]
    state, alarm = _watch(detector, detector.initial_state(), home)
    assert alarm is None
    state, alarm = _watch(detector, state, abroad)
    assert alarm is not None
    assert alarm.at - len(home) <= 64
    assert abs(alarm.onset - len(home)) <= 16


def test_one_class_alone_raises_no_alarm(digits, detector) -> None:
    features, target = digits
    known, names = features[target < 5][450:], target[target < 5][450:]
    for digit in range(5):
        assert _watch(detector, detector.initial_state(), known[names == digit])[1] is None


def test_p_values_and_fit_tell_home_from_abroad(digits, detector) -> None:
    features, target = digits
    home = detector.score(features[target < 5][450:])
    abroad = detector.score(features[target >= 5])
    assert np.median(detector.p_values(abroad)) < 0.05 < np.median(detector.p_values(home))
    assert fits(home, detector.quantiles()) > 0.85
    assert fits(abroad, detector.quantiles()) < 0.6
    drawn = detector.p_values(home, np.random.default_rng(0))
    assert (drawn <= detector.p_values(home)).all()


def test_the_same_generation_gives_the_same_detector_to_the_bit(digits, detector) -> None:
    features, target = digits
    known = features[target < 5]
    labels = [str(digit) for digit in target[target < 5]]
    again = Detector.fit(
        [ClassStatistics.fit(known[:300], labels[:300])], known[300:450], false_alarm_every=1e6
    )
    state, _ = _watch(detector, detector.initial_state(), known[450:500])
    restored = again.restore(json.loads(json.dumps(state.to_dict())))
    assert restored == state
    rest = known[500:550]
    assert _watch(again, restored, rest) == _watch(detector, state, rest)


def test_another_generation_starts_without_evidence_but_counts_on(digits, detector) -> None:
    features, target = digits
    everything = [str(digit) for digit in target]
    wider = Detector.fit(
        [ClassStatistics.fit(features[:600], everything[:600])],
        features[600:700],
        false_alarm_every=1e6,
    )
    state, _ = _watch(detector, detector.initial_state(), features[:30])
    restored = wider.restore(state.to_dict())
    assert restored.seen == 30
    assert wider.test.evidence(restored) == 0.0
    assert wider.test.accepts(restored)


def test_the_score_does_not_know_the_samples_that_calibrate_the_alarm(digits, detector) -> None:
    features, target = digits
    known, labels = features[target < 5], [str(digit) for digit in target[target < 5]]
    statistics = ClassStatistics.fit(known[:300], labels[:300])
    calibration = known[300:450].copy()
    others = np.arange(len(calibration)) % 4 != 0
    calibration[others] = known[450:600][others]
    changed = Detector.fit([statistics], calibration, false_alarm_every=1e6)
    probe = features[600:700]
    assert np.array_equal(changed.score(probe), detector.score(probe))
    assert not np.array_equal(changed.calibration.scores, detector.calibration.scores)
    assert len(changed.calibration.scores) == others.sum()


def test_with_few_held_out_samples_the_score_is_the_distance(digits) -> None:
    features, target = digits
    known, labels = features[target < 5], [str(digit) for digit in target[target < 5]]
    statistics = ClassStatistics.fit(known[:300], labels[:300])
    few = Detector.fit([statistics], known[300:379], false_alarm_every=1e6)
    plain = MahalanobisScore.from_statistics([statistics]).score(features[600:700])
    assert np.array_equal(few.score(features[600:700]), plain)
    assert len(few.calibration.scores) == 79


def test_the_detector_shares_its_mixture(detector) -> None:
    assert detector.mixture.labels == ("0", "1", "2", "3", "4")


def test_what_does_not_fit_is_refused(detector) -> None:
    statistics = ClassStatistics.fit([[1.0, 0.0], [0.0, 1.0]], ["a", "b"])
    for features in (np.zeros((0, 2)), [[np.nan, 0.0]], [[1.0]]):
        with pytest.raises(OodError):
            Detector.fit([statistics], features, false_alarm_every=100)
    with pytest.raises(OodError):
        Detector.fit([statistics], [[1.0, 0.0]], false_alarm_every=0)
    with pytest.raises(OodError):
        Detector.fit([], [[1.0, 0.0]], false_alarm_every=100)
    with pytest.raises(OodError):
        detector.score([[1.0]])
    with pytest.raises(OodError):
        detector.restore({})


def test_dimension_one_and_one_calibration_sample_work() -> None:
    tiny = Detector.fit([ClassStatistics.fit([[1.0]], ["a"])], [[1.0]], false_alarm_every=100)
    _, alarm = _watch(tiny, tiny.initial_state(), np.array([[1.0]]))
    assert alarm is None
    assert tiny.p_values(tiny.score([[-1.0]])).tolist() == [0.5]
