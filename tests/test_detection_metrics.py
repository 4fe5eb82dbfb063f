"""The benchmarks' AUROC, AUPR and FPR at 95 % TPR are what scikit-learn and OpenOOD compute."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from benchmarks.detection import aupr, auroc, fpr_at_95_tpr

_scores = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(_scores, _scores)
def test_they_are_the_references_with_ties_too(known: list[int], foreign: list[int]) -> None:
    truth = [0] * len(known) + [1] * len(foreign)
    scores = known + foreign
    assert auroc(known, foreign) == pytest.approx(roc_auc_score(truth, scores))
    assert aupr(known, foreign) == pytest.approx(average_precision_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert fpr_at_95_tpr(known, foreign) == pytest.approx(false[np.argmax(true >= 0.95)])


def test_scores_that_are_no_numbers_are_refused() -> None:
    for metric in (auroc, aupr, fpr_at_95_tpr):
        with pytest.raises(ValueError, match="NaN"):
            metric([np.nan], [1.0])
        with pytest.raises(ValueError, match="n ≥ 1"):
            metric([], [1.0])
