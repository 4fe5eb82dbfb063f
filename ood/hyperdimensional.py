"""Hyperdimensional classes: bundles of samples, compared by cosine under a random projection.

Wilson, Fischer, Sünderhauf and Dayoub, "Hyperdimensional feature fusion for out-of-distribution
detection" (2023). Features of several blocks need no more than one matrix: its rows for a block are
that block's own projection, and the sum over blocks is their bundle. Centring is linear: the mean
of the class means comes off hypervectors when they are compared, block by block. `Bundles` is what
is kept; strategies that route bundle features and project them when they compare, devices that keep
nothing else bundle small hypervectors (`HypervectorState`). NumPy only, reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.moments import add_by_label, class_index, on_grid
from ood.projection import gaussian_matrix
from ood.validation import FloatArray, check_features
from ood.wire import Reader, Writer

# A cosine under a projection to D dimensions is off by about 1/sqrt(D). On a hundred classes of
# 192 numbers the nearest class was right for 36.3 % of the samples at 2,048 and at 4,096, 36.8 % at
# 8,192 and 36.6 % without a projection.
HYPERVECTOR_SIZE: Final = 2048
# A state keeps hypervectors themselves: so many numbers fit a hundred classes into 64 KB.
STATE_SIZE: Final = 512
# There, features are rounded to steps of 2^-8, the projection to 2^-6, and hypervectors to 2^-2: on
# whole numbers the projection is exact, so bundles depend on no order of samples or merges.
_FEATURE_BITS: Final = 8
_PROJECTION_BITS: Final = 6
_DROPPED_BITS: Final = 12
_MAGIC: Final = b"DKH2"
_MAX_DIM: Final = 2**14
_MAX_CODE_BITS: Final = 32
_MAX_SUM: Final = 2**50
# Shorter than any real difference of means: it has no direction.
_LEAST_LENGTH: Final = 1e-9


@dataclass(frozen=True, eq=False)
class Bundles:
    """Classes as sums of their samples: what is kept, merged and sent.

    A hypervector is linear in the feature, so the sum of the features stands for the sum of the
    hypervectors in a tenth of its bytes, and the common centre need not be known yet. Sums of whole
    numbers are exact.

    Attributes:
        labels: class names, sorted, unique.
        counts: int64 [c], samples of each class, all ≥ 1.
        sums: float64 [c, d].

    Example:
        >>> ab = Bundles.fit([[1.0, 0.0], [0.0, 1.0]], ["a", "b"])
        >>> ab.merge(Bundles.fit([[1.0, 0.0]], ["a"])).counts.tolist()
        [2, 1]
    """

    labels: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    sums: FloatArray

    @classmethod
    def fit(cls, vectors: npt.ArrayLike, labels: Sequence[str]) -> Bundles:
        """Bundle labelled features or hypervectors [n, d].

        Raises:
            OodError: vectors or labels are empty, not finite, or do not match.
        """
        rows = check_features(vectors)
        names, index = class_index(labels, samples=len(rows))
        sums = np.stack([rows[index == k].sum(axis=0) for k in range(len(names))])
        return cls(names, np.bincount(index).astype(np.int64), sums)

    @property
    def means(self) -> FloatArray:
        """The mean of each class, float64 [c, d]."""
        result: FloatArray = self.sums / self.counts[:, None]
        return result

    @property
    def size_bytes(self) -> int:
        """Bytes as written: a count of 8 and d float32 for a class, and its name."""
        names = sum(len(label.encode()) for label in self.labels)
        return len(self.labels) * (8 + 4 * int(self.sums.shape[1])) + names

    def merge(self, other: Bundles) -> Bundles:
        """Bundle both sets of samples together; equal to `fit` on their union, up to rounding.

        Raises:
            OodError: the two are of different dimensions.
        """
        if other.sums.shape[1] != self.sums.shape[1]:
            raise OodError(
                f"cannot merge bundles of dimension {self.sums.shape[1]} and {other.sums.shape[1]}"
            )
        labels = tuple(sorted({*self.labels, *other.labels}))
        counts = add_by_label(labels, (self.labels, self.counts), (other.labels, other.counts))
        sums = add_by_label(labels, (self.labels, self.sums), (other.labels, other.sums))
        return Bundles(labels, counts, sums)


class Directions:
    """Classes as directions from their common centre, the mean of their means.

    A class that is the centre (the only class) has no direction; its cosine is zero.

    Args:
        means: float64 [c, size], the mean hypervector of each class.
    """

    def __init__(self, means: FloatArray) -> None:
        self._centre = means.mean(axis=0)
        self._centred = means - self._centre
        self._units = _unit_rows(self._centred).T

    def cosines(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Compare hypervectors [n, size] with every class: float64 [n, c] in −1..1."""
        unit = _unit_rows(vectors - self._centre)
        result: FloatArray = np.clip(unit @ self._units, -1, 1).astype(np.float64)
        return result

    def bit_cosines(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Compare by signs alone: 1 − 2 · (bits that differ) / size, float64 [n, c]."""
        bits = np.packbits(vectors > self._centre, axis=1)
        differing = [np.bitwise_count(bits ^ row).sum(axis=1) for row in self._bits]
        result: FloatArray = 1.0 - 2.0 * np.stack(differing, axis=1) / len(self._centre)
        return result

    @cached_property
    def _bits(self) -> npt.NDArray[np.uint8]:
        return np.packbits(self._centred > 0, axis=1)


class ClassHypervectors:
    """Classes, by their mean features, ready to be compared with samples.

    Args:
        means: the mean feature of each class [c, d].
        seed: what the projection is drawn from, usually the encoder's digest.
        size: length of a hypervector.

    Raises:
        OodError: means are empty or not finite, or the seed is empty.
    """

    def __init__(self, means: npt.ArrayLike, seed: str, *, size: int = HYPERVECTOR_SIZE) -> None:
        rows = check_features(means)
        self._dim = rows.shape[1]
        self._projection = (_projection(self._dim, size, seed) / np.sqrt(size)).astype(np.float32)
        self._directions = Directions(rows @ self._projection)

    def cosines(self, features: npt.ArrayLike) -> FloatArray:
        """Compare features [n, d] with every class: float64 [n, c] in −1..1.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=self._dim).astype(np.float32)
        return self._directions.cosines(rows @ self._projection)


