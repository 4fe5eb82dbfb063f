"""What the journal keeps of an image is what was served, to the last bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import StoreError
from edge_agent.snapshot import pack_snapshots, scale_images, unpack_snapshots
from exporter.errors import PreprocessError
from exporter.preprocess import prepare


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_loses_nothing(n: int, height: int, width: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    scaled = scale_images(images, 16)
    assert np.array_equal(unpack_snapshots(pack_snapshots(scaled), 16), scaled)


def test_a_scaled_image_prepares_to_what_the_original_does(package) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
    scaled = scale_images(images, package.image_size)
    assert np.array_equal(prepare(scaled, package), prepare(images, package))


def test_a_damaged_or_foreign_snapshot_is_refused() -> None:
    packed = pack_snapshots(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(StoreError, match="another encoder"):
        unpack_snapshots(packed, 16)
    with pytest.raises(StoreError, match="damaged"):
        unpack_snapshots([b"junk"], 8)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 0, 8, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_batch_of_images_is_refused(images: np.ndarray) -> None:
    with pytest.raises(PreprocessError):
        scale_images(images, 8)
