"""The shift detector an agent carries: score, p-value and sequential alarm of one generation.

Built from a generation's class statistics and its held-out calibration features, so it need not be
stored: the same generation gives the same detector. Holds no state of the stream; the caller keeps
the `AlarmState` and hands it back, before and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ood.alarm import Alarm, AlarmState, ShiftTest
from ood.calibration import Calibration, score_quantiles
from ood.combined import CombinedScore
from ood.mixture import BaseEvidence, Mixture
from ood.nearby import NearbyScore
from ood.scores import MahalanobisScore, Score
from ood.statistics import ClassStatistics
from ood.validation import FloatArray, check_features

# Of so many held-out samples one sets the scale of the score's views; the others calibrate. They
# must not be the same: the alarm's budget rests on a score that does not know its calibration set.
_REFERENCE_EVERY = 4
# With fewer, scales would be guesses, and the plain distance is the score.
_LEAST_CALIBRATION = 80


class Detector:
    """Scores samples and watches their stream; immutable.

    Attributes:
        mixture: the head of everything installed, shared with whoever classifies.
        scorer: what scores samples.
        calibration: the calibration scores.
        test: the sequential test.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> known = [ClassStatistics.fit(rng.normal(size=(50, 4)), ["a"] * 50)]
        >>> detector = Detector.fit(known, rng.normal(size=(80, 4)), false_alarm_every=1000)
        >>> foreign = rng.normal(loc=5.0, size=(20, 4))
        >>> scores, nearest = detector.score(foreign), detector.nearest(foreign)
        >>> state, alarm = detector.update(detector.initial_state(), scores, nearest)
        >>> alarm is not None
        True
    """

    def __init__(
        self, mixture: Mixture, scorer: Score, calibration: Calibration, test: ShiftTest
    ) -> None:
        self.mixture = mixture
        self.scorer = scorer
        self.calibration = calibration
        self.test = test

    @classmethod
    def fit(
        cls,
        groups: Sequence[ClassStatistics],
        calibration_features: npt.ArrayLike,
        *,
        false_alarm_every: float,
        block: int = 1,
        prior_changes: bool = False,
        parts: Sequence[int] = (),
    ) -> Detector:
        """Build the detector of a generation.

        Args:
            groups: the installed class statistics in base features, in canonical order.
            calibration_features: l2-normalised features [m, d] of known samples that are *not* in
                the statistics, drawn as the stream is; m ≥ 50 for an alarm that reacts, m ≥ 80 for
                `ood.combined` as the score; with fewer it is the Mahalanobis distance.
            false_alarm_every: the average number of samples between false alarms.
            block: how many samples one scene of the stream lasts; see `ood.alarm`.
            prior_changes: alarm when only the proportions of the classes change, too.
            parts: the widths of the parts that base features are put together from.

        Raises:
            OodError: the statistics or features are unusable, or the budget is out of range.
        """
        return cls.of(
            Mixture.from_statistics(groups),
            calibration_features,
            false_alarm_every=false_alarm_every,
            block=block,
            prior_changes=prior_changes,
            parts=parts,
        )

    @classmethod
    def of(
        cls,
        mixture: Mixture,
        calibration_features: npt.ArrayLike,
        *,
        false_alarm_every: float,
        block: int = 1,
        prior_changes: bool = False,
        parts: Sequence[int] = (),
    ) -> Detector:
        """Build the detector of a mixture; arguments and errors as for `fit`."""
        features = check_features(calibration_features, dim=mixture.head.dim)
        score: Score
        if len(features) < _LEAST_CALIBRATION:
            score = MahalanobisScore(mixture.head)
        else:
            reference = np.arange(len(features)) % _REFERENCE_EVERY == 0
            known, features = features[reference], features[~reference]
            if mixture.shortlist is None:
                score = CombinedScore(
                    mixture.head, known, parts=parts, classifier=mixture.discriminant
                )
            else:
                score = NearbyScore(mixture.head, mixture.shortlist, known, parts=parts)
        seen = mixture.evidence(features)
        scores = _scores(score, seen)
        test = ShiftTest(
            scores,
            false_alarm_every=false_alarm_every,
            class_of=seen.nearest(),
            block=block,
            prior_changes=prior_changes,
        )
        return cls(mixture, score, Calibration(scores), test)

    def score(self, features: npt.ArrayLike, seen: BaseEvidence | None = None) -> FloatArray:
        """Return how foreign each sample is, float64 [n]; higher is more foreign.

        Args:
            features: l2-normalised features [n, d].
            seen: what the mixture says of them, where that was asked already; it saves checking
                them and looking up a second time which components are near.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return _scores(self.scorer, seen or self.mixture.evidence(features))

    def nearest(self, features: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the component each sample is nearest to, int64 [n]; the alarm asks for it.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return self.mixture.evidence(features).nearest()

    def p_values(self, scores: npt.ArrayLike, rng: np.random.Generator | None = None) -> FloatArray:
        """Return each sample's conformal p-value, for reporting; see `Calibration.p_values`."""
        return self.calibration.p_values(scores, rng)

    def quantiles(self) -> list[float]:
        """Return the 101 quantiles of the calibration scores."""
        return score_quantiles(self.calibration.scores)

    def initial_state(self) -> AlarmState:
        """Return the alarm's state before the first sample."""
        return self.test.initial_state()

    def restore(self, fields: Mapping[str, Any]) -> AlarmState:
        """Return the state kept before a restart, or a fresh one if it is another detector's.

        A fresh one keeps counting samples and alarms where the old one stopped.

        Raises:
            OodError: the fields are no alarm state.
        """
        state = AlarmState.from_dict(fields)
        return state if self.test.accepts(state) else self.test.successor(state)

    def update(
        self, state: AlarmState, scores: npt.ArrayLike, nearest: npt.ArrayLike
    ) -> tuple[AlarmState, Alarm | None]:
        """Take in the next samples' scores and nearest components; see `ShiftTest.update`."""
        return self.test.update(state, scores, nearest)


def _scores(scorer: Score, seen: BaseEvidence) -> FloatArray:
    """The scores of samples a mixture has looked at; what it saw is not computed again."""
    if isinstance(scorer, CombinedScore):
        return scorer.score_rows(seen.rows, seen.logits)
    if isinstance(scorer, NearbyScore) and seen.look is not None:
        return scorer.score_seen(seen.rows, seen.look)
    return scorer.score(seen.rows)
