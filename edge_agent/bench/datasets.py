"""Labelled sets as the benchmark reads them: `.npz` files by their keys, and image folders.

The encoding and the stream builder call `load`. What a set is follows from its arrays' names and
shapes, never from its file's name. Waveforms become pictures by one rule (`spectrograms`). Nothing
here splits a set that has one part, or knows tasks.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import BenchmarkError
from edge_agent.snapshot import scale_images
from exporter.errors import PreprocessError
from exporter.preprocess import decode_sample

Images = NDArray[np.uint8]
Reader = Callable[[NDArray[np.int64], int], Images]

DOMAIN_KEYS: Final = ("domain", "speaker", "load_hp")
_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
_LAYOUTS: Final = (
    "x_train, y_train, x_test, y_test or x, y (uint8 images, or signals [n, samples]), or JPEG "
    "packs jpeg, offset, y (also with _train and _test)"
)
_MIN_WINDOW: Final = 16
_FLOOR_DB: Final = 80.0


@dataclass(frozen=True, eq=False)
class Column:
    """A value of each sample, as an index into names.

    Attributes:
        index: int64 [n].
        names: What each index stands for, in the order of the values in the file.
    """

    index: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """A labelled set; its pictures are read when they are needed.

    Attributes:
        name: The file's or folder's name.
        digest: SHA-256 of its content.
        classes: The class of each sample.
        test: bool [n], the samples of its own test part; None when it comes in one part.
        columns: Other values of each sample by key: domains.
        read: ``(rows, side) -> uint8 [n, side, side, 3]``.
    """

    name: str
    digest: str
    classes: Column
    test: NDArray[np.bool_] | None
    columns: Mapping[str, Column]
    read: Reader

    def __len__(self) -> int:
        return len(self.classes.index)

    def domain(self, key: str | None = None) -> Column:
        """The domain of each sample.

        Args:
            key: The column; `domain`, `speaker` or `load_hp` (the first there is) when absent.

        Raises:
            BenchmarkError: There is no such column.
        """
        wanted = (key,) if key else DOMAIN_KEYS
        for name in wanted:
            if name in self.columns:
                return self.columns[name]
        raise BenchmarkError(
            f"{self.name} has no column {' or '.join(map(repr, wanted))} to take domains from; it "
            f"has {', '.join(map(repr, self.columns)) or 'none'}; name one with --domain-key"
        )


def load(path: Path) -> LabelledSet:
    """Read what a set is, by the keys and shapes of its arrays or by its folders.

    Raises:
        BenchmarkError: It is no labelled set; the message says what was found and expected.
    """
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise BenchmarkError(f"{path} does not exist; give an .npz file or a folder of images")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise BenchmarkError(f"{path} is a single array; save it with numpy.savez(x=, y=)")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise BenchmarkError(f"cannot read {path} as .npz: {error}") from error
    return _from_arrays(arrays, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def spectrograms(signals: NDArray[Any]) -> Images:
    """Turn signals into log-spectrogram pictures, whatever their sampling rate.

    One rule for all sets: Hann windows of w samples, w the power of two nearest to √(8 L), a
    quarter of w apart, so that a signal of L samples gives about as many windows as frequencies;
    magnitudes in decibels below the signal's own largest, 80 dB deep, low frequencies at the
    bottom, the mean of the signal taken off. A louder copy of a signal gives the same picture.

    Args:
        signals: [n, samples], any numbers.

    Returns:
        uint8 [n, frequencies, windows, 3], grey.
    """
    n, length = signals.shape
    window = max(_MIN_WINDOW, 2 ** round(math.log2(math.sqrt(8 * length))))
    hop, taper = window // 4, np.hanning(window).astype(np.float32)
    pictures = []
    for row in range(n):  # one by one: the windows of many signals would take gigabytes
        signal = signals[row].astype(np.float32)
        signal -= signal.mean()
        signal = np.pad(signal, (0, max(window - length, 0)))
        frames = np.lib.stride_tricks.sliding_window_view(signal, window)[::hop] * taper
        magnitude = np.abs(np.fft.rfft(frames, axis=1))[:, 1:].T[::-1]
        level = 20 * np.log10(magnitude / max(float(magnitude.max()), 1e-12) + 1e-12)
        pictures.append(np.rint((np.clip(level / _FLOOR_DB, -1, 0) + 1) * 255).astype(np.uint8))
    return np.repeat(np.stack(pictures)[..., None], 3, axis=3)


def _from_arrays(arrays: dict[str, NDArray[Any]], name: str, digest: str) -> LabelledSet:
    split = "y_train" in arrays or "y_test" in arrays
    parts = ("_train", "_test") if split else ("",)
    missing = [f"y{part}" for part in parts if f"y{part}" not in arrays] + [
        f"x{part} (or jpeg{part} and offset{part})"
        for part in parts
        if f"x{part}" not in arrays and not {f"jpeg{part}", f"offset{part}"} <= set(arrays)
    ]
    if missing:
        raise BenchmarkError(
            f"{name} has no {' and no '.join(missing)}; it has "
            f"{', '.join(arrays) or 'nothing'}; expected {_LAYOUTS}"
        )
    readers = [_reader(arrays, part, name) for part in parts]
    sizes = [size for size, _ in readers]
    for part, size in zip(parts, sizes, strict=True):
        y = arrays[f"y{part}"]
        if y.shape != (size,):
            raise BenchmarkError(
                f"{name}: y{part} has shape {list(y.shape)}, expected [{size}], one a sample"
            )
        if not size:
            raise BenchmarkError(f"{name}: y{part} is empty; expected at least one sample")
    columns = {}
    for key in sorted(arrays):
        stem = key.removesuffix(parts[0])
        full = [f"{stem}{part}" for part in parts]
        if stem in {"x", "y", "jpeg", "offset"} or not all(k in arrays for k in full):
            continue
        if all(arrays[k].shape == (s,) for k, s in zip(full, sizes, strict=True)):
            values = np.concatenate([arrays[k] for k in full])
            if values.dtype.kind in "iubUS":
                columns[stem] = _column(values, arrays.get(f"{stem}_names"), name, stem)
    y = np.concatenate([arrays[f"y{part}"] for part in parts])
    test = None
    if split:
        test = np.repeat([False, True], sizes)
    classes = _column(y, arrays.get("class_names"), name, "y")
    if test is not None and (unseen := set(classes.index[test]) - set(classes.index[~test])):
        raise BenchmarkError(
            f"{name}: class {classes.names[min(unseen)]!r} is in the test part only; "
            "give it training samples or leave it out"
        )
    return LabelledSet(name, digest, classes, test, columns, _joined(readers))


def _joined(readers: list[tuple[int, Reader]]) -> Reader:
    first, rest = readers[0], readers[1:]
    if not rest:
        return first[1]

    def read(rows: NDArray[np.int64], side: int) -> Images:
        images = np.empty((len(rows), side, side, 3), np.uint8)
        begin = 0
        for size, part in readers:
            here = (rows >= begin) & (rows < begin + size)
            if here.any():
                images[here] = part(rows[here] - begin, side)
            begin += size
        return images

    return read


def _reader(arrays: Mapping[str, NDArray[Any]], part: str, name: str) -> tuple[int, Reader]:
    """The number of samples of a part of the set and how to read its pictures."""
    if f"x{part}" not in arrays:
        return _jpeg_reader(arrays[f"jpeg{part}"], arrays[f"offset{part}"], f"{name}: ", part)
    x = arrays[f"x{part}"]
    where = f"{name}: x{part} is {x.dtype} {list(x.shape)}"
    if x.dtype.kind not in "iuf":
        raise BenchmarkError(f"{where}, expected numbers")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise BenchmarkError(f"{where} with NaN or infinite values; clean it first")
    if x.ndim == 2 and x.shape[1] >= _MIN_WINDOW:
        return len(x), lambda rows, side: scale_images(spectrograms(x[rows]), side)
    if x.ndim == 4 and x.shape[3] not in {1, 3, 4} and x.shape[1] in {1, 3, 4}:
        x = np.moveaxis(x, 1, 3)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[3] not in {1, 3, 4} or not x.size:
        raise BenchmarkError(
            f"{where}, expected images [n, h, w] or [n, h, w, channels] with 1, 3 or 4 channels, "
            f"or signals [n, samples] of at least {_MIN_WINDOW} samples"
        )
    if x.dtype != np.uint8 and (x.min() < 0 or x.max() > (1 if x.dtype.kind == "f" else 255)):
        raise BenchmarkError(
            f"{where} from {x.min():g} to {x.max():g}; expected images in uint8 or in floats from "
            "0 to 1"
        )
    scale = 255 if x.dtype.kind == "f" else 1

    def read(rows: NDArray[np.int64], side: int) -> Images:
        chosen = x[rows]
        pixels = chosen if chosen.dtype == np.uint8 else np.rint(chosen * scale).astype(np.uint8)
        rgb = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels[..., :3]
        return scale_images(np.ascontiguousarray(rgb), side)

    return len(x), read


def _jpeg_reader(
    pack: NDArray[Any], offset: NDArray[Any], where: str, part: str
) -> tuple[int, Reader]:
    if pack.dtype != np.uint8 or pack.ndim != 1:
        raise BenchmarkError(
            f"{where}jpeg{part} is {pack.dtype} {list(pack.shape)}, expected uint8 [bytes]"
        )
    sound = offset.ndim == 1 and offset.dtype.kind in "iu" and len(offset) > 1
    if not sound or offset[0] < 0 or offset[-1] > len(pack) or (np.diff(offset) <= 0).any():
        raise BenchmarkError(
            f"{where}offset{part} does not cut jpeg{part} ({len(pack)} bytes) into images; "
            "expected n + 1 growing positions, image i being bytes offset[i] to offset[i + 1]"
        )

    def read(rows: NDArray[np.int64], side: int) -> Images:
        return np.concatenate(
            [
                _decoded(bytes(pack[offset[i] : offset[i + 1]]), f"{where}image {i}", side)
                for i in rows
            ]
        )

    return len(offset) - 1, read


def _decoded(data: bytes, where: str, side: int) -> Images:
    try:
        return scale_images(decode_sample(data), side)
    except PreprocessError as error:
        raise BenchmarkError(f"{where}: {error}") from error


def _column(values: NDArray[Any], names: NDArray[Any] | None, where: str, key: str) -> Column:
    """Values as an index in their own order; numbers take their names from a list of names."""
    if values.dtype.kind not in "iubUS":
        raise BenchmarkError(
            f"{where}: {key} is {values.dtype}, expected whole numbers or strings, one a sample"
        )
    found, index = np.unique(values, return_inverse=True)
    if values.dtype.kind in "US" or names is None:
        told = tuple(str(value) for value in found.astype(str))
    elif int(found[0]) < 0 or int(found[-1]) >= len(names):
        raise BenchmarkError(
            f"{where}: {key} runs from {found[0]} to {found[-1]}, but there are {len(names)} names"
        )
    else:
        told = tuple(str(names[int(value)]) for value in found)
        if len(set(told)) < len(told):  # two numbers of one name stay two
            told = tuple(f"{name} ({value})" for name, value in zip(told, found, strict=True))
    if "" in told:
        raise BenchmarkError(f"{where}: {key} has an empty name; every value needs one")
    return Column(index.astype(np.int64), told)


def _from_folder(path: Path) -> LabelledSet:
    parts = ("train", "test") if (path / "train").is_dir() and (path / "test").is_dir() else ("",)
    files: list[Path] = []
    labels: list[str] = []
    test: list[bool] = []
    for part in parts:
        for folder in sorted(entry for entry in (path / part).iterdir() if entry.is_dir()):
            for file in sorted(folder.rglob("*")):
                if file.suffix.lower() in _SUFFIXES and not file.name.startswith("."):
                    files.append(file)
                    labels.append(folder.name)
                    test.append(part == "test")
    if not files:
        raise BenchmarkError(
            f"{path} holds no images; expected a folder of image files for each class, or train/ "
            "and test/ with such folders in them"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())

    def read(rows: NDArray[np.int64], side: int) -> Images:
        return np.concatenate([_decoded(files[i].read_bytes(), str(files[i]), side) for i in rows])

    classes = _column(np.array(labels), None, path.name, "folders")
    own = np.array(test) if len(parts) == 2 else None
    if own is not None and (unseen := set(classes.index[own]) - set(classes.index[~own])):
        raise BenchmarkError(f"{path}/test has class {classes.names[min(unseen)]!r}, train/ not")
    return LabelledSet(path.name, digest.hexdigest(), classes, own, {}, read)
