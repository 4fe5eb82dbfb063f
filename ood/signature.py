"""The signature of a data distribution, by which the catalogue is searched, and their similarity.

A signature is what a random projection (Johnson and Lindenstrauss, 1984) leaves of the mean, of
the dominant clusters' means and of the variance of features, packed to integers. Devices and the
catalogue call it; it needs no labels and holds no sample. Version 1 (mean kernel embeddings, mark
``DKS1``) is refused: it cannot be turned into this one.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ood.clusters import clusters
from ood.errors import OodError
from ood.projection import gaussian_matrix
from ood.validation import FloatArray, check_features

# From here on two signatures are of the same distribution rather than not; below, a search finds
# nothing. benchmarks/retrieval.py measures what this decides.
DEFAULT_MIN_SIMILARITY = 0.5
DIRECTIONS = 256
CLUSTERS = 13

_MAGIC = b"DKS2"
_OLD_MAGIC = b"DKS1"
_CACHED_PROJECTIONS = 2
# Between-cluster variance below this share of all variance is as good as none: ridge of the
# discount in `similarities`.
_RIDGE = 0.003
# Two samples of one distribution differ by what sampling adds, 1/n + 1/m on average; this many
# times as much, and a little more, is as likely one variant as two. Chosen on CIFAR-100 and Grocery
# variants only (benchmarks/retrieval.py). A logistic regression there is steeper, 14; 4 keeps the
# order of what is further away readable.
_SAMPLING = 1.25
_TOLERANCE = 0.007
_STEEPNESS = 4.0
# Variance below this, of features of unit length, is rounding.
_LEAST_VARIANCE = 1e-6
# magic, samples, dimension, seed digest; variance, step of the mean; then shares and steps.
_HEADER = struct.Struct(f"<4sIH16s{2 + 2 * CLUSTERS}f")
SIZE_BYTES = _HEADER.size + (2 + CLUSTERS) * DIRECTIONS


@dataclass(frozen=True, eq=False)
class Signature:
    """A distribution of features in less than 4 KB, whatever their number and dimension.

    Attributes:
        samples: how many features it was made of.
        dim: their dimension.
        seed_digest: the first 16 bytes of SHA-256 of the seed; only equal ones compare.
        variance: their mean squared distance from the mean, after projection.
        mean_step: what one unit of `mean` is worth.
        mean: int16 [256], the overall hypervector: the projected mean.
        shares: float32 [13], the part of the samples in each cluster, largest first; then zeros.
        steps: float32 [13], what one unit of each of `deviations` is worth.
        deviations: int8 [13, 256], each cluster's projected mean minus the overall one.
    """

    samples: int
    dim: int
    seed_digest: bytes
    variance: float
    mean_step: float
    mean: npt.NDArray[np.int16]
    shares: npt.NDArray[np.float32]
    steps: npt.NDArray[np.float32]
    deviations: npt.NDArray[np.int8]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the signature as `SIZE_BYTES` bytes."""
        head = _HEADER.pack(
            _MAGIC,
            self.samples,
            self.dim,
            self.seed_digest,
            self.variance,
            self.mean_step,
            *self.shares.tolist(),
            *self.steps.tolist(),
        )
        return head + self.mean.astype("<i2").tobytes() + self.deviations.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Signature:
        """Read what `to_bytes` wrote, trusting nothing.

        Raises:
            OodError: the bytes are no signature: wrong length, mark or version, not finite, or
                clusters that contradict the moments.
        """
        if data[:4] == _OLD_MAGIC:
            raise OodError("a signature of version 1 is not read any more; make it again")
        if len(data) != SIZE_BYTES:
            raise OodError(f"a signature has {SIZE_BYTES} bytes; found {len(data)}")
        magic, samples, dim, seed_digest, *numbers = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise OodError(f"not a signature of a known version: it begins with {magic!r}")
        if samples < 1 or dim < 1:
            raise OodError(f"a signature of {samples} samples of dimension {dim} cannot be")
        moments = np.array(numbers, dtype=np.float32)
        if not np.isfinite(moments).all() or (moments < 0).any():
            raise OodError("the signature's moments are not finite and non-negative")
        body = _HEADER.size + 2 * DIRECTIONS
        result = cls(
            samples,
            dim,
            seed_digest,
            float(moments[0]),
            float(moments[1]),
            np.frombuffer(data[_HEADER.size : body], dtype="<i2").astype(np.int16),
            moments[2 : 2 + CLUSTERS].copy(),
            moments[2 + CLUSTERS :].copy(),
            np.frombuffer(data, dtype=np.int8, offset=body).reshape(CLUSTERS, -1).copy(),
        )
        result.check()
        return result

    def check(self) -> None:
        """See that the parts agree.

        Raises:
            OodError: the shares are not of one whole, or the clusters lie elsewhere than the mean
                or the variance says.
        """
        if abs(float(self.shares.sum()) - 1) > 1e-3:
            raise OodError(f"the signature's clusters hold {self.shares.sum():g} of all samples")
        deviations = self.deviations.astype(np.float64) * self.steps[:, None]
        rounding = float(self.steps.max()) * math.sqrt(DIRECTIONS)
        if np.linalg.norm(self.shares @ deviations) > rounding + 1e-6:
            raise OodError("the signature's clusters do not have the mean it claims")
        between = math.sqrt(float(self.shares @ np.square(deviations).sum(axis=1)))
        if between > math.sqrt(self.variance) + rounding + 1e-6:
            raise OodError("the signature's clusters are not within the variance it claims")


