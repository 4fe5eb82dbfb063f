"""Numbers survive a few bits as well as theory says, and codes pack to exactly their bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.errors import OodError
from ood.quantiser import (
    NORMAL_ERROR,
    pack_codes,
    packed_size,
    quantise_rows,
    restore_rows,
    unpack_codes,
)

BITS = range(1, 9)


@pytest.mark.parametrize("bits", BITS)
def test_normal_numbers_lose_what_the_best_uniform_quantiser_loses(bits) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 4000)) * [[1e-3], [0.1], [1], [30]]
    restored = restore_rows(*quantise_rows(rows, bits), bits)
    error = np.square(restored - rows).mean(axis=1) / np.square(rows).mean(axis=1)
    assert (error <= 1.2 * NORMAL_ERROR[bits]).all()


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 100))
    restored = restore_rows(*quantise_rows(rows, 1), 1)
    assert np.array_equal(np.sign(restored), np.sign(rows))
    assert np.allclose(np.abs(restored), np.abs(rows).mean(axis=1)[:, None], rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    row=st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=20),
)
def test_no_row_loses_more_than_rounding_to_equal_steps_over_its_range(bits, row) -> None:
    rows = np.array([row])
    restored = restore_rows(*quantise_rows(rows, bits), bits)
    bound = np.abs(rows).max() / (2**bits - 1)
    assert np.sqrt(np.square(restored - rows).mean()) <= 1.01 * bound + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_codes_come_back_from_exactly_their_bits(bits, rows, columns, seed) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    data = pack_codes(codes, bits)
    assert len(data) == packed_size(rows, columns, bits) == rows * -(-columns * bits // 8)
    assert np.array_equal(unpack_codes(data, rows, columns, bits), codes)
    with pytest.raises(OodError, match="bytes"):
        unpack_codes(data + b"x", rows, columns, bits)


def test_zeros_stay_zeros_and_what_a_step_cannot_hold_is_refused() -> None:
    assert not restore_rows(*quantise_rows(np.zeros((2, 5)), 4), 4).any()
    with pytest.raises(OodError, match="do not fit"):
        quantise_rows(np.full((1, 3), 1e12), 8)
