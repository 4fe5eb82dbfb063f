"""What a codec leaves of an adapter is small, known in advance and the same everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.codecs import CODECS, MAX_NUMBERS, decode, encode, encoded_size, quantised
from adapter_store.errors import BundleTooLargeError, CorruptBundleError, NonFiniteBundleError

# Of a tensor of normal numbers: the largest relative root mean squared error.
ERRORS = {"fp32": 0, "fp16": 4e-4, "int8": 0.011, "int4": 0.11, "int2": 0.36, "int1": 0.62}
SHAPES = {"a/up": (192, 16), "a/down": (16, 192), "a/bias": (192,), "b/kernel": (8, 4, 3, 3)}


def adapter(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_keeps_shapes_and_the_error_it_promises(codec) -> None:
    before = adapter()
    data = encode(before, codec)
    after = decode(data, SHAPES, codec)
    assert len(data) == encoded_size(SHAPES, codec)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == np.float32
        assert after[name].shape == tensor.shape
        assert after[name].flags.writeable
        error = np.linalg.norm(after[name] - tensor) / np.linalg.norm(tensor)
        assert error <= ERRORS[codec]


def test_each_codec_is_smaller_than_the_one_before() -> None:
    sizes = [encoded_size(SHAPES, codec) for codec in CODECS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 20


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    shape=st.lists(st.integers(1, 6), max_size=4),
    scale=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_scale_survives_and_reads_alike_twice(codec, shape, scale, seed) -> None:
    before = {"x": np.asarray(np.random.default_rng(seed).normal(size=shape) * scale, np.float32)}
    data = encode(before, codec)
    first, second = (decode(data, {"x": tuple(shape)}, codec)["x"] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    bound = np.abs(before["x"]).max() + 1e-6
    assert np.abs(first - before["x"]).max() <= bound


def test_the_order_of_tensors_changes_nothing() -> None:
    before = adapter()
    assert encode(dict(reversed(before.items())), "int4") == encode(before, "int4")


def test_what_is_decoded_is_the_same_bits_on_every_machine() -> None:
    data = bytes(np.arange(encoded_size({"x": (3, 40)}, "int4"), dtype=np.uint8))
    values = decode(data, {"x": (3, 40)}, "int4")["x"]
    assert values.astype("<f4").tobytes() == values.tobytes()
    half = np.float32(7.5)
    steps = np.frombuffer(data[:6], "<f2").astype(np.float32)
    nibbles = np.frombuffer(data[6:], np.uint8)
    codes = np.stack([nibbles >> 4, nibbles & 15], axis=1).reshape(3, 40).astype(np.float32)
    assert np.array_equal(values, (codes - half) * steps[:, None])
    assert len(hashlib.sha256(values.tobytes()).hexdigest()) == 64


def test_rounding_follows_the_units_of_the_rank_whichever_axis_they_are() -> None:
    down = adapter()["a/down"] * np.logspace(-3, 0, 16, dtype=np.float32)[:, None]
    both = quantised({"down": down, "up": np.ascontiguousarray(down.T)}, "int4")
    assert np.array_equal(both["up"], both["down"].T)
    weak = np.linalg.norm(both["down"][0] - down[0]) / np.linalg.norm(down[0])
    assert weak <= ERRORS["int4"] * 1.2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_both_ways(value) -> None:
    broken = adapter()
    broken["a/up"][3, 3] = value
    for codec in CODECS:
        with pytest.raises(NonFiniteBundleError, match="a/up"):
            encode(broken, codec)
    with pytest.raises(NonFiniteBundleError, match="x"):
        decode(np.float32(value).tobytes(), {"x": (1,)}, "fp32")
    with pytest.raises(NonFiniteBundleError, match="x"):
        decode(np.float16(value).tobytes() + b"\xff", {"x": (1,)}, "int8")


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "int2", "int1"])
def test_numbers_out_of_a_codecs_range_are_refused(codec) -> None:
    with pytest.raises(NonFiniteBundleError, match="store it as fp32"):
        encode({"x": np.full((2, 2), 1e20, np.float32)}, codec)


def test_shapes_that_do_not_fit_the_bytes_are_refused_before_memory_is_taken() -> None:
    data = encode(adapter(), "int8")
    for shapes in ({}, {**SHAPES, "more": (1,)}, {**SHAPES, "a/bias": (191,)}):
        with pytest.raises(CorruptBundleError, match="need"):
            decode(data, shapes, "int8")
    with pytest.raises(CorruptBundleError, match="empty"):
        decode(b"", {"x": (0, 5)}, "int8")
    for shape in ((MAX_NUMBERS + 1,), (2**40, 2**40)):
        with pytest.raises(BundleTooLargeError, match="numbers"):
            decode(b"", {"x": shape}, "int1")
