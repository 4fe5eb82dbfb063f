"""The first generation from labelled samples: encode them, keep their statistics, no training.

``driftkeel agent fit`` calls it. What it makes is a bundle of the family ``frozen`` (class
statistics and a signature, no adapter) and the calibration features of a held-out part; it
needs ONNX Runtime only.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import FROZEN, Bundle, Manifest
from edge_agent.errors import TrainingDataError
from edge_agent.snapshot import scale_images
from exporter.errors import PreprocessError
from exporter.preprocess import decode_sample, prepare
from exporter.sessions import EncoderSessions
from ood.calibration import score_quantiles
from ood.scores import MahalanobisScore
from ood.signature import signature
from ood.statistics import ClassStatistics, GaussianHead

MIN_CALIBRATION: Final = 50

_BATCH: Final = 32
_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".npy"}
)


@dataclass(frozen=True)
class Labelled:
    """Labelled samples at the encoder's input size.

    Attributes:
        images: uint8 [n, s, s, 3].
        labels: n label names.
    """

    images: NDArray[np.uint8]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """What fitting gives.

    Attributes:
        bundle: Statistics and signature, no adapter.
        calibration_features: float32 [m, d], base features of the held-out part.
        accuracy: Share of the held-out part that the statistics classify rightly.
    """

    bundle: Bundle
    calibration_features: NDArray[np.float32]
    accuracy: float


def load_labelled(path: Path, image_size: int) -> Labelled:
    """Read labelled samples.

    Args:
        path: An ``.npz`` file with ``x`` (uint8 [n, h, w] or [n, h, w, c]), ``y`` (names, or
            numbers) and optionally ``class_names`` (the name of each number); or a directory
            with one folder of image files for each class.
        image_size: The encoder's input side, in pixels.

    Raises:
        TrainingDataError: There is nothing usable; the message says what is wrong and where.
    """
    if path.is_dir():
        return _from_folders(path, image_size)
    if not path.is_file():
        raise TrainingDataError(f"{path} does not exist; give an .npz file or a directory")
    return _from_npz(path, image_size)


def encode(
    sessions: EncoderSessions,
    images: NDArray[np.uint8],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Base features of images, l2-normalised: float32 [n, d].

    Args:
        sessions: The encoder.
        images: uint8 [n, h, w, 3].
        progress: Told how many more samples are done.
    """
    parts = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        hidden = sessions.prefix(prepare(batch, sessions.package))
        parts.append(sessions.base_features(hidden))
        progress(len(batch))
    return np.concatenate(parts)


def fit(
    features: NDArray[np.float32],
    labels: tuple[str, ...],
    *,
    encoder: str,
    task: str,
    created_by: str,
    created_at: float,
    holdout: float = 0.3,
    seed: int = 0,
) -> Fitted:
    """Make a bundle of class statistics, and measure it on a part held out.

    Args:
        features: l2-normalised base features [n, d].
        labels: n label names.
        encoder: The encoder's digest.
        task: What to call it.
        created_by: The device's name.
        created_at: Seconds since the epoch.
        holdout: Share of every class kept out of the statistics, for calibration.
        seed: Which samples are kept out.

    Raises:
        TrainingDataError: A class has too few samples to keep one out.
    """
    held_out = split(labels, holdout=holdout, seed=seed)
    names = np.array(labels, dtype=object)
    statistics = ClassStatistics.fit(features[~held_out], list(names[~held_out]))
    calibration = features[held_out]
    head = GaussianHead.from_statistics([statistics])
    probabilities = head.label_probabilities(head.log_likelihoods(calibration))
    guessed = np.array(head.labels, dtype=object)[probabilities.argmax(axis=1)]
    accuracy = float(np.mean(guessed == names[held_out]))
    scores = MahalanobisScore.from_statistics([statistics]).score(calibration)
    manifest = Manifest(
        encoder=encoder,
        family=FROZEN,
        rank=0,
        sites=(),
        labels=statistics.labels,
        task=task,
        created_at=created_at,
        created_by=created_by,
        parents=(),
        samples=statistics.samples,
        metrics={"holdout_accuracy": accuracy, "holdout_samples": float(len(calibration))},
        score_quantiles=tuple(score_quantiles(scores)),
    )
    bundle = Bundle(
        manifest=manifest,
        tensors={},
        base=statistics,
        own=statistics,
        signature=signature(features, seed=encoder),
    )
    return Fitted(bundle, calibration, accuracy)


