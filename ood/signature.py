"""The signature of a data distribution, by which the catalogue is searched, and their similarity.

A signature is the mean, over samples, of a random hypervector encoding of each feature: the kernel
mean embedding under Gaussian kernels of several widths (Rahimi and Recht, "Random features for
large-scale kernel machines", 2007; Gretton et al., "A kernel two-sample test", 2012), packed to
int8. Called by devices and the catalogue; needs no labels and reveals no sample.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.projection import gaussian_matrix
from ood.validation import FloatArray, check_features

# Below this a candidate is not worth pulling. Measured on two encoders, 64 fresh samples against
# 200: the same distribution 0.91 and more; digits 5-9 against all digits 0.83 and more; digits 0-4
# against 5-9 0.76 on average, 0.86 at most; another camera below 0.2. Very unequal class
# proportions may fall below it.
DEFAULT_MIN_SIMILARITY = 0.8

_MAGIC = b"DKS1"
_DIRECTIONS = 208
# Kernel widths for features of unit length: from within a class to across everything.
_WIDTHS = tuple(0.05 * 2 ** (k / 2) for k in range(9))
# The mean kernel value inside a distribution at which two are compared: narrower kernels are
# noisy, wider ones see no difference.
_TARGET = 0.2
# magic, samples, dimension, seed digest; then the squared norm and the int8 step for each width.
_HEADER = struct.Struct(f"<4sIH16s{2 * len(_WIDTHS)}f")
SIZE_BYTES = _HEADER.size + len(_WIDTHS) * 2 * _DIRECTIONS


@dataclass(frozen=True, eq=False)
class Signature:
    """A distribution of features in about 3.8 KB, whatever their number and dimension.

    Attributes:
        samples: how many features it was made of.
        dim: their dimension.
        seed_digest: the first 16 bytes of SHA-256 of the seed; only equal ones compare.
        moments: float32 [w], squared norm of the mean embedding at each kernel width, unpacked:
            the mean kernel value over all pairs of samples.
        steps: float32 [w], what one unit of a hypervector's int8 is worth.
        hypervectors: int8 [w, 2·208], cosine and sine parts.
    """

    samples: int
    dim: int
    seed_digest: bytes
    moments: npt.NDArray[np.float32]
    steps: npt.NDArray[np.float32]
    hypervectors: npt.NDArray[np.int8]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the signature as `SIZE_BYTES` bytes."""
        pairs = np.stack([self.moments, self.steps], axis=1).ravel().tolist()
        head = _HEADER.pack(_MAGIC, self.samples, self.dim, self.seed_digest, *pairs)
        return head + self.hypervectors.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Signature:
        """Read what `to_bytes` wrote, trusting nothing.

        Raises:
            OodError: the bytes are no signature: wrong length, mark or version, not finite, or
                hypervectors that do not have the norms they claim.
        """
        if len(data) != SIZE_BYTES:
            raise OodError(f"a signature has {SIZE_BYTES} bytes; found {len(data)}")
        magic, samples, dim, seed_digest, *pairs = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise OodError(f"not a signature of a known version: it begins with {magic!r}")
        if samples < 1 or dim < 1:
            raise OodError(f"a signature of {samples} samples of dimension {dim} cannot be")
        numbers = np.array(pairs, dtype=np.float32).reshape(-1, 2)
        if not np.isfinite(numbers).all() or (numbers < 0).any():
            raise OodError("the signature's moments are not finite and non-negative")
        moments, steps = numbers[:, 0].copy(), numbers[:, 1].copy()
        packed = np.frombuffer(data, dtype=np.int8, offset=_HEADER.size)
        result = cls(
            samples, dim, seed_digest, moments, steps, packed.reshape(len(_WIDTHS), -1).copy()
        )
        norms = np.square(result.embeddings()).sum(axis=1)
        if (np.abs(norms - moments) > 0.02).any() or (moments > 1.001).any():
            raise OodError("the signature's hypervectors do not have the norms it claims")
        return result

    def embeddings(self) -> FloatArray:
        """Return the unpacked mean embeddings, float64 [w, 2·208]."""
        result: FloatArray = self.hypervectors.astype(np.float64) * self.steps[:, None]
        return result


def signature(features: npt.ArrayLike, *, seed: str) -> Signature:
    """Describe the distribution that features come from.

    Args:
        features: l2-normalised features [n, d]; n ≥ 64 for a similarity that can be relied on.
        seed: the encoder's digest; signatures of different encoders do not compare.

    Raises:
        OodError: features are empty or not finite, or the seed is empty.
    """
    rows = check_features(features)
    samples, dim = rows.shape
    if dim >= 2**16 or samples >= 2**32:
        raise OodError(f"features of shape {rows.shape} are too many for a signature")
    directions = gaussian_matrix(dim, _DIRECTIONS, seed=seed, purpose="signature")
    phases = rows @ directions
    means = np.stack(
        [
            np.concatenate(
                [np.cos(phases / width).mean(axis=0), np.sin(phases / width).mean(axis=0)]
            )
            for width in _WIDTHS
        ]
    ) / math.sqrt(_DIRECTIONS)
    steps = (np.abs(means).max(axis=1) / 127).astype(np.float32)
    packed = np.rint(means / np.where(steps > 0, steps, 1)[:, None]).clip(-127, 127)
    return Signature(
        samples=samples,
        dim=dim,
        seed_digest=hashlib.sha256(seed.encode()).digest()[:16],
        moments=np.square(means).sum(axis=1).astype(np.float32),
        steps=steps,
        hypervectors=packed.astype(np.int8),
    )


def similarity(a: Signature, b: Signature) -> float:
    """Say how alike the distributions behind two signatures are, 0..1; symmetric.

    The square of the cosine between the mean embeddings, with the share that sampling noise adds
    to their norms removed (the unbiased estimate of Gretton et al. 2012, lemma 6), so that about 1
    is reached by two samples of one distribution whatever their sizes. The kernel width is the one
    at which samples of the two have a mean kernel value of 0.2 among themselves, interpolated.

    Raises:
        OodError: the signatures are of different encoders (seed or dimension).
    """
    if a.seed_digest != b.seed_digest or a.dim != b.dim:
        raise OodError("signatures of different encoders do not compare")
    norms = np.sqrt(_unbiased(a) * _unbiased(b))
    inner = np.einsum("wd,wd->w", a.embeddings(), b.embeddings())
    cosines = np.clip(inner / norms, 0.0, 1.0)
    # Mean kernel values grow with the width; the running maximum removes what noise disorders.
    levels = np.maximum.accumulate(np.log(norms))
    return float(np.interp(math.log(_TARGET), levels, cosines) ** 2)


def _unbiased(item: Signature) -> FloatArray:
    """The mean kernel value over pairs of different samples, at each width."""
    moments = item.moments.astype(np.float64)
    if item.samples > 1:
        moments = (item.samples * moments - 1.0) / (item.samples - 1)
    return np.maximum(moments, 1e-3)
