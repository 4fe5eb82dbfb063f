from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exporter import preprocess
from exporter.errors import PreprocessError
from exporter.package import EncoderPackage
from exporter.preprocess import decode_sample, prepare


def npy(array: object, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version=version)
    return file.getvalue()


def picture(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_image_files_give_their_pixels(kind: str) -> None:
    pixels = ramp(5, 7)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(
        decode_sample(picture(Image.fromarray(pixels), kind, **options)), pixels[None]
    )


def test_a_jpeg_is_turned_upright() -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left
    upright = decode_sample(picture(Image.fromarray(pixels), "JPEG", exif=exif))
    assert upright.shape == (1, 32, 16, 3)
    assert upright[0, :16].mean() > 200
    assert upright[0, 16:].mean() < 50


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    if mode in {"I;16", "I"}:
        kind = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray(np.full((4, 4), 65535, kind))
    else:
        image = Image.new("RGB", (4, 4), "white").convert(mode)
    decoded = decode_sample(picture(image, "TIFF" if mode in {"CMYK", "I"} else "PNG"))
    assert np.array_equal(decoded, np.full((1, 4, 4, 3), 255, np.uint8))


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.zeros((5, 6), np.uint8), (1, 5, 6, 3)),
        (np.zeros((5, 6, 1), np.uint8), (1, 5, 6, 3)),
        (np.zeros((5, 6, 3), np.uint8), (1, 5, 6, 3)),
        (np.zeros((5, 6, 4), np.uint8), (1, 5, 6, 3)),
        (np.zeros((2, 5, 6, 1), np.uint8), (2, 5, 6, 3)),
        (np.asfortranarray(np.zeros((2, 5, 6, 3), np.uint8)), (2, 5, 6, 3)),
        (np.zeros((5, 6), ">f4"), (1, 5, 6, 3)),
        (np.zeros((5, 6), np.float16), (1, 5, 6, 3)),
    ],
)
def test_arrays_of_every_documented_shape_are_read(
    array: npt.NDArray[np.generic], shape: tuple[int, ...]
) -> None:
    decoded = decode_sample(npy(array), "application/x-npy")
    assert decoded.shape == shape
    assert decoded.dtype == np.uint8


