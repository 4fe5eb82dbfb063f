"""p-values are super-uniform; quantiles and fits say how well unlabelled samples suit a bundle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.calibration import QUANTILES, Calibration, fits, score_quantiles
from ood.errors import OodError

finite = st.floats(-1e6, 1e6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.sampled_from([0.05, 0.2, 0.5]))
def test_p_values_are_super_uniform_over_exchangeable_scores(pool, level) -> None:
    # Any one of the n + 1 scores is as likely to be the new one: averaged over that choice,
    # P(p <= level) is at most level, ties included.
    pool = [*pool, 0]
    hits = sum(
        bool(Calibration([*pool[:i], *pool[i + 1 :]]).p_values([pool[i]])[0] <= level)
        for i in range(len(pool))
    )
    assert hits <= level * len(pool) + 1e-9


def test_randomised_p_values_are_uniform_with_ties() -> None:
    rng = np.random.default_rng(0)
    p_values = np.concatenate(
        [
            Calibration(rng.integers(0, 4, 20)).p_values(rng.integers(0, 4, 1), rng)
            for _ in range(4000)
        ]
    )
    for level in (0.05, 0.25, 0.5, 0.9):
        assert abs((p_values <= level).mean() - level) < 0.03


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=1, max_size=40), st.lists(finite, min_size=1, max_size=20))
def test_p_values_fall_as_scores_rise_whatever_the_order(scores, probes) -> None:
    probes = sorted(probes)
    p_values = Calibration(scores).p_values(probes)
    assert (np.diff(p_values) <= 0).all()
    assert ((p_values > 0) & (p_values <= 1)).all()
    assert np.array_equal(p_values, Calibration(scores[::-1]).p_values(probes))


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=1, max_size=200))
def test_quantiles_are_a_manifest_s_ascending_101(scores) -> None:
    quantiles = score_quantiles(scores)
    assert len(quantiles) == QUANTILES
    assert quantiles == sorted(quantiles)
    assert fits(scores, quantiles) >= 0.94 - 1 / len(scores)


def test_own_samples_fit_and_foreign_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    quantiles = score_quantiles(rng.normal(size=300))
    assert fits(rng.normal(size=1000), quantiles) > 0.9
    assert fits(rng.normal(loc=8, size=1000), quantiles) == 0.0


@pytest.mark.parametrize("bad", [[], [np.nan], [[1.0]], ["x"], [np.inf]])
def test_unusable_scores_are_refused(bad) -> None:
    for call in (Calibration, score_quantiles, Calibration([1.0]).p_values):
        with pytest.raises(OodError):
            call(bad)


@pytest.mark.parametrize("bad", [[], [0.0] * 100, [1.0, *[0.0] * 100], [np.nan] * 101])
def test_unusable_quantiles_are_refused(bad) -> None:
    with pytest.raises(OodError, match="quantiles"):
        fits([1.0], bad)
