"""Scores on the logits of the discriminant that class statistics give: energy, GEN, boundaries.

No classifier is trained here: the Gaussian head with one shared covariance is a linear classifier,
and its logits follow from its distances. Called by `ood.combined` and `ood.fitted`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ood.statistics import GaussianHead
from ood.validation import FloatArray, check_features

# GEN's exponent and the number of probabilities it looks at, as its paper advises for many classes.
_GEN_EXPONENT = 0.1
_GEN_TOP = 100


class Discriminant:
    """The linear classifier of a Gaussian head: logits = (x − c)·weightsᵀ + biases.

    c is the mean of the component means, so that the weights add up to zero, as those of a softmax
    classifier with weight decay do; energies depend on that choice, posteriors do not.

    Attributes:
        centre: float64 [d], c.
        weights: float64 [k, d], Σ⁻¹(μ − c) of each component.
        biases: float64 [k].
    """

    def __init__(self, head: GaussianHead) -> None:
        self.centre = head.centre
        gaps = head.means - self.centre
        self.weights = np.linalg.solve(head.covariance, gaps.T).T.astype(np.float64, copy=False)
        self.biases: FloatArray = -0.5 * np.einsum("kd,kd->k", self.weights, gaps)

    def logits(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n, k].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return self.of_rows(check_features(features, dim=len(self.centre)))

    def of_rows(self, rows: npt.NDArray[np.floating]) -> FloatArray:
        """Return the logits of features that were checked before, float64 [n, k]."""
        result: FloatArray = (rows - self.centre) @ self.weights.T + self.biases
        return result


class EnergyScore:
    """Minus the log of the sum of the exponentials of the logits.

    Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection" (2020), eq. 4, T = 1.
    """

    def __init__(self, head: GaussianHead) -> None:
        self._classifier = Discriminant(head)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n]; see `Discriminant.logits` for errors."""
        return -log_sum_exp(self._classifier.logits(features))


class GenScore:
    """The generalised entropy of the largest posteriors.

    Liu, Lochman and Zach, "GEN: pushing the limits of softmax-based out-of-distribution detection"
    (2023), eq. 4: Σ pᵞ(1 − p)ᵞ over the 100 largest, γ = 0.1.
    """

    def __init__(self, head: GaussianHead) -> None:
        self._classifier = Discriminant(head)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n]; see `Discriminant.logits` for errors."""
        logits = self._classifier.logits(features)
        posterior = np.exp(logits - log_sum_exp(logits)[:, None])
        largest = np.sort(posterior, axis=1)[:, -_GEN_TOP:]
        result: FloatArray = np.power(np.clip(largest * (1 - largest), 0, 1), _GEN_EXPONENT).sum(
            axis=1
        )
        return result


class BoundaryScore:
    """Minus the mean distance to the decision boundaries, relative to that to the overall mean.

    Liu and Qin, "Fast decision boundary based out-of-distribution detector" (2024), eq. 5. One
    component has no boundary; then every score is 0.

    Args:
        head: the Gaussian head of everything installed.
        classifier: its discriminant, where that is known.

    Attributes:
        reciprocal: float64 [k, k], one over the distance between two components' weights.
    """

    def __init__(self, head: GaussianHead, classifier: Discriminant | None = None) -> None:
        self._classifier = classifier or Discriminant(head)
        weights = self._classifier.weights
        squares = np.einsum("kd,kd->k", weights, weights)
        gaps = squares[:, None] + squares - 2 * weights @ weights.T
        self.reciprocal = _reciprocal(gaps, squares)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n], ≤ 0; see `Discriminant.logits` for errors."""
        rows = check_features(features, dim=len(self._classifier.centre))
        logits = self._classifier.logits(rows)
        away = np.linalg.norm(rows - self._classifier.centre, axis=1)
        return self.from_logits(logits, away)

    def from_logits(self, logits: FloatArray, away: FloatArray) -> FloatArray:
        """Return the scores of samples whose logits are known.

        Args:
            logits: float64 [n, k], up to a number of each sample's own.
            away: float64 [n], how far each is from the mean of the means.
        """
        best = logits.argmax(axis=1)
        lead = logits.max(axis=1, keepdims=True) - logits
        others = max(logits.shape[1] - 1, 1)
        total = np.vecdot(lead, self.reciprocal[best])
        result: FloatArray = -total / (others * np.maximum(away, 1e-12))
        return result


def _reciprocal(gaps: npt.NDArray[np.floating], squares: npt.NDArray[np.floating]) -> FloatArray:
    """1/√gap; 0 where there is none: components with one mean have no boundary between them."""
    near = gaps <= 1e-12 * max(float(squares.max()), np.finfo(np.float64).tiny)
    result: FloatArray = np.where(near, 0.0, 1 / np.sqrt(np.where(near, 1.0, gaps)))
    return result


def log_sum_exp(values: FloatArray) -> FloatArray:
    """Return log Σ exp of each row, float64 [n]."""
    top = values.max(axis=1)
    result: FloatArray = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
    return result
