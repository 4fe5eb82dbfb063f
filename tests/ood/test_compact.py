"""Statistics travel in under 4 KB a class; what comes back is a head as good, whatever arrives."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.compact import factor_bytes, from_bytes, to_bytes
from ood.errors import OodError
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise


def _statistics(classes: int, per_class: int, dim: int, seed: int = 0) -> ClassStatistics:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.exp(-np.arange(dim) * 6 / dim)[:, None]
    centres = np.repeat(rng.normal(size=(classes, dim)), per_class, axis=0)
    features = l2_normalise(centres + rng.normal(size=(classes * per_class, dim)) @ mix)
    names = [f"{k:03d}" for k in range(classes)]
    return ClassStatistics.fit(features, np.repeat(names, per_class).tolist())


small = st.builds(
    _statistics, st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99)
)


@pytest.mark.parametrize("dim", [192, 576])
@pytest.mark.parametrize("classes", [1, 2, 10, 100])
@pytest.mark.parametrize("per_class", [1, 12])
def test_a_class_takes_at_most_4_kb_at_192_dimensions(dim, classes, per_class) -> None:
    data = to_bytes(_statistics(classes, per_class, dim))
    assert len(data) <= classes * 4096 * dim / 192


@settings(max_examples=40, deadline=None)
@given(small)
def test_variances_come_back_and_the_scatter_is_a_sum_of_squares(before) -> None:
    after = from_bytes(before.labels, to_bytes(before))
    assert after.labels == before.labels
    assert np.array_equal(after.counts, before.counts)
    assert np.isclose(np.trace(after.scatter), np.trace(before.scatter), rtol=1e-9)
    diagonal = np.diagonal(before.scatter)
    assert np.allclose(np.diagonal(after.scatter), diagonal, rtol=5e-3, atol=1e-6 * diagonal.max())
    least = np.linalg.eigvalsh(after.scatter).min()
    assert least >= -1e-12 * np.trace(after.scatter)
    spread = np.ptp(before.means, axis=0).max()
    assert np.abs(after.means - before.means).max() <= 0.05 * spread + 1e-3


@settings(max_examples=20, deadline=None)
@given(small)
def test_the_same_statistics_give_the_same_bytes(statistics) -> None:
    assert to_bytes(statistics) == to_bytes(statistics)


def test_what_is_read_is_the_same_statistics_for_the_head() -> None:
    whole = [_statistics(10, 40, 64, seed) for seed in range(4)]
    read = [from_bytes(group.labels, to_bytes(group)) for group in whole]
    before, after = (GaussianHead.from_statistics(groups) for groups in (whole, read))
    rows = np.vstack([group.means for group in whole])
    a, b = before.distances(rows), after.distances(rows)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98
    assert np.array_equal(a.argmin(axis=1), b.argmin(axis=1))


def test_more_bytes_give_a_closer_scatter() -> None:
    before = _statistics(10, 40, 96)
    errors = [
        np.linalg.norm(
            from_bytes(before.labels, to_bytes(before, budget=b)).scatter - before.scatter
        )
        for b in (0, 4, 12, 48)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_the_budget_grows_with_the_classes() -> None:
    budgets = [factor_bytes(classes) for classes in range(1, 101)]
    assert budgets == sorted(budgets)


@settings(max_examples=30, deadline=None)
@given(small)
def test_bytes_cut_or_added_anywhere_are_refused(statistics) -> None:
    data = to_bytes(statistics)
    for broken in (data[:-1], data[:10], b"", data + b"x", b"DKC2" + data[4:]):
        with pytest.raises(OodError):
            from_bytes(statistics.labels, broken)
    with pytest.raises(OodError):
        from_bytes((*statistics.labels, "z"), data)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_bytes_give_an_error_or_sound_statistics(data) -> None:
    statistics = _statistics(3, 5, 6)
    broken = bytearray(to_bytes(statistics))
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(OodError):
        after = from_bytes(statistics.labels, bytes(broken))
        assert np.isfinite(after.scatter).all()
        assert np.isfinite(after.means).all()
        least = np.linalg.eigvalsh(after.scatter).min()
        assert least >= -1e-9 * np.trace(after.scatter)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data) -> None:
    with pytest.raises(OodError):
        from_bytes(("a",), data)


def test_statistics_over_the_range_are_refused() -> None:
    for scale in (1e6, 1e9):
        statistics = ClassStatistics.fit(np.eye(3) * scale, ["a", "a", "b"])
        with pytest.raises(OodError, match="too large"):
            to_bytes(statistics)
    wide = ClassStatistics.fit(np.ones((1, 2049)), ["a"])
    with pytest.raises(OodError, match="2048"):
        to_bytes(wide)


@pytest.mark.parametrize("rows", [[[0.5]], [[0.5, 0.5]] * 5, [[0.1, 0.0], [0.9, 0.0]]])
def test_statistics_without_any_variance_travel(rows) -> None:
    before = ClassStatistics.fit(rows, ["a"] * len(rows))
    after = from_bytes(before.labels, to_bytes(before))
    assert np.allclose(after.scatter, before.scatter, rtol=2e-3)
    assert np.allclose(after.means, before.means, rtol=1e-3)
