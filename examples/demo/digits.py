"""The world of the demo: scikit-learn's handwritten digits, seen by two cameras.

What the devices were fitted on before they left the factory, what streams past each of them and
what their accuracy is measured on are disjoint sets of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIDE = 32
ROTATION_DEGREES = 40
FIT_PER_CLASS = 60
PROBE_PER_CLASS = 35
FIRST = range(5)
NEW = range(5, 10)


@dataclass(frozen=True)
class Split:
    """Some images and what they show.

    Attributes:
        images: uint8 [n, 32, 32].
        labels: int64 [n], the digit.
    """

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, classes: range) -> Split:
        """The part that shows one of these digits."""
        keep = np.isin(self.labels, list(classes))
        return Split(self.images[keep], self.labels[keep])

    def first(self, n: int) -> Split:
        """The first n samples."""
        return Split(self.images[:n], self.labels[:n])

    def through_new_camera(self) -> Split:
        """The same digits with inverted contrast, rotated by 40 degrees."""
        return Split(np.stack([_new_camera(image) for image in self.images]), self.labels)


@dataclass(frozen=True)
class World:
    """What one device sees: fitted on, streaming past, and what its accuracy is measured on."""

    fit: Split
    stream: Split
    probe: Split


def worlds(seed: int) -> tuple[World, World]:
    """The worlds of device A and device B, which differ in what streams past them."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    labels = digits.target.astype(np.int64)
    parts: dict[str, list[npt.NDArray[np.int64]]] = {}
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(labels == digit))
        fitted_count = FIT_PER_CLASS if digit in FIRST else 0
        to_probe, to_fit, rest = np.split(indices, np.cumsum([PROBE_PER_CLASS, fitted_count]))
        half = len(rest) // 2
        shares = {"probe": to_probe, "fit": to_fit, "a": rest[:half], "b": rest[half:]}
        for name, share in shares.items():
            parts.setdefault(name, []).append(share)

    def split(name: str) -> Split:
        chosen = rng.permutation(np.concatenate(parts[name]))
        return Split(images[chosen], labels[chosen])

    fitted, probed = split("fit"), split("probe")
    return World(fitted, split("a"), probed), World(fitted, split("b"), probed)


def _enlarge(image: npt.NDArray[np.float64]) -> Images:
    """8×8 with values 0..16 to 32×32 uint8."""
    grey = Image.fromarray(np.clip(image * (255 / 16), 0, 255).astype(np.uint8))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _new_camera(image: Images) -> Images:
    turned = Image.fromarray(image).rotate(ROTATION_DEGREES, Image.Resampling.BICUBIC)
    return 255 - np.asarray(turned)
