"""Class statistics, and the Gaussian head computed from them.

Counts, means and a pooled scatter are all that is kept of the data: they merge exactly, travel with
an adapter, and give both the classifier head and the Mahalanobis score. Called by `ood.scores`, the
bundle format, the router and the trainer; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.validation import FloatArray, check_features, check_labels

# The least weight of the isotropic target. It keeps the Cholesky factor well conditioned where the
# samples are many but lie in a subspace (dead features).
_MIN_SHRINKAGE = 1e-3
# Between these lengths squares of float64 neither overflow nor lose digits.
_SAFE = (1e-100, 1e100)


def l2_normalise(x: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Scale every row to unit Euclidean length; a row of zeros stays zero.

    Args:
        x: real numbers [n, d].

    Returns:
        float32 [n, d].

    Raises:
        OodError: x is empty, not two-dimensional, or not finite.

    Example:
        >>> l2_normalise([[3.0, 4.0]]).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    rows = np.asarray(x, np.float64)
    if rows.ndim == 2 and rows.size:
        norm = np.sqrt(np.vecdot(rows, rows))
        # False where a number is NaN, infinite, or so large or small that its square is off.
        if _SAFE[0] < norm.min() and norm.max() < _SAFE[1]:
            unit: npt.NDArray[np.float32] = (rows / norm[:, None]).astype(np.float32)
            return unit
    rows = check_features(x)
    # Dividing by the largest entry first keeps the squares of huge and tiny numbers in range.
    peak = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(peak > 0, peak, 1.0)
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return (rows / np.where(norm > 0, norm, 1.0)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """What is remembered of labelled features: per class count and mean, and one pooled scatter.

    Attributes:
        labels: class names, sorted, unique.
        counts: int64 [c], samples of each class, all ≥ 1.
        means: float64 [c, d].
        scatter: float64 [d, d], the sum over all samples of (x − mean of its class)(…)ᵀ.
    """

    labels: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    means: FloatArray
    scatter: FloatArray

    def __post_init__(self) -> None:
        classes = len(self.labels)
        check_labels(self.labels, samples=classes)
        if not classes:
            raise OodError("class statistics need at least one class; found none")
        if list(self.labels) != sorted(set(self.labels)):
            raise OodError(f"labels must be sorted and unique; found {list(self.labels)[:8]}")
        if self.counts.shape != (classes,) or self.counts.dtype != np.int64:
            raise OodError(
                f"counts must be int64 [{classes}]; found {self.counts.dtype} {self.counts.shape}"
            )
        if (self.counts < 1).any() or (self.counts > 2**53).any():
            raise OodError("every class needs a count between 1 and 2^53")
        if check_features(self.means).shape[0] != classes:
            raise OodError(f"found {len(self.means)} means for {classes} classes")
        check_features(self.scatter, dim=self.dim)
        if self.scatter.shape[0] != self.dim:
            raise OodError(f"scatter must be [{self.dim}, {self.dim}]; found {self.scatter.shape}")
        if (np.diagonal(self.scatter) < 0).any():
            raise OodError("scatter has a negative variance; it is no sum of squares")
        for array in (self.counts, self.means, self.scatter):
            array.setflags(write=False)

    @classmethod
    def fit(cls, features: npt.ArrayLike, labels: Sequence[str]) -> ClassStatistics:
        """Compute the statistics of labelled features.

        Args:
            features: l2-normalised features [n, d].
            labels: the class name of each sample, n strings.

        Raises:
            OodError: features or labels are empty, not finite, or do not match.
        """
        rows = check_features(features)
        names, index = np.unique(
            np.array(check_labels(labels, samples=len(rows)), dtype=object), return_inverse=True
        )
        counts = np.bincount(index, minlength=len(names)).astype(np.int64)
        means = np.stack([rows[index == k].mean(axis=0) for k in range(len(names))])
        centred = rows - means[index]
        return cls(tuple(names.tolist()), counts, means, _symmetric(centred.T @ centred))

    @property
    def dim(self) -> int:
        """The dimension of the features."""
        return int(self.means.shape[1])

    @property
    def samples(self) -> int:
        """The number of samples over all classes."""
        return int(self.counts.sum())

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Return the statistics of both data sets together; a class in both becomes one class.

        Exact: equal, up to rounding, to fitting on the union (Chan, Golub, LeVeque 1983, eq. 2.1).

        Raises:
            OodError: the two are of different dimensions.
        """
        if other.dim != self.dim:
            raise OodError(f"cannot merge statistics of dimension {self.dim} and {other.dim}")
        labels = tuple(sorted({*self.labels, *other.labels}))
        row = {label: k for k, label in enumerate(labels)}
        mine = np.array([row[label] for label in self.labels])
        theirs = np.array([row[label] for label in other.labels])
        a, b = np.zeros(len(labels)), np.zeros(len(labels))
        a[mine], b[theirs] = self.counts, other.counts
        means_a, means_b = np.zeros((len(labels), self.dim)), np.zeros((len(labels), self.dim))
        means_a[mine], means_b[theirs] = self.means, other.means
        total = a + b
        means = (a[:, None] * means_a + b[:, None] * means_b) / total[:, None]
        # A class only one side knows keeps its mean to the last bit.
        means[b == 0] = means_a[b == 0]
        means[a == 0] = means_b[a == 0]
        gap = (means_a - means_b) * np.sqrt(a * b / total)[:, None]
        scatter = _symmetric(self.scatter + other.scatter + gap.T @ gap)
        return ClassStatistics(labels, total.astype(np.int64), means, scatter)

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what travels: ``counts`` int64 [c], ``means`` float32 [c, d], ``scatter`` float32.

        The scatter is its upper triangle row by row, d·(d+1)/2 numbers.
        """
        upper = np.triu_indices(self.dim)
        return {
            "counts": self.counts.copy(),
            "means": self.means.astype(np.float32),
            "scatter": self.scatter[upper].astype(np.float32),
        }

    @classmethod
    def from_arrays(
        cls, labels: Sequence[str], arrays: Mapping[str, npt.NDArray[np.generic]]
    ) -> ClassStatistics:
        """Rebuild statistics from what `to_arrays` gave, trusting nothing.

        Raises:
            OodError: an array is missing, unknown, of the wrong type or shape, not finite, or the
                scatter is not positive semi-definite.
        """
        if set(arrays) != {"counts", "means", "scatter"}:
            raise OodError(f"expected the arrays counts, means, scatter; found {sorted(arrays)}")
        counts, packed = arrays["counts"], arrays["scatter"]
        means = check_features(arrays["means"]).copy()
        if counts.dtype != np.int64:
            raise OodError(f"counts must be int64; found {counts.dtype}")
        dim = means.shape[1]
        if packed.dtype.kind != "f" or packed.shape != (dim * (dim + 1) // 2,):
            raise OodError(
                f"scatter must be {dim * (dim + 1) // 2} floats for dimension {dim}; "
                f"found {packed.dtype} {packed.shape}"
            )
        if not np.isfinite(packed).all():
            raise OodError("scatter holds NaN or infinity")
        half = np.zeros((dim, dim))
        half[np.triu_indices(dim)] = packed
        scatter = half + np.triu(half, 1).T
        statistics = cls(tuple(labels), counts.astype(np.int64), means, scatter)
        # Rounding to float32 moves eigenvalues by at most 6e-8 of the trace.
        slack = 1e-6 * max(float(np.trace(scatter)), np.finfo(np.float64).tiny * 1e7)
        try:
            np.linalg.cholesky(scatter + slack * np.eye(dim))
        except np.linalg.LinAlgError as error:
            raise OodError("scatter is not positive semi-definite") from error
        return statistics


def shrunk_covariance(scatter: FloatArray, *, freedom: int) -> tuple[FloatArray, float]:
    """Return the oracle-approximating shrinkage (OAS) covariance and its shrinkage weight.

    Σ = (1 − ρ)·S + ρ·(tr S / d)·I with S = scatter / freedom and ρ from Chen, Wiesel, Eldar and
    Hero, "Shrinkage algorithms for MMSE covariance estimation" (2010), eq. 23: it needs only S and
    the number of samples, and it is well conditioned also when samples are fewer than dimensions.
    Without any freedom (every class one sample) the prior of unit-length features, I / d, is used.

    Args:
        scatter: float64 [d, d].
        freedom: samples minus classes, ≥ 0.
    """
    dim = len(scatter)
    identity = np.eye(dim)
    if freedom < 1:
        return identity / dim, 1.0
    sample = scatter / freedom
    scale = float(np.trace(sample)) / dim
    # Constant features: a variance far below any real one, so that every other point is foreign.
    if scale < 1e-12:
        return sample + identity * (1e-6 / dim), 1.0
    trace_of_square = float(np.einsum("ij,ij->", sample, sample))
    squared_trace = (scale * dim) ** 2
    numerator = (1 - 2 / dim) * trace_of_square + squared_trace
    denominator = (freedom + 1 - 2 / dim) * (trace_of_square - squared_trace / dim)
    weight = 1.0 if denominator <= numerator else numerator / denominator
    weight = max(weight, _MIN_SHRINKAGE)
    return (1 - weight) * sample + weight * scale * identity, weight


def whitening(covariance: FloatArray) -> FloatArray:
    """Return W with WᵀΣW = I, upper triangular float64 [d, d], for features as rows."""
    factor = np.linalg.cholesky(covariance)
    return np.ascontiguousarray(np.linalg.solve(factor, np.eye(len(factor))).T)


def common_dim(groups: Sequence[ClassStatistics]) -> int:
    """Return the dimension that all groups share.

    Raises:
        OodError: there is no group, or the groups are of different dimensions.
    """
    if not groups:
        raise OodError("a head needs the statistics of at least one group; found none")
    dims = sorted({group.dim for group in groups})
    if len(dims) != 1:
        raise OodError(f"the groups are of different dimensions: {dims}")
    return dims[0]


class GaussianHead:
    """Linear discriminant over all installed groups: one Gaussian for each (group, label).

    All components share one covariance, pooled over every group and shrunk. What densities need is
    computed when they are first asked for; whoever only compares components needs less
    (`ood.logits.Discriminant`). Independent of the order in which groups were installed as long as
    the caller presents them in one canonical order.

    Attributes:
        components: (group index, label) of each column of `distances`.
        means: [k, d], the mean of each component, in the precision they were given in.
        centre: float64 [d], the mean of the means.
        covariance: float64 [d, d], what they share.
        labels: the distinct labels, sorted; the columns of `label_probabilities`.
        shrinkage: the weight of the isotropic target in the covariance, 0..1.

    Example:
        >>> group = ClassStatistics.fit([[0.0], [0.2], [1.0], [1.2]], ["a", "a", "b", "b"])
        >>> head = GaussianHead.from_statistics([group])
        >>> head.label_probabilities(head.log_likelihoods([[0.1]])).argmax(axis=1).tolist()
        [0]
    """

    def __init__(
        self,
        components: Sequence[tuple[int, str]],
        means: npt.NDArray[np.floating],
        covariance: FloatArray,
    ) -> None:
        self.components: tuple[tuple[int, str], ...] = tuple(components)
        self.labels: tuple[str, ...] = tuple(sorted({label for _, label in self.components}))
        self.means, self.covariance = means, covariance
        self.shrinkage = 0.0
        position = {label: k for k, label in enumerate(self.labels)}
        owner = np.array([position[label] for _, label in self.components])
        self._columns = [np.flatnonzero(owner == k) for k in range(len(self.labels))]
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError as error:
            raise OodError("the pooled covariance is not positive definite") from error
        self.centre: FloatArray = means.mean(axis=0, dtype=np.float64)
        log_determinant = 2.0 * float(np.log(np.diagonal(factor)).sum())
        self._log_normaliser = -0.5 * (log_determinant + len(factor) * np.log(2 * np.pi))

    @classmethod
    def from_statistics(cls, groups: Sequence[ClassStatistics]) -> GaussianHead:
        """Build the head of the installed groups, in their canonical order.

        Raises:
            OodError: there is no group, or the groups are of different dimensions.
        """
        common_dim(groups)
        scatter = np.sum([group.scatter for group in groups], axis=0)
        components = [
            (index, label) for index, group in enumerate(groups) for label in group.labels
        ]
        freedom = sum(group.samples for group in groups) - len(components)
        covariance, weight = shrunk_covariance(scatter, freedom=freedom)
        head = cls(components, np.vstack([group.means for group in groups]), covariance)
        head.shrinkage = weight
        return head

    @property
    def dim(self) -> int:
        """The dimension of the features."""
        return len(self.centre)

    @cached_property
    def whiten(self) -> FloatArray:
        """What brings features less the centre into the coordinates of `white`, float64 [d, d]."""
        return whitening(self.covariance)

    @cached_property
    def white_means(self) -> FloatArray:
        """The means in the coordinates of `white`, float64 [k, d]."""
        # |L⁻¹(f − μ)|² = |W(f − c)|² − 2 W(f − c)·W(μ − c) + |W(μ − c)|²; centring on c, the mean
        # of the components, keeps the three terms of a size, so that little is lost in the sum.
        result: FloatArray = (self.means - self.centre) @ self.whiten
        return result

    @cached_property
    def _offsets(self) -> FloatArray:
        result: FloatArray = np.einsum("kd,kd->k", self.white_means, self.white_means)
        return result

    def distances(self, features: npt.ArrayLike) -> FloatArray:
        """Return squared Mahalanobis distances to every component.

        Args:
            features: l2-normalised features [n, d].

        Returns:
            float64 [n, k], ≥ 0.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        white = self.white(features)
        squared = np.einsum("nd,nd->n", white, white)[:, None]
        result: FloatArray = np.maximum(
            squared - 2 * (white @ self.white_means.T) + self._offsets, 0.0
        )
        return result

    def white(self, features: npt.ArrayLike) -> FloatArray:
        """Return features in coordinates in which every component is a unit Gaussian.

        Args:
            features: l2-normalised features [n, d].

        Returns:
            float64 [n, d]; squared Euclidean distances to `white_means` are `distances`.

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        result: FloatArray = (check_features(features, dim=self.dim) - self.centre) @ self.whiten
        return result

    def log_densities(self, distances: FloatArray) -> FloatArray:
        """Return the log density at these squared distances from a component's mean."""
        result: FloatArray = self._log_normaliser - 0.5 * distances
        return result

    def log_likelihoods(self, features: npt.ArrayLike) -> FloatArray:
        """Return the log density of each feature under each component, float64 [n, k]."""
        return self.log_densities(self.distances(features))

    def label_probabilities(self, log_likelihoods: npt.ArrayLike) -> FloatArray:
        """Return the posterior over `labels`, with a uniform prior over labels.

        A label known from several groups (domains) is their equally weighted mixture.

        Args:
            log_likelihoods: [n, k]; −inf rules a component out, but not all of a row.

        Returns:
            float64 [n, len(labels)], rows sum to one.

        Raises:
            OodError: the shape is wrong, a value is NaN or +inf, or a row is all −inf.
        """
        values = np.asarray(log_likelihoods, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.components) or not len(values):
            raise OodError(
                f"log-likelihoods must be [n, {len(self.components)}]; found {values.shape}"
            )
        top = values.max(axis=1, keepdims=True)
        if not np.isfinite(top).all() or np.isnan(values).any():
            raise OodError("log-likelihoods hold NaN or +inf, or rule every component of a row out")
        weights = np.exp(values - top)
        label_weights = np.stack(
            [weights[:, columns].mean(axis=1) for columns in self._columns], axis=1
        )
        result: FloatArray = label_weights / label_weights.sum(axis=1, keepdims=True)
        return result


def _symmetric(matrix: FloatArray) -> FloatArray:
    return (matrix + matrix.T) / 2
