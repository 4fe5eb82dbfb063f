"""The hyperdimensional score as a state of its own: small, and exact under merging.

Wilson, Fischer, Sünderhauf and Dayoub, "Hyperdimensional feature fusion for out-of-distribution
detection" (2023): features of several blocks, each centred and projected by a fixed random matrix,
are bundled into one hypervector; the score is minus the largest cosine to a class's bundle. In
`ood.hyperdimensional` hypervectors are made from class means when they are wanted; here they are
kept themselves, for devices that keep nothing else. Called by `ood.fitted`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.moments import add_by_label, class_index, on_grid
from ood.validation import FloatArray
from ood.wire import Reader, Writer

SIZE: Final = 512
# Features are rounded to steps of 2^-8 before they are projected, and the hypervectors to steps of
# 64 of those.
_BITS: Final = 8
_SHIFT: Final = 6
_MAGIC: Final = b"DKH1"
_MAX_CODE_BITS: Final = 32
_MAX_SUM: Final = 2**50


@dataclass(frozen=True, eq=False)
class HypervectorState:
    """Bundles of whole-number hypervectors, one for each class.

    Projection by random signs is exact on whole numbers, so bundles do not depend on the order of
    samples or merges. Centring is linear: the mean of all class means, block by block, comes off
    the bundles when they are compared, which is the same as taking it off every feature.

    Attributes:
        labels: class names, sorted, unique.
        counts: int64 [c].
        bundles: int64 [c, size].
        parts: the widths of the blocks that features are put together from.
        seed: what the projections are drawn from, usually the encoder's digest.
        binary: compare by sign bits only.

    Example:
        >>> state = HypervectorState.fit([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], seed="digest")
        >>> near, far = state.score([[1.0, 0.0], [-1.0, -1.0]])
        >>> bool(near < far)
        True
    """

    labels: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    bundles: npt.NDArray[np.int64]
    parts: tuple[int, ...]
    seed: str
    binary: bool = False

    @classmethod
    def fit(
        cls,
        features: npt.ArrayLike,
        labels: Sequence[str],
        *,
        seed: str,
        parts: Sequence[int] = (),
        binary: bool = False,
        size: int = SIZE,
    ) -> HypervectorState:
        """Bundle labelled features [n, d], at most of unit length in each part.

        Args:
            features: [n, d].
            labels: n names.
            seed: usually the encoder's digest.
            parts: the widths of the blocks; one of d when empty.
            binary: compare by sign bits only.
            size: length of a hypervector, a multiple of 8.

        Raises:
            OodError: features or labels are empty, not finite, too large, or do not match; the
                parts do not add up; the seed is empty; or the size is no multiple of 8.
        """
        rows = on_grid(features, bits=_BITS)
        widths = tuple(parts) or (rows.shape[1],)
        if not seed:
            raise OodError("the seed is empty; give the encoder's digest")
        if size < 8 or size % 8:
            raise OodError(f"hypervectors of {size} numbers; expected a multiple of 8")
        if sum(widths) != rows.shape[1] or min(widths) < 1:
            raise OodError(f"parts {list(widths)} do not add up to dimension {rows.shape[1]}")
        names, index = class_index(labels, samples=len(rows))
        bundles = np.zeros((len(names), size), np.int64)
        np.add.at(bundles, index, _project(rows, sign_matrices(widths, size, seed)))
        counts = np.bincount(index, minlength=len(names)).astype(np.int64)
        return cls(names, counts, bundles, widths, seed, binary)

    @property
    def size(self) -> int:
        """Length of a hypervector."""
        return int(self.bundles.shape[1])

    def merge(self, other: HypervectorState) -> HypervectorState:
        """Return the bundles of both sets of samples.

        Raises:
            OodError: the two differ in seed, parts, size or comparison.
        """
        mine = (self.seed, self.parts, self.size, self.binary)
        if (other.seed, other.parts, other.size, other.binary) != mine:
            raise OodError("cannot merge hypervectors of different seeds, parts, sizes or kinds")
        labels = tuple(sorted({*self.labels, *other.labels}))
        counts = add_by_label(labels, (self.labels, self.counts), (other.labels, other.counts))
        bundles = add_by_label(labels, (self.labels, self.bundles), (other.labels, other.bundles))
        return HypervectorState(labels, counts, bundles, self.parts, self.seed, self.binary)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return minus the largest cosine, float64 [n] in −1..1.

        The cosine of the binary kind is 1 − 2 · (bits that differ) / size.

        Raises:
            OodError: features are empty, not finite, too large, or of another dimension.
        """
        rows = on_grid(features, bits=_BITS)
        if rows.shape[1] != sum(self.parts):
            raise OodError(f"features have dimension {rows.shape[1]}; expected {sum(self.parts)}")
        vectors = _project(rows, self._matrices) - self._centre
        if self.binary:
            differing = np.stack(
                [np.bitwise_count(_bits(vectors) ^ row).sum(axis=1) for row in self._packed], axis=1
            )
            result: FloatArray = 2.0 * differing.min(axis=1) / self.size - 1.0
            return result
        cosines = _unit(vectors).astype(np.float32) @ self._directions
        largest: FloatArray = np.clip(cosines.max(axis=1), -1, 1).astype(np.float64)
        return -largest

    def to_bytes(self) -> bytes:
        """Write the state; the same state always gives the same bytes.

        Bundles travel as what they differ by from their class's part of the common sum, each row in
        as many bits as its largest difference needs; nothing is lost.
        """
        writer = Writer(_MAGIC)
        writer.integers("<i8", [self.size, int(self.binary), len(self.parts), *self.parts])
        writer.blob(self.seed.encode())
        writer.names(self.labels)
        writer.integers("<i8", self.counts)
        common = _rounded(self.bundles.sum(axis=0), int(self.counts.sum()))
        writer.integers("<i8", common)
        for row, count in zip(self.bundles, self.counts.tolist(), strict=True):
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
        size, binary, blocks = reader.integers("<i8", 3).tolist()
        if not 8 <= size <= 2**16 or size % 8 or binary not in {0, 1} or not 1 <= blocks <= 64:
            raise OodError("hypervectors declare an impossible size, kind or number of parts")
        parts = tuple(reader.integers("<i8", blocks).tolist())
        if min(parts) < 1 or sum(parts) > 2**14:
            raise OodError(f"hypervectors declare parts {list(parts)}")
        try:
            seed = reader.blob().decode()
        except UnicodeDecodeError as error:
            raise OodError("the seed is not UTF-8") from error
        labels = reader.names()
        counts = reader.counts(len(labels))
        common = reader.integers("<i8", size)
        if not seed or (np.abs(common) > _MAX_SUM).any():
            raise OodError("hypervectors declare no seed, or sums out of range")
        bundles = np.zeros((len(labels), size), np.int64)
        for place, count in enumerate(counts.tolist()):
            width = int(reader.integers("u1", 1)[0])
            zigzag = _unpack(reader.blob(), width, size)
            rest = np.where(zigzag & 1, -(zigzag >> 1) - 1, zigzag >> 1)
            bundles[place] = rest + count * common
        reader.end()
        return cls(labels, counts, bundles, parts, seed, bool(binary))

    @cached_property
    def _matrices(self) -> list[FloatArray]:
        return sign_matrices(self.parts, self.size, self.seed)

    @cached_property
    def _centre(self) -> FloatArray:
        result: FloatArray = (self.bundles / self.counts[:, None]).mean(axis=0)
        return result

    @cached_property
    def _directions(self) -> npt.NDArray[np.float32]:
        centred = self.bundles / self.counts[:, None] - self._centre
        return _unit(centred).astype(np.float32).T

    @cached_property
    def _packed(self) -> npt.NDArray[np.uint8]:
        return _bits(self.bundles / self.counts[:, None] - self._centre)