def signature(features: npt.ArrayLike, *, seed: str) -> Signature:
    """Describe the distribution that features come from.

    Args:
        features: l2-normalised features [n, d]; n ≥ 64 for a similarity that can be relied on.
        seed: the encoder's digest; signatures of different encoders do not compare.

    Raises:
        OodError: features are empty, not finite or too large, or the seed is empty.
    """
    rows = check_features(features)
    samples, dim = rows.shape
    if dim >= 2**16 or samples >= 2**32:
        raise OodError(f"features of shape {rows.shape} are too many for a signature")
    if np.abs(rows).max() > 1e3:
        raise OodError(f"features reach {np.abs(rows).max():g}; scale them to unit length")
    points = rows @ _projection(dim, seed)
    mean = points.mean(axis=0)
    points = points - mean
    centres, found = clusters(points, CLUSTERS)
    shares, deviations = np.zeros(CLUSTERS, np.float32), np.zeros((CLUSTERS, DIRECTIONS))
    shares[: len(found)], deviations[: len(found)] = found, centres
    mean_step = np.float32(np.abs(mean).max() / 32767)
    steps = (np.abs(deviations).max(axis=1) / 127).astype(np.float32)
    whole = np.rint(mean / (mean_step if mean_step > 0 else 1)).clip(-32767, 32767)
    packed = np.rint(deviations / np.where(steps > 0, steps, 1)[:, None]).clip(-127, 127)
    return Signature(
        samples=samples,
        dim=dim,
        seed_digest=hashlib.sha256(seed.encode()).digest()[:16],
        variance=float(np.float32(np.square(points).sum(axis=1).mean())),
        mean_step=float(mean_step),
        mean=whole.astype(np.int16),
        shares=shares,
        steps=steps,
        deviations=packed.astype(np.int8),
    )


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Signatures as arrays, to compare one with many.

    Attributes:
        samples: float64 [m].
        variance: float64 [m], unbiased.
        means: float32 [m, 256].
        factors: float32 [m, 13, 256], deviations times the root of their share: their Gram matrix
            has the eigenvalues of the scatter between clusters.
    """

    samples: FloatArray
    variance: FloatArray
    means: npt.NDArray[np.float32]
    factors: npt.NDArray[np.float32]


def unpacked(packed: npt.NDArray[np.uint8]) -> Unpacked:
    """Unpack signatures that were checked when they came, uint8 [m, `SIZE_BYTES`]."""
    m, head = len(packed), _HEADER.size

    def field(begin: int, end: int, dtype: str) -> npt.NDArray[np.generic]:
        return np.ascontiguousarray(packed[:, begin:end]).view(dtype)

    samples = field(4, 8, "<u4")[:, 0].astype(np.float64)
    numbers = field(26, head, "<f4").astype(np.float32)
    means = field(head, head + 2 * DIRECTIONS, "<i2").astype(np.float32) * numbers[:, 1:2]
    scale = np.sqrt(numbers[:, 2 : 2 + CLUSTERS]) * numbers[:, 2 + CLUSTERS :]
    factors = field(head + 2 * DIRECTIONS, SIZE_BYTES, "i1").reshape(m, CLUSTERS, DIRECTIONS)
    unbiased = numbers[:, 0] * samples / np.maximum(samples - 1, 1)
    return Unpacked(
        samples,
        np.maximum(unbiased, _LEAST_VARIANCE),
        means,
        factors.astype(np.float32) * scale[:, :, None],
    )


def similarities(one: Unpacked, many: Unpacked) -> FloatArray:
    """Compare one signature with many of the same encoder; symmetric, 0..1.

    A difference δ of means along which the clusters of a distribution lie apart may come from
    other proportions of its classes, so it counts less: c·δᵀ(B + cI)⁻¹δ, B the scatter between
    clusters and c a share of the variance, by Woodbury's identity; divided by the variance that
    remains after the same discount. The mean of both directions is 1/n + 1/m on average for two
    samples of one distribution; a logistic function of its logarithm says how likely it is that.

    Args:
        one: a single signature.
        many: m of them, or one.

    Returns:
        float64 [m].
    """
    gaps = many.means - one.means
    found = (_discounted(one, gaps) + _discounted(many, gaps)) / 2
    even = _TOLERANCE + _SAMPLING * (1 / one.samples + 1 / many.samples)
    # Beyond this it is zero anyway; the bound keeps the power finite.
    result: FloatArray = 1 / (1 + np.minimum(found / even, 1e9) ** _STEEPNESS)
    return result


def _discounted(base: Unpacked, gaps: npt.NDArray[np.float32]) -> FloatArray:
    ridge = (_RIDGE * base.variance)[:, None, None]
    gram = _gram(base)
    # Between-cluster variances l become l / (l + c).
    discount: FloatArray = np.linalg.inv(gram + ridge * np.eye(CLUSTERS)).astype(np.float64)
    along = (base.factors @ gaps[:, :, None]).astype(np.float64)
    explained = (along * (discount @ along)).sum(axis=(1, 2))
    left = _left(base, gram, discount)
    total = np.square(gaps).sum(axis=1, dtype=np.float64)
    result: FloatArray = np.maximum(total - explained, 0) / left
    return result


def unexplained(base: Unpacked) -> FloatArray:
    """The variance that is left after the discount of `similarities`, float64 [m]; above zero."""
    gram = _gram(base)
    ridge = (_RIDGE * base.variance)[:, None, None]
    inverse = np.linalg.inv(gram + ridge * np.eye(CLUSTERS)).astype(np.float64)
    return _left(base, gram, inverse)


def _gram(base: Unpacked) -> FloatArray:
    result: FloatArray = (base.factors @ base.factors.transpose(0, 2, 1)).astype(np.float64)
    return result


def _left(base: Unpacked, gram: FloatArray, discount: FloatArray) -> FloatArray:
    within = np.maximum(base.variance - np.trace(gram, axis1=1, axis2=2), 0) / DIRECTIONS
    shrunk = discount @ gram
    lost = (shrunk * gram.transpose(0, 2, 1)).sum(axis=(1, 2))
    lost += within * np.trace(shrunk, axis1=1, axis2=2)
    result: FloatArray = np.maximum(base.variance - lost, _RIDGE * base.variance)
    return result


def similarity(a: Signature, b: Signature) -> float:
    """Say how alike the distributions behind two signatures are, 0..1; symmetric.

    See `similarities`: 0.5 and more means the same distribution rather than another one, whatever
    the sample sizes (from 64) and, within reason, whatever the proportions of its classes.

    Raises:
        OodError: the signatures are of different encoders (seed or dimension).
    """
    if a.seed_digest != b.seed_digest or a.dim != b.dim:
        raise OodError("signatures of different encoders do not compare")
    first, second = (
        unpacked(np.frombuffer(item.to_bytes(), dtype=np.uint8)[None]) for item in (a, b)
    )
    return float(similarities(first, second)[0])


@lru_cache(maxsize=_CACHED_PROJECTIONS)
def _projection(dim: int, seed: str) -> FloatArray:
    """The projection that all who have an encoder share, float64 [dim, 256]."""
    matrix = gaussian_matrix(dim, DIRECTIONS, seed=seed, purpose="signature 2")
    matrix /= math.sqrt(DIRECTIONS)
    matrix.flags.writeable = False
    return matrix