def test_floats_from_zero_to_one_are_the_bytes_they_came_from() -> None:
    pixels = ramp(9, 9)
    assert np.array_equal(decode_sample(npy(pixels / 255)), pixels[None])
    assert np.array_equal(decode_sample(npy((pixels / 255).astype(np.float32))), pixels[None])


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
NAN = np.full((4, 4), 0.5)
NAN[1, 1] = np.nan
HUGE = npy(np.zeros((4, 4), np.uint8)).replace(b"(4, 4), ", b"(99999999, 99999999), ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello, this is text", "no image and no .npy array"),
        (b"PK\x03\x04" + bytes(100), "no image"),
        (npy(NAN), "1 of 16 values that are NaN or infinite"),
        (npy(NAN * np.inf), "NaN or infinite"),
        (npy(NAN * 0 + [[np.inf] * 4] * 4), "NaN or infinite"),
        (npy(np.full((4, 4), 7.5)), "from 7.5 to 7.5, expected floats from 0 to 1"),
        (npy(np.full((4, 4), -0.1)), "from -0.1"),
        (npy(np.zeros(4)), r"shape \[4\], expected"),
        (npy(np.zeros(())), r"shape \[\], expected"),
        (npy(np.zeros((1, 2, 3, 4, 3))), "expected"),
        (npy(np.zeros((0, 4, 4, 3), np.uint8)), "is empty"),
        (npy(np.zeros((4, 0), np.uint8)), "is empty"),
        (npy(np.zeros((3, 8, 9), np.uint8)), "channels go last"),
        (npy(np.zeros((2, 3, 8, 9), np.uint8)), "channels go last"),
        (npy(np.zeros((7, 8, 9), np.uint8)), "batch of grey images"),
        (npy(np.zeros((4, 4), np.int64)), "holds int64"),
        (npy(np.zeros((4, 4), np.complex64)), "holds complex64"),
        (npy(np.zeros((4, 4), bool)), "holds bool"),
        (npy([["a"]]), "holds <U1"),
        (npy(np.array([[None]], object)), "holds object"),
        (npy(np.zeros((4, 4), np.uint8))[:-1], "15 bytes of values, its header says 16"),
        (npy(np.zeros((4, 4), np.uint8)) + b"x", "truncated or has something appended"),
        (npy(np.zeros((4, 4), np.uint8))[:40], "damaged header"),
        (b"\x93NUMPY", "damaged header"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "format"),
        (npy(np.zeros((4, 4), np.uint8), (3, 0)), "format"),
        (HUGE, "the limit is"),
        (picture(Image.fromarray(NOISE))[:400], "truncated or damaged"),
        (picture(Image.fromarray(ramp(64, 64)), "JPEG")[:400], "truncated or damaged"),
        (picture(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(PreprocessError, match=message):
        decode_sample(data)


def test_an_array_is_never_unpickled() -> None:
    file = io.BytesIO()
    np.save(file, np.array([print], object), allow_pickle=True)
    with pytest.raises(PreprocessError, match="holds object"):
        decode_sample(file.getvalue())


def test_a_claim_that_contradicts_the_bytes_is_refused() -> None:
    with pytest.raises(PreprocessError, match=r"does not begin as a \.npy file"):
        decode_sample(picture(Image.fromarray(ramp(4, 4))), "application/x-npy")


def test_a_small_file_that_would_unpack_to_gigabytes_is_refused() -> None:
    bomb = picture(Image.new("1", (8_000, 8_000)))
    assert len(bomb) < 100_000
    with pytest.raises(PreprocessError, match="8000 x 8000 pixels, the limit is"):
        decode_sample(bomb)
    with pytest.raises(PreprocessError, match="too large"):
        decode_sample(picture(Image.new("1", (20_000, 20_000))))


def test_a_request_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_BYTES", 10)
    with pytest.raises(PreprocessError, match="11 bytes, the limit is 10"):
        decode_sample(bytes(11))


FILES: Mapping[str, bytes] = {
    "png": picture(Image.fromarray(ramp(12, 9))),
    "jpeg": picture(Image.fromarray(ramp(12, 9)), "JPEG"),
    "gif": picture(Image.fromarray(ramp(12, 9)), "GIF"),
    "tiff": picture(Image.fromarray(ramp(12, 9)), "TIFF", compression="tiff_lzw"),
    "npy": npy(ramp(12, 9)),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    kind=st.sampled_from(sorted(FILES)),
    at=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    keep=st.floats(0, 1),
)
def test_a_damaged_file_is_an_image_or_a_clear_refusal(
    kind: str, at: float, flip: int, keep: float
) -> None:
    data = bytearray(FILES[kind])
    data[int(at * len(data))] ^= flip
    try:
        decoded = decode_sample(bytes(data[: int(keep * len(data)) + 1]))
    except PreprocessError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.shape[3] == 3


@given(st.binary(max_size=64))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, b"\x93NUMPY\x01\x00" + noise, b"\x89PNG\r\n\x1a\n" + noise):
        with pytest.raises(PreprocessError):
            decode_sample(data)


def test_preparing_normalises_every_channel(package: EncoderPackage) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    mean, std = package.manifest.mean, package.manifest.std
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    prepared = prepare(images, package)
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    np.testing.assert_allclose(prepared, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (100, 30), (16, 17)])
def test_preparing_scales_any_size_to_the_encoder_s(
    package: EncoderPackage, shape: tuple[int, int]
) -> None:
    prepared = prepare(np.full((2, *shape, 3), 255, np.uint8), package)
    assert prepared.shape == (2, 3, 16, 16)
    np.testing.assert_allclose(prepared, 1, atol=1e-6)


def test_preparing_does_not_change_what_it_was_given(package: EncoderPackage) -> None:
    images = np.full((1, 16, 16, 3), 7, np.uint8)
    images.flags.writeable = False
    prepare(images, package)
    assert int(images.max()) == 7


def test_preparing_nothing_gives_nothing(package: EncoderPackage) -> None:
    assert prepare(np.empty((0, 5, 5, 3), np.uint8), package).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 1), np.uint8)],
)
def test_preparing_refuses_what_decode_would_not_return(
    package: EncoderPackage, wrong: npt.NDArray[np.uint8]
) -> None:
    with pytest.raises(PreprocessError, match=r"expected uint8 \[n, h, w, 3\]"):
        prepare(wrong, package)
    with pytest.raises(PreprocessError, match="empty"):
        prepare(np.empty((1, 0, 4, 3), np.uint8), package)


def test_one_thread_at_a_time_is_in_pythons_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.lib.format.read_array_header_1_0
    both, met = threading.Barrier(2), []

    def read(file: Any) -> Any:
        try:
            both.wait(timeout=0.2)
            met.append(file)
        except threading.BrokenBarrierError:
            both.reset()
        return real(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", read)
    data = npy(np.zeros((4, 4, 3), np.uint8))
    with ThreadPoolExecutor(2) as pool:
        decoded = list(pool.map(decode_sample, [data, data]))
    assert met == []
    assert [each.shape for each in decoded] == [(1, 4, 4, 3)] * 2