def split(labels: tuple[str, ...], *, holdout: float, seed: int) -> NDArray[np.bool_]:
    """Which samples to hold out: the same share of every class, at least one.

    Raises:
        TrainingDataError: A class has a single sample.
    """
    rng = np.random.default_rng(seed)
    names = np.array(labels, dtype=object)
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label, count in sorted(Counter(labels).items()):
        if count < 2:
            raise TrainingDataError(
                f"class {label!r} has {count} sample; give at least 2, better 20 or more"
            )
        rows = np.flatnonzero(names == label)
        keep = min(max(round(count * holdout), 1), count - 1)
        held_out[rng.permutation(rows)[:keep]] = True
    return held_out


def _from_npz(path: Path, image_size: int) -> Labelled:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := {"x", "y"} - set(archive.files):
                raise TrainingDataError(
                    f"{path} has no array {min(missing)!r}; it has "
                    f"{', '.join(archive.files) or 'none'}"
                )
            x, y = archive["x"], archive["y"]
            names = archive["class_names"] if "class_names" in archive.files else None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise TrainingDataError(f"cannot read {path}: {error}") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not x.size:
        raise TrainingDataError(
            f"{path}: x is {x.dtype} {list(x.shape)}, expected uint8 [n, h, w] or [n, h, w, c]"
        )
    if x.ndim == 3:
        x = x[..., None]
    if x.shape[3] not in (1, 3, 4):
        raise TrainingDataError(f"{path}: x has {x.shape[3]} channels, expected 1, 3 or 4")
    if y.shape != (len(x),):
        raise TrainingDataError(f"{path}: y has shape {list(y.shape)}, expected [{len(x)}]")
    rgb = np.repeat(x, 3, axis=3) if x.shape[3] == 1 else np.ascontiguousarray(x[..., :3])
    return Labelled(scale_images(rgb, image_size), _names(y, names, path))


def _names(
    y: NDArray[np.generic], class_names: NDArray[np.generic] | None, path: Path
) -> tuple[str, ...]:
    if y.dtype.kind in "US":
        labels = tuple(str(value) for value in y.astype(str))
    elif y.dtype.kind in "iu":
        numbers = y.astype(np.int64)
        if class_names is None:
            labels = tuple(str(value) for value in numbers)
        elif numbers.min() < 0 or numbers.max() >= len(class_names):
            raise TrainingDataError(
                f"{path}: y names class {int(numbers.max())}, class_names has {len(class_names)}"
            )
        else:
            labels = tuple(str(class_names[value]) for value in numbers)
    else:
        raise TrainingDataError(f"{path}: y is {y.dtype}, expected strings or whole numbers")
    if "" in labels:
        raise TrainingDataError(f"{path}: sample {labels.index('')} has an empty label")
    return labels


def _from_folders(path: Path, image_size: int) -> Labelled:
    images, labels = [], []
    for label, file in _image_files(path):
        try:
            decoded = decode_sample(file.read_bytes())
        except (PreprocessError, OSError) as error:
            raise TrainingDataError(f"{file}: {error}") from error
        images.append(scale_images(decoded, image_size))
        labels.extend([label] * len(decoded))
    if not images:
        raise TrainingDataError(
            f"{path} holds no images; expected one folder for each class with image files in it"
        )
    return Labelled(np.concatenate(images), tuple(labels))


def _image_files(path: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in _SUFFIXES and not file.name.startswith("."):
                yield folder.name, file
