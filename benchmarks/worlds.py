"""Known worlds and what is foreign to each: the pairs that all benchmarks of shift are measured on.

A world has samples to fit on, samples to calibrate with and samples to test by. What is foreign to
it comes in four groups: near (other classes of the same set), far (other sets), domain (the same
classes from elsewhere) and corruption (15 kinds in 5 severities). Features are computed once for an
encoder and kept on disk. Nothing here fits or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from edge_agent.bench import datasets, suite
from exporter.package import EncoderPackage, default_encoder_package
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

ENCODERS: Final = ("vit-tiny", "mobilenet", "default")
GROUPS: Final = ("near", "far", "domain", "corruption")
_MOBILENET: Final = Path("encoders") / "mobilenet_v2_1.0_224.safetensors"
_MOBILENET_SIZE: Final = 128
_ORDER_SEED: Final = 1993
_KNOWN_CLASSES: Final = 50
_BATCH: Final = 64
# Parts of a world: to fit on, to calibrate with, and the rest to test by.
_FIT, _CALIBRATE = 0.6, 0.15
_FOREIGN: Final = 600
_CORRUPTED: Final = 200
_KNOWN_SPEAKERS: Final = ("george", "jackson", "lucas", "nicolas")
# ViT-Tiny was trained on part of Tiny-ImageNet, so its images are foreign to a world's classes but
# not to that encoder.
_FAR: Final = ("mnist-small", "grocery-112", "tiny-imagenet-pretrain-jpeg")


@dataclass(frozen=True, eq=False)
class Part:
    """Labelled samples: features as the encoder gives them, not normalised.

    Attributes:
        features: float32 [n, feature_dim]; the first `network_dim` columns are the network's own
            output, the others patch features of earlier depths.
        labels: n label names.
        rows: int64 [n], the samples' places in their set.
    """

    features: Floats
    labels: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True, eq=False)
class World:
    """What a device would know.

    Attributes:
        name: Its name in tables.
        fit: Samples to fit on.
        calibration: Held-out samples, drawn as those to fit on.
        test: Samples to test by, which nothing else has seen.
    """

    name: str
    fit: Part
    calibration: Part
    test: Part


@dataclass(frozen=True, eq=False)
class Pair:
    """A world and samples foreign to it.

    Attributes:
        group: One of `GROUPS`.
        known: The world's name.
        foreign: What the samples are: a set, a domain, or `corruption-severity`.
        features: float32 [m, feature_dim], as in `Part`.
        labels: What they are labelled, m names.
        images: Gives them as pictures at the encoder's input size, uint8 [m, s, s, 3].
    """

    group: str
    known: str
    foreign: str
    features: Floats
    labels: tuple[str, ...]
    images: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class _Source:
    """Where a world comes from."""

    file: str
    domain_key: str | None = None
    domains: tuple[str, ...] = ()


_SOURCES: Final = {
    "cifar50": _Source("cifar100-small"),
    "pacs-photo": _Source("pacs-112", "domain", ("photo",)),
    "fsdd": _Source("fsdd", "speaker", _KNOWN_SPEAKERS),
    "cwru-load0": _Source("cwru-12k-de", "load_hp", ("0",)),
}


def encoder(name: str, data: Path, cache: Path) -> EncoderPackage:
    """One of `ENCODERS`, built once into the cache."""
    if name == "default":
        return default_encoder_package()
    if name == "vit-tiny":
        return suite.suite_encoder(data, cache)
    from safetensors.torch import load_file  # noqa: PLC0415 - torch only where it is built

    from exporter.architectures import build_known  # noqa: PLC0415

    folder = cache / "encoders" / f"mobilenet-{_MOBILENET_SIZE}px"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        build_known(
            load_file(data / _MOBILENET),
            image_size=_MOBILENET_SIZE,
            suffix_blocks=4,
            name=f"mobilenet-{_MOBILENET_SIZE}px",
            out=folder,
        )
    return EncoderPackage.load(folder)


class Worlds:
    """All worlds and pairs under one encoder.

    Args:
        package: The encoder.
        data: The directory with ``data/`` in it.
        cache: Where features are kept.
        progress: Told what is being encoded.
        only: Names of the worlds wanted; all when empty.
        severities: Severities of the corruptions wanted.
    """

    def __init__(
        self,
        package: EncoderPackage,
        data: Path,
        cache: Path,
        *,
        progress: Callable[[str], None] = lambda _: None,
        only: Sequence[str] = (),
        severities: Sequence[int] = SEVERITIES,
    ) -> None:
        self.package = package
        self._severities = tuple(severities)
        self.names = tuple(name for name in _SOURCES if not only or name in only)
        self._data, self._progress = data / "data", progress
        self._cache = cache / "features" / package.digest[:16]
        self._sets: dict[str, datasets.LabelledSet] = {}

    @cached_property
    def worlds(self) -> dict[str, World]:
        """The worlds by name."""
        return {name: self._world(name) for name in self.names}

    def pairs(self, groups: Sequence[str] = GROUPS) -> Iterator[Pair]:
        """Everything foreign, world by world and group by group."""
        makers = {
            "near": self._near,
            "far": self._far,
            "domain": self._domains,
            "corruption": self._corruptions,
        }
        for name in self.names:
            for group in groups:
                yield from makers[group](name)

    def images(self, name: str, rows: Rows) -> NDArray[np.uint8]:
        """A world's samples as pictures at the encoder's input size, uint8 [n, s, s, 3]."""
        return self._set(_SOURCES[name].file).read(rows, self.package.image_size)

    def encoded(self, images: NDArray[np.uint8]) -> Floats:
        """Base features of pictures, float32 [n, feature_dim], as the encoder gives them."""
        sessions = self._sessions
        features = sessions.base_features if self.package.base_from_prefix else sessions.suffix
        return np.concatenate(
            [
                features(sessions.prefix(prepare(images[at : at + _BATCH], self.package)))
                for at in range(0, len(images), _BATCH)
            ]
        )

    @cached_property
    def _sessions(self) -> EncoderSessions:
        return EncoderSessions(self.package, threads=1)

    def _set(self, file: str) -> datasets.LabelledSet:
        if file not in self._sets:
            self._sets[file] = datasets.load(self._data / f"{file}.npz")
        return self._sets[file]

    def _world(self, name: str) -> World:
        found = self._set(_SOURCES[name].file)
        rows = self._known_rows(name)
        if found.test is not None:
            test = rows[found.test[rows]]
            rows = rows[~found.test[rows]]
        else:
            rows = np.random.default_rng(0).permutation(rows)
            rows, test = np.split(rows, [round((_FIT + _CALIBRATE) * len(rows))])
        rows = np.random.default_rng(1).permutation(rows)
        fit, calibration = np.split(rows, [round(_FIT / (_FIT + _CALIBRATE) * len(rows))])
        parts = (("fit", fit), ("calibration", calibration), ("test", test))
        return World(name, *(self._part(name, key, np.sort(which)) for key, which in parts))

    def _part(self, name: str, key: str, rows: Rows) -> Part:
        file = _SOURCES[name].file
        return Part(self._features(f"{name}-{key}", file, rows), self._labels(file, rows), rows)

    def _known_rows(self, name: str) -> Rows:
        """The samples of a world's classes and domains, in the order of the set."""
        source = _SOURCES[name]
        found = self._set(source.file)
        if source.domain_key is None:
            return np.flatnonzero(np.isin(found.classes.index, self._known_classes()))
        domain = found.domain(source.domain_key)
        wanted = [domain.names.index(value) for value in source.domains]
        return np.flatnonzero(np.isin(domain.index, wanted))

    def _known_classes(self) -> Rows:
        order = np.random.RandomState(_ORDER_SEED).permutation(100)
        return np.asarray(order[:_KNOWN_CLASSES], dtype=np.int64)

    def _near(self, name: str) -> Iterator[Pair]:
        source = _SOURCES[name]
        if source.domain_key is not None:
            return
        found = self._set(source.file)
        assert found.test is not None
        other = ~np.isin(found.classes.index, self._known_classes())
        rows = np.flatnonzero(other & found.test)
        yield self._pair("near", name, "other classes", source.file, rows)

    def _far(self, name: str) -> Iterator[Pair]:
        if name not in {"cifar50", "pacs-photo"}:
            return
        for file in _FAR:
            found = self._set(file)
            rows = np.arange(len(found)) if found.test is None else np.flatnonzero(found.test)
            yield self._pair("far", name, file.split("-")[0], file, rows)

    def _domains(self, name: str) -> Iterator[Pair]:
        source = _SOURCES[name]
        if source.domain_key is None:
            return
        domain = self._set(source.file).domain(source.domain_key)
        for place, value in enumerate(domain.names):
            if value not in source.domains:
                rows = np.flatnonzero(domain.index == place)
                yield self._pair("domain", name, value, source.file, rows)

    def _corruptions(self, name: str) -> Iterator[Pair]:
        test = self.worlds[name].test
        chosen = np.random.default_rng(2).permutation(len(test.rows))[:_CORRUPTED]
        rows, labels = test.rows[chosen], tuple(test.labels[k] for k in chosen)
        clean: NDArray[np.uint8] | None = None
        for corruption in CORRUPTIONS:
            for severity in self._severities:
                path = self._path(f"{name}-{corruption}-{severity}")
                if not path.exists():
                    clean = self.images(name, rows) if clean is None else clean
                    self._keep(path, self.encoded(corrupted(clean, corruption, severity)))
                features: Floats = np.load(path)
                images = partial(self._corrupted, name, rows, corruption, severity)
                foreign = f"{corruption}-{severity}"
                yield Pair("corruption", name, foreign, features, labels, images)

    def _corrupted(
        self, name: str, rows: Rows, corruption: str, severity: int
    ) -> NDArray[np.uint8]:
        return corrupted(self.images(name, rows), corruption, severity)

    def _pair(self, group: str, name: str, foreign: str, file: str, rows: Rows) -> Pair:
        rows = np.sort(np.random.default_rng(3).permutation(rows)[:_FOREIGN])
        features = self._features(f"{name}-{group}-{foreign}", file, rows)
        images = partial(self._set(file).read, rows, self.package.image_size)
        return Pair(group, name, foreign, features, self._labels(file, rows), images)

    def _labels(self, file: str, rows: Rows) -> tuple[str, ...]:
        classes = self._set(file).classes
        return tuple(classes.names[k] for k in classes.index[rows])

    def _features(self, key: str, file: str, rows: Rows) -> Floats:
        path = self._path(key)
        if not path.exists():
            found = self._set(file)
            parts = [
                self.encoded(found.read(part, self.package.image_size))
                for part in np.array_split(rows, max(1, len(rows) // 512))
            ]
            self._keep(path, np.concatenate(parts))
        features: Floats = np.load(path)
        return features

    def _path(self, key: str) -> Path:
        return self._cache / f"{key.replace(' ', '-')}.npy"

    def _keep(self, path: Path, features: Floats) -> None:
        self._progress(f"encoded {path.stem}: {len(features)} samples")
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".part")
        with written.open("wb") as file:
            np.save(file, features)
        written.replace(path)
