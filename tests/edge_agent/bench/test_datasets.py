"""What a labelled set is follows from its keys and shapes; anything else is refused by name."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_agent.bench.datasets import load, spectrograms
from edge_agent.errors import BenchmarkError

RNG = np.random.default_rng(0)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "set.npz", **arrays)
    return path / "set.npz"


def pixels(n: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def jpegs(colours: list[int]) -> tuple[np.ndarray, np.ndarray]:
    packed = []
    for colour in colours:
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (colour, colour, colour)).save(file, "JPEG")
        packed.append(file.getvalue())
    offset = np.cumsum([0, *map(len, packed)])
    return np.frombuffer(b"".join(packed), np.uint8), offset


def test_two_parts_stay_apart_and_numbers_get_their_names(tmp_path: Path) -> None:
    train, test = pixels(3, 8, 8, 3), pixels(2, 8, 8, 3)
    found = load(
        saved(
            tmp_path,
            x_train=train,
            y_train=np.array([5, 2, 2]),
            x_test=test,
            y_test=np.array([2, 5]),
            class_names=np.array(list("abcdef")),
        )
    )
    assert found.classes.names == ("c", "f")
    assert found.classes.index.tolist() == [1, 0, 0, 0, 1]
    assert found.test is not None
    assert found.test.tolist() == [False, False, False, True, True]
    assert np.array_equal(found.read(np.array([4, 0]), 8), [test[1], train[0]])


@pytest.mark.parametrize(
    "x",
    [
        pixels(4, 8, 8),
        pixels(4, 8, 8, 1),
        pixels(4, 8, 8, 4),
        pixels(4, 3, 8, 8),
        RNG.random((4, 8, 8, 3), np.float32),
    ],
    ids=["grey", "one channel", "alpha", "channels first", "floats"],
)
def test_images_of_any_layout_become_colour_images_of_the_encoders_size(
    tmp_path: Path, x: np.ndarray
) -> None:
    found = load(saved(tmp_path, x=x, y=np.array(["a", "b", "a", "b"])))
    images = found.read(np.arange(4), 16)
    assert images.shape == (4, 16, 16, 3)
    assert images.dtype == np.uint8
    assert found.test is None
    assert found.classes.names == ("a", "b")


def test_jpeg_packs_are_cut_at_their_offsets(tmp_path: Path) -> None:
    (train, train_at), (test, test_at) = jpegs([10, 200]), jpegs([90])
    found = load(
        saved(
            tmp_path,
            jpeg_train=train,
            offset_train=train_at,
            y_train=np.array([0, 1]),
            jpeg_test=test,
            offset_test=test_at,
            y_test=np.array([0]),
        )
    )
    means = found.read(np.array([2, 1, 0]), 4).mean(axis=(1, 2, 3))
    assert means == pytest.approx([90, 200, 10], abs=3)


def test_columns_beside_the_labels_are_domains(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        x=pixels(4, 8, 8),
        y=np.arange(4) % 2,
        speaker=np.array([1, 0, 1, 0]),
        speaker_names=np.array(["ann", "bob"]),
        room=np.array([7, 7, 9, 9]),
        fs=np.array(8000),
    )
    found = load(path)
    assert found.domain().names == ("ann", "bob")
    assert found.domain("room").names == ("7", "9")
    with pytest.raises(BenchmarkError, match=r"no column 'lamp'.*has 'room', 'speaker'"):
        found.domain("lamp")


def test_a_folder_of_class_folders_is_a_set_with_or_without_its_own_test_part(
    tmp_path: Path,
) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            Image.fromarray(pixels(1, 5, 6, 3)[0]).save(folder / "one.png")
    whole, part = load(tmp_path), load(tmp_path / "train")
    assert whole.classes.names == part.classes.names == ("cat", "dog")
    assert whole.test is not None
    assert whole.test.sum() == 2
    assert part.test is None
    assert whole.read(np.array([3]), 8).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(("length", "side"), [(2048, 64), (8000, 128), (64, 8)])
def test_a_spectrogram_is_about_as_wide_as_high(length: int, side: int) -> None:
    _, height, width, channels = spectrograms(RNG.normal(size=(1, length))).shape
    assert height == side
    assert 0.5 < width / height < 2
    assert channels == 3


def test_a_spectrogram_does_not_change_with_loudness_or_number_format() -> None:
    wave = RNG.integers(-800, 800, (2, 4000), dtype=np.int16)
    loud = spectrograms((wave * 7).astype(np.float32))
    assert np.abs(spectrograms(wave).astype(int) - loud).max() <= 1


def test_a_tone_lights_the_row_of_its_frequency() -> None:
    tone = np.sin(2 * np.pi * np.arange(2048) * 0.25)[None]
    picture = spectrograms(tone)[0, :, :, 0]
    brightest = picture.sum(axis=1).argmax()
    assert brightest == pytest.approx(len(picture) / 2, abs=1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, r"has no y and no x .*it has a; expected x_train"),
        ({"x_train": pixels(2, 8, 8), "y_train": np.zeros(2, int)}, r"has no y_test and no x_test"),
        ({"x": pixels(2, 8, 8), "y": np.zeros(3, int)}, r"y has shape \[3\], expected \[2\]"),
        ({"x": pixels(2, 8, 8, 5), "y": np.zeros(2, int)}, r"\[2, 8, 8, 5\], expected images"),
        ({"x": pixels(2, 8, 8), "y": np.zeros(2)}, r"y is float64, expected whole numbers"),
        ({"x": np.full((2, 99), np.nan), "y": np.zeros(2, int)}, r"NaN"),
        ({"x": np.full((2, 8, 8), 7.0), "y": np.zeros(2, int)}, r"floats from 0 to 1"),
        (
            {"x": pixels(2, 8, 8), "y": np.array([0, 3]), "class_names": np.array(["a"])},
            r"y runs from 0 to 3, but there are 1 names",
        ),
        (
            {"jpeg": pixels(9), "offset": np.array([0, 5, 12]), "y": np.zeros(2, int)},
            r"offset does not cut jpeg \(9 bytes\)",
        ),
        (
            {
                "x_train": pixels(1, 8, 8),
                "y_train": np.array(["a"]),
                "x_test": pixels(1, 8, 8),
                "y_test": np.array(["b"]),
            },
            r"class 'b' is in the test part only",
        ),
    ],
)
def test_anything_else_is_refused_saying_what_was_found(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        load(saved(tmp_path, **arrays))


def test_what_is_no_set_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="does not exist"):
        load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("no archive", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="cannot read"):
        load(tmp_path / "text.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(BenchmarkError, match=r"numpy\.savez"):
        load(tmp_path / "single.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BenchmarkError, match="holds no images"):
        load(tmp_path / "empty")
