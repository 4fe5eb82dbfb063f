"""Clusters are found without chance, whatever the order of the points."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.clusters import clusters


def test_groups_far_apart_are_found_with_their_shares() -> None:
    rng = np.random.default_rng(0)
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = np.repeat(places, [50, 30, 20], axis=0) + 0.1 * rng.normal(size=(100, 2))
    centres, shares = clusters(points, 3)
    assert np.allclose(centres, places, atol=0.1)
    assert np.allclose(shares, [0.5, 0.3, 0.2])


def test_equal_points_are_one_cluster() -> None:
    centres, shares = clusters(np.ones((5, 3)), 4)
    assert centres.tolist() == [[1.0, 1.0, 1.0]]
    assert shares.tolist() == [1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 15))
def test_the_centres_average_to_the_mean_in_any_order(seed, n, count) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 4))
    centres, shares = clusters(points, count)
    assert len(centres) <= min(n, count)
    assert np.isclose(shares.sum(), 1)
    assert np.allclose(shares @ centres, points.mean(axis=0))
    other, others_shares = clusters(points[::-1].copy(), count)
    assert np.allclose(np.sort(shares), np.sort(others_shares))
    assert np.allclose(np.sort(centres, axis=0), np.sort(other, axis=0))
