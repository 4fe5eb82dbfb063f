"""Random projections are the same for everybody, and random."""

from __future__ import annotations

import numpy as np
import pytest

from ood.errors import OodError
from ood.projection import gaussian_matrix


def test_everybody_draws_the_same_projection() -> None:
    matrix = gaussian_matrix(3, 4, seed="digest", purpose="test")
    assert np.array_equal(matrix, gaussian_matrix(3, 4, seed="digest", purpose="test"))
    assert not np.array_equal(matrix, gaussian_matrix(3, 4, seed="other", purpose="test"))


def test_its_numbers_are_standard_normal() -> None:
    large = gaussian_matrix(200, 101, seed="digest", purpose="test")
    assert abs(large.mean()) < 0.02
    assert abs(large.std() - 1) < 0.02


def test_an_empty_seed_is_refused() -> None:
    with pytest.raises(OodError, match="seed is empty"):
        gaussian_matrix(3, 4, seed="", purpose="test")
