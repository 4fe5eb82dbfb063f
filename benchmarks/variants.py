"""Sixty variants of tasks and domains: what adapters are for, and what devices may come to see.

A variant is some classes of a set, from one domain, through one camera. Half of its samples are
for whoever makes an adapter, the other half for whoever searches one; the halves share no sample.
Features are computed once for an encoder and kept on disk. Nothing here knows signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.corruptions import corrupted
from benchmarks.worlds import Worlds
from edge_agent.bench import datasets
from exporter.package import EncoderPackage
from ood.statistics import l2_normalise

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]
Rows = NDArray[np.int64]

ADAPTER_SAMPLES: Final = 200
# Enough that 200 samples with very unequal proportions can be drawn from most variants.
_FRESH: Final = 500
_ORDER_SEED: Final = 1993
_CWRU_CLASSES: Final = 16

CAMERAS: Final[Mapping[str, Callable[[Images], Images]]] = {
    "inverted": lambda images: 255 - images,
    "dark": lambda images: np.rint(images * 0.3).astype(np.uint8),
    "blurred": lambda images: corrupted(images, "defocus_blur", 4),
    "rotated": lambda images: np.ascontiguousarray(np.rot90(images, axes=(1, 2))),
}
# Which variants are also seen through other cameras.
_THROUGH_ALL: Final = ("cifar-0", "cifar-1", "grocery-0", "pacs-photo")
_THROUGH_SOME: Final = {"mnist-01": ("inverted", "rotated")}


@dataclass(frozen=True)
class Variant:
    """What samples a variant has.

    Attributes:
        name: Its name, ``group-which`` and the camera if it is another.
        file: The set it comes from.
        classes: Positions of its classes; all when empty.
        domain: (column, value) it is limited to.
        camera: One of `CAMERAS`; empty for the set's own.
    """

    name: str
    file: str
    classes: tuple[int, ...] = ()
    domain: tuple[str, str] | None = None
    camera: str = ""

    @property
    def group(self) -> str:
        """Which set it comes from, in a word."""
        return self.name.split("-", maxsplit=1)[0]


@dataclass(frozen=True, eq=False)
class Halves:
    """A variant's samples.

    Attributes:
        variant: What they are of.
        known: float32 [n, d], unit length, of whoever makes the adapter; n is 200 or less.
        fresh: float32 [m, d], unit length, of whoever searches.
        fresh_labels: int64 [m], the class of each fresh sample.
    """

    variant: Variant
    known: Floats
    fresh: Floats
    fresh_labels: Rows


def variants() -> tuple[Variant, ...]:
    """All sixty, in a fixed order."""
    order = np.random.RandomState(_ORDER_SEED)
    cifar, grocery = order.permutation(100), order.permutation(81)
    found = [
        Variant(f"cifar-{k}", "cifar100-small", _numbers(cifar[10 * k : 10 * k + 10]))
        for k in range(10)
    ]
    found += [
        Variant(f"grocery-{k}", "grocery-112", _numbers(grocery[9 * k : 9 * k + 9]))
        for k in range(9)
    ]
    found += [
        Variant(f"pacs-{value}", "pacs-112", (), ("domain", value))
        for value in ("photo", "art_painting", "cartoon", "sketch")
    ]
    found += [
        Variant(f"fsdd-{value}", "fsdd", (), ("speaker", value))
        for value in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    ]
    found += [
        Variant(
            f"cwru-load{load}-{part}",
            "cwru-12k-de",
            tuple(range(start, _CWRU_CLASSES, 2)),
            ("load_hp", str(load)),
        )
        for load in range(4)
        for start, part in enumerate(("even", "odd"))
    ]
    found += [Variant(f"mnist-{k}{k + 1}", "mnist-small", (k, k + 1)) for k in range(0, 10, 2)]
    for variant in tuple(found):
        through = CAMERAS if variant.name in _THROUGH_ALL else _THROUGH_SOME.get(variant.name, ())
        found += [
            Variant(
                f"{variant.name}-{camera}", variant.file, variant.classes, variant.domain, camera
            )
            for camera in through
        ]
    return tuple(found)


def halves(
    package: EncoderPackage,
    data: Path,
    cache: Path,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Halves]:
    """The samples of all variants under one encoder.

    Args:
        package: The encoder.
        data: The directory with ``data/`` in it.
        cache: Where features are kept.
        progress: Told what is being encoded.
    """
    worlds = Worlds(package, data, cache)
    folder = cache / "variants" / package.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    loaded: dict[str, datasets.LabelledSet] = {}
    found = []
    for number, variant in enumerate(variants()):
        path = folder / f"{variant.name}.npz"
        if not path.exists():
            if variant.file not in loaded:
                loaded[variant.file] = datasets.load(data / "data" / f"{variant.file}.npz")
            known, fresh = _split(loaded[variant.file], variant, number)
            rows = np.concatenate([known, fresh])
            parts = np.array_split(rows, max(1, len(rows) // 256))
            features = np.concatenate(
                [_encoded(worlds, loaded[variant.file], part, variant.camera) for part in parts]
            )
            written = path.with_suffix(".part")
            with written.open("wb") as file:
                np.savez(
                    file,
                    known=features[: len(known)],
                    fresh=features[len(known) :],
                    labels=loaded[variant.file].classes.index[fresh],
                )
            written.replace(path)
            progress(f"encoded {variant.name}: {len(known)} and {len(fresh)} samples")
        with np.load(path) as kept:
            found.append(
                Halves(
                    variant,
                    l2_normalise(kept["known"]),
                    l2_normalise(kept["fresh"]),
                    kept["labels"],
                )
            )
    return found


def draw(labels: Rows, samples: int, rng: np.random.Generator, *, unbalanced: bool) -> Rows:
    """Choose samples without replacement: classes as likely as each other, or by Zipf's law.

    Args:
        labels: int64 [m].
        samples: How many; fewer come when there are fewer.
        rng: Decides which, and in which order classes are frequent.
        unbalanced: Whether the k-th class is 1/k as frequent as the first.
    """
    names, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = rng.permutation(len(names)) + 1
    share = 1 / ranks if unbalanced else np.ones(len(names))
    weights = (share / counts)[index]
    samples = min(samples, len(labels))
    return rng.choice(len(labels), samples, replace=False, p=weights / weights.sum())


def _numbers(values: Rows) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _split(found: datasets.LabelledSet, variant: Variant, seed: int) -> tuple[Rows, Rows]:
    """Rows of the two halves, class by class, so that both have all of them."""
    chosen = np.ones(len(found), bool)
    if variant.classes:
        chosen &= np.isin(found.classes.index, variant.classes)
    if variant.domain is not None:
        key, value = variant.domain
        domain = found.domain(key)
        chosen &= domain.index == domain.names.index(value)
    rng = np.random.default_rng([_ORDER_SEED, seed])
    first: list[Rows] = []
    second: list[Rows] = []
    for name in np.unique(found.classes.index[chosen]):
        rows = rng.permutation(np.flatnonzero(chosen & (found.classes.index == name)))
        first.append(rows[: len(rows) // 2])
        second.append(rows[len(rows) // 2 :])
    known = rng.permutation(np.concatenate(first))[:ADAPTER_SAMPLES]
    fresh = rng.permutation(np.concatenate(second))[:_FRESH]
    return known, fresh


def _encoded(worlds: Worlds, found: datasets.LabelledSet, rows: Rows, camera: str) -> Floats:
    images = found.read(rows, worlds.package.image_size)
    return worlds.encoded(CAMERAS[camera](images) if camera else images)