@dataclass(frozen=True, eq=False)
class HypervectorState:
    """The hyperdimensional score: minus the largest cosine to a bundle of hypervectors.

    Attributes:
        classes: bundles of whole-number hypervectors.
        dim: the dimension of the features.
        seed: what the projection is drawn from, usually the encoder's digest.
        binary: compare by sign bits only.

    Example:
        >>> state = HypervectorState.fit([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], seed="digest")
        >>> near, far = state.score([[1.0, 0.0], [-1.0, -1.0]])
        >>> bool(near < far)
        True
    """

    classes: Bundles
    dim: int
    seed: str
    binary: bool = False

    @classmethod
    def fit(
        cls, features: npt.ArrayLike, labels: Sequence[str], *, seed: str, binary: bool = False
    ) -> HypervectorState:
        """Bundle labelled features [n, d], each number at most 1.

        Raises:
            OodError: features or labels are empty, not finite, too large, or do not match; or the
                seed is empty.
        """
        rows = on_grid(features, bits=_FEATURE_BITS)
        vectors = _whole_hypervectors(rows, _whole_projection(rows.shape[1], seed))
        return cls(Bundles.fit(vectors, labels), rows.shape[1], seed, binary)

    def merge(self, other: HypervectorState) -> HypervectorState:
        """Return the bundles of both sets of samples.

        Raises:
            OodError: the two differ in seed, dimension or comparison.
        """
        if (other.seed, other.dim, other.binary) != (self.seed, self.dim, self.binary):
            raise OodError("cannot merge hypervectors of different seeds, dimensions or kinds")
        return HypervectorState(self.classes.merge(other.classes), self.dim, self.seed, self.binary)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return minus the largest cosine, float64 [n] in −1..1.

        Raises:
            OodError: features are empty, not finite, too large, or of another dimension.
        """
        rows = on_grid(check_features(features, dim=self.dim), bits=_FEATURE_BITS)
        vectors = _whole_hypervectors(rows, self._matrix)
        compare = self._directions.bit_cosines if self.binary else self._directions.cosines
        result: FloatArray = -compare(vectors).max(axis=1)
        return result

    def to_bytes(self) -> bytes:
        """Write the state; the same state always gives the same bytes.

        Bundles travel as what they differ by from their class's part of the common sum, each row in
        as many bits as its largest difference needs; nothing is lost.
        """
        counts, bundles = self.classes.counts, self.classes.sums.astype(np.int64)
        total = int(counts.sum())
        common = (2 * bundles.sum(axis=0) + total) // (2 * total)
        writer = Writer(_MAGIC)
        writer.integers("<i8", [int(self.binary), self.dim])
        writer.blob(self.seed.encode())
        writer.names(self.classes.labels)
        writer.integers("<i8", counts)
        writer.integers("<i8", common)
        for row, count in zip(bundles, counts.tolist(), strict=True):
            rest = row - count * common
            zigzag = np.where(rest < 0, -2 * rest - 1, 2 * rest)
            width = max(int(zigzag.max()).bit_length(), 1)
            writer.integers("u1", [width])
            writer.blob(_pack(zigzag, width))
        return writer.done()

    @classmethod
    def from_bytes(cls, data: bytes) -> HypervectorState:
        """Read what `to_bytes` wrote, trusting nothing.

        Raises:
            OodError: the bytes are no such state: wrong mark, length or range.
        """
        reader = Reader(data, _MAGIC)
        binary, dim = reader.integers("<i8", 2).tolist()
        if binary not in {0, 1} or not 1 <= dim <= _MAX_DIM:
            raise OodError(f"hypervectors declare kind {binary} and dimension {dim}")
        try:
            seed = reader.blob().decode()
        except UnicodeDecodeError as error:
            raise OodError("the seed is not UTF-8") from error
        labels = reader.names()
        counts = reader.counts(len(labels))
        common = reader.integers("<i8", STATE_SIZE)
        if not seed or (np.abs(common) > _MAX_SUM // counts.sum()).any():
            raise OodError("hypervectors declare no seed, or sums out of range")
        bundles = np.zeros((len(labels), STATE_SIZE))
        for place, count in enumerate(counts.tolist()):
            width = int(reader.integers("u1", 1)[0])
            zigzag = _unpack(reader.blob(), width, STATE_SIZE)
            rest = np.where(zigzag & 1, -(zigzag >> 1) - 1, zigzag >> 1)
            bundles[place] = rest + count * common
        reader.end()
        return cls(Bundles(labels, counts, bundles), dim, seed, bool(binary))

    @cached_property
    def _matrix(self) -> FloatArray:
        return _whole_projection(self.dim, self.seed)

    @cached_property
    def _directions(self) -> Directions:
        return Directions(self.classes.means)


def _projection(dim: int, size: int, seed: str) -> FloatArray:
    return gaussian_matrix(dim, size, seed=seed, purpose="hyperdimensional score")


def _whole_projection(dim: int, seed: str) -> FloatArray:
    result: FloatArray = np.rint(_projection(dim, STATE_SIZE, seed) * 2**_PROJECTION_BITS)
    return result


def _whole_hypervectors(rows: npt.NDArray[np.int64], matrix: FloatArray) -> FloatArray:
    """Project exactly, then round once: whole numbers, float64 [n, size]."""
    exact = rows.astype(np.float64) @ matrix
    result: FloatArray = np.floor(exact / 2**_DROPPED_BITS + 0.5)
    return result


def _unit_rows(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = (rows / np.where(norm > _LEAST_LENGTH, norm, np.inf)).astype(
        np.float32
    )
    return unit


def _pack(values: npt.NDArray[np.int64], width: int) -> bytes:
    bits = (values[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _unpack(data: bytes, width: int, count: int) -> npt.NDArray[np.int64]:
    if not 1 <= width <= _MAX_CODE_BITS or len(data) != (width * count + 7) // 8:
        raise OodError(f"a bundle of {count} numbers has {len(data)} bytes at {width} bits")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=width * count)
    result: npt.NDArray[np.int64] = (
        bits.reshape(count, width).astype(np.int64) << np.arange(width)
    ).sum(axis=1)
    return result
