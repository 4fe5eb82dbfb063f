"""A sample as the encoder saw it: what the journal keeps so that the device can learn from it.

An image is scaled to the encoder's input size once; that is what is served and what is packed,
without loss, so that preparing it again gives the numbers that were served. The agent packs,
the learner and trials unpack.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapter_store.errors import StoreError
from exporter.errors import PreprocessError

_LEVEL: Final = 1  # a higher level costs more time per request than the disk is worth


def scale_images(images: NDArray[np.uint8], image_size: int) -> NDArray[np.uint8]:
    """Scale images to the encoder's input size (bicubic, antialiased), as serving does.

    Args:
        images: uint8 [n, h, w, 3].
        image_size: The encoder's input side, in pixels.

    Returns:
        uint8 [n, image_size, image_size, 3]; the same array when nothing is to do.

    Raises:
        PreprocessError: The array is empty or of another type or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise PreprocessError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [n, h, w, 3]"
        )
    if not images.size:
        raise PreprocessError(f"images of shape {list(images.shape)} are empty; send at least one")
    if images.shape[1:3] == (image_size, image_size):
        return images
    scaled = np.empty((len(images), image_size, image_size, 3), np.uint8)
    for row, image in enumerate(images):
        resized = Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
        scaled[row] = np.asarray(resized)
    return scaled


def pack_snapshots(images: NDArray[np.uint8]) -> list[bytes]:
    """Pack scaled images, uint8 [n, s, s, 3]: one packed image a sample."""
    return [zlib.compress(image.tobytes(), _LEVEL) for image in images]


def unpack_snapshots(snapshots: Iterable[bytes], image_size: int) -> NDArray[np.uint8]:
    """Unpack images packed for the same encoder: uint8 [n, image_size, image_size, 3].

    Raises:
        StoreError: A snapshot is damaged, or was made for another input size.
    """
    expected = image_size * image_size * 3
    images = []
    for snapshot in snapshots:
        try:
            pixels = zlib.decompressobj().decompress(snapshot, expected + 1)
        except zlib.error as error:
            raise StoreError(f"a journalled image is damaged: {error}") from error
        if len(pixels) != expected:
            raise StoreError(
                f"a journalled image has {len(pixels)} bytes, expected {expected} for "
                f"{image_size} px; it was kept for another encoder"
            )
        images.append(np.frombuffer(pixels, dtype=np.uint8))
    return np.array(images, dtype=np.uint8).reshape(-1, image_size, image_size, 3)