def sign_matrices(parts: Sequence[int], size: int, seed: str) -> list[FloatArray]:
    """Return one matrix of random signs for each block, float64 [width, size]; all draw alike."""
    matrices: list[FloatArray] = []
    for block, width in enumerate(parts):
        stream = hashlib.shake_256(f"driftkeel\0hypervector\0{block}\0{seed}".encode())
        bits = np.unpackbits(np.frombuffer(stream.digest(width * size // 8), dtype=np.uint8))
        matrices.append(bits.reshape(width, size).astype(np.float64) * 2.0 - 1.0)
    return matrices


def _project(rows: npt.NDArray[np.int64], matrices: Sequence[FloatArray]) -> npt.NDArray[np.int64]:
    """Bundle the blocks' projections: int64 [n, size], exact and then rounded once."""
    total = np.zeros((len(rows), matrices[0].shape[1]))
    at = 0
    for matrix in matrices:
        total += rows[:, at : at + len(matrix)].astype(np.float64) @ matrix
        at += len(matrix)
    result: npt.NDArray[np.int64] = (total.astype(np.int64) + (1 << (_SHIFT - 1))) >> _SHIFT
    return result


def _rounded(sums: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    result: npt.NDArray[np.int64] = (2 * sums + count) // (2 * count)
    return result


def _bits(vectors: npt.NDArray[np.floating] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    return np.packbits(vectors > 0, axis=1)


def _unit(rows: FloatArray) -> FloatArray:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    result: FloatArray = rows / np.where(norm > 1e-9, norm, np.inf)
    return result


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
