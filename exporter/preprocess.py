"""From bytes somebody sent to the encoder's input, refusing what is not a sample.

The daemon calls `decode_sample` on a request's body and `prepare` before the prefix. Decoding reads
headers before it allocates; every refusal says what was found, what was expected and what to do.
"""

from __future__ import annotations

import io
import math
import struct
import threading
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from exporter.errors import PreprocessError
from exporter.package import EncoderPackage

Images = npt.NDArray[np.uint8]

MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 25
"""Most pixels of one request, over all its images: 33 million, 100 MB decoded."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_NPY_MAGIC = b"\x93NUMPY"
_NPY_SHAPES = "[h, w], [h, w, c] or [n, h, w, c] with c 1, 3 or 4"
# NumPy reads a header with Python's parser, which in CPython 3.11 now and then fails with a
# SystemError when two threads are in it at once (seen once in some 200,000 requests).
_PARSING = threading.Lock()
_SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


def decode_sample(data: bytes, content_type: str = "") -> Images:
    """Decodes an image file or a NumPy `.npy` array into RGB images.

    An image file (BMP, GIF, JPEG, PNG, PPM, TIFF, WebP; its first frame) is turned upright by its
    EXIF orientation; grey is repeated to three channels, transparency is dropped. An array is
    [h, w], [h, w, c] or [n, h, w, c] with c 1, 3 or 4, in uint8 or in floats from 0 to 1.

    Args:
        data: The file.
        content_type: What the sender calls it. Only a claim that contradicts the bytes matters.

    Returns:
        uint8 [n, h, w, 3], n = 1 for an image file.

    Raises:
        PreprocessError: Empty, too large, truncated, of an unknown kind, of another shape or
            type, or with values that are not finite or out of range.
    """
    if not data:
        raise PreprocessError("the sample is empty; send an image file or a .npy array")
    if len(data) > MAX_BYTES:
        raise PreprocessError(
            f"the sample has {len(data)} bytes, the limit is {MAX_BYTES}; send fewer or smaller"
        )
    if data.startswith(_NPY_MAGIC):
        return _from_array(_decode_npy(data))
    if "npy" in content_type or "numpy" in content_type:
        raise PreprocessError(
            f"the sample was sent as {content_type} but does not begin as a .npy file; "
            "write it with numpy.save"
        )
    return _decode_image(data)[None]


def prepare(images: Images, package: EncoderPackage) -> npt.NDArray[np.float32]:
    """Resizes and normalises images for an encoder.

    Both sides are scaled to the encoder's (bicubic, antialiased), whatever the proportions.

    Args:
        images: uint8 [n, h, w, 3].
        package: The encoder.

    Returns:
        float32 [n, 3, s, s], contiguous.

    Raises:
        PreprocessError: The array is not uint8 [n, h, w, 3] or has an empty side.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise PreprocessError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [n, h, w, 3]"
        )
    n, height, width, _ = images.shape
    if n and not height * width:
        raise PreprocessError(f"images of {width} x {height} pixels are empty")
    size = package.image_size
    if (height, width) != (size, size):
        resized = np.empty((n, size, size, 3), np.uint8)
        for row, image in enumerate(images):
            scaled = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            resized[row] = np.asarray(scaled)
        images = resized
    # One multiplication and one addition a value: (x / 255 - mean) / std.
    std = np.asarray(package.manifest.std, np.float32)
    scale = np.float32(1 / 255) / std
    shift = -np.asarray(package.manifest.mean, np.float32) / std
    planes = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    planes *= scale[:, None, None]
    planes += shift[:, None, None]
    return planes


def _decode_image(data: bytes) -> Images:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(*image.size)
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise PreprocessError(
            f"the sample ({len(data)} bytes) is no image and no .npy array; "
            f"send one of {', '.join(FORMATS)}, or a file that numpy.save wrote"
        ) from error
    except Image.DecompressionBombError as error:
        raise PreprocessError(f"the image is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise PreprocessError(f"the image is truncated or damaged: {error}") from error


def _rgb(image: Image.Image) -> Images:
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PreprocessError("the image has values beyond 16 bits; send 8 or 16 bits")
        return _repeated((values // 257).astype(np.uint8)[..., None])
    if image.mode == "F":
        raise PreprocessError(
            "the image holds floating-point values of unknown range; send 8 or 16 bits"
        )
    return np.asarray(image.convert("RGB"))


def _decode_npy(data: bytes) -> npt.NDArray[np.generic]:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if reader is None:
            raise PreprocessError(f"the .npy array is of format {version}; save it as 1.0 or 2.0")
        with _PARSING:
            shape, columns_first, dtype = reader(file)
        begin = file.tell()
        body = len(data) - begin
    except (ValueError, EOFError, SyntaxError) as error:
        raise PreprocessError(f"the .npy array has a damaged header: {error}") from error
    if dtype != np.uint8 and dtype.kind != "f":
        raise PreprocessError(
            f"the .npy array holds {dtype}, expected uint8, or floats from 0 to 1"
        )
    _check_npy_shape(shape)
    if body != math.prod(shape) * dtype.itemsize:
        raise PreprocessError(
            f"the .npy array has {body} bytes of values, its header says "
            f"{math.prod(shape) * dtype.itemsize}; it was truncated or has something appended"
        )
    flat: npt.NDArray[np.generic] = np.frombuffer(data, dtype, offset=begin)
    return flat.reshape(shape[::-1]).T if columns_first else flat.reshape(shape)


def _check_npy_shape(shape: tuple[int, ...]) -> None:
    shown = list(shape)
    if len(shape) not in {2, 3, 4}:
        raise PreprocessError(f"the array has shape {shown}, expected {_NPY_SHAPES}")
    if min(shape) < 1:
        raise PreprocessError(f"the array has shape {shown}, which is empty; send {_NPY_SHAPES}")
    if len(shape) > 2 and shape[-1] not in {1, 3, 4}:
        hint = ""
        if shape[-3] in {1, 3, 4}:
            hint = "; channels go last: numpy.moveaxis(array, -3, -1)"
        elif len(shape) == 3:
            hint = "; for a batch of grey images add an axis: array[..., None]"
        raise PreprocessError(f"the array has shape {shown}, expected {_NPY_SHAPES}{hint}")
    sides = shape if len(shape) == 2 else shape[-3:-1]
    images = shape[0] if len(shape) == 4 else 1
    _check_pixels(sides[1], sides[0] * images)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PreprocessError(
            f"the sample has {width} x {height} pixels, the limit is {MAX_PIXELS} in all; "
            "send fewer or smaller images"
        )
    if width < 1 or height < 1:
        raise PreprocessError(f"the image of {width} x {height} pixels is empty")


def _from_array(array: npt.NDArray[np.generic]) -> Images:
    if array.dtype != np.uint8:
        values = array.astype(np.float64)
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise PreprocessError(
                f"the array has {bad} of {values.size} values that are NaN or infinite"
            )
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            raise PreprocessError(
                f"the array's values run from {low:g} to {high:g}, expected floats from 0 to 1; "
                "divide by the largest value possible, or send uint8"
            )
        array = np.rint(values * 255).astype(np.uint8)
    pixels = array.astype(np.uint8, copy=False)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3:
        pixels = pixels[None]
    return _repeated(pixels)


def _repeated(pixels: Images) -> Images:
    """Makes [..., c] with c 1, 3 or 4 into contiguous RGB: grey repeated, transparency dropped."""
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3])
