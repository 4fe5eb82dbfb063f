"""ViM: how much of a sample lies where known samples do not vary, weighed against its energy.

Computed from the Gaussian head alone. Called by `ood.combined` and `ood.fitted`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ood.logits import Discriminant, log_sum_exp
from ood.statistics import GaussianHead
from ood.validation import FloatArray, check_features


class VimScore:
    """Virtual-logit matching.

    Wang, Li, Feng and Zhang, "ViM: out-of-distribution with virtual-logit matching" (2022), eqs. 4
    to 7: α·‖residual‖ − log Σ exp(logits). Two things differ, so that the head is enough: features
    are centred on the mean of the means instead of where all logits are equal, and α is the mean
    logit of a class at its own mean (instead of samples' largest) over the root mean square of the
    residuals (instead of their mean).

    Args:
        head: the Gaussian head of everything installed.
        classifier: its discriminant, where that is known.

    Attributes:
        classifier: where the logits come from.
        residual: float64 [d, r], the directions that are not principal: in which known samples
            vary least.
        alpha: what a residual of length one weighs.
    """

    def __init__(self, head: GaussianHead, classifier: Discriminant | None = None) -> None:
        self.classifier = classifier or Discriminant(head)
        self.residual, self.alpha = residual_directions(head, self.classifier.biases)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=len(self.residual))
        outside = (rows - self.classifier.centre) @ self.residual
        return self.from_logits(self.classifier.of_rows(rows), outside)

    def from_logits(self, logits: FloatArray, outside: npt.NDArray[np.floating]) -> FloatArray:
        """Return the scores of samples whose logits are known.

        Args:
            logits: float64 [n, k].
            outside: [n, r], each less the mean of the means, along the residual directions.
        """
        length = np.sqrt(np.vecdot(outside, outside))
        result: FloatArray = self.alpha * length - log_sum_exp(logits)
        return result


def residual_directions(head: GaussianHead, biases: FloatArray) -> tuple[FloatArray, float]:
    """Return the directions known samples vary least in, [d, r], and what a length of one weighs.

    Args:
        head: the Gaussian head of everything installed.
        biases: float64 [k], of its discriminant.
    """
    gaps = head.means - head.centre
    # The law of total covariance, all components alike.
    values, vectors = np.linalg.eigh(_unshrunk(head) + gaps.T @ gaps / len(gaps))
    left = head.dim - principal_size(head.dim)
    rms = float(np.sqrt(max(values[:left].sum(), 0.0)))
    # A component's logit at its own mean is (μ − c)ᵀΣ⁻¹(μ − c)/2, which its bias is minus.
    level = float(-biases.mean())
    # A copy, or all the other directions would stay in memory. Without any residual in known
    # samples, any at all is foreign.
    return vectors[:, :left].copy(), abs(level) / max(rms, 1e-9)


def principal_size(dim: int) -> int:
    """Return how many directions count as principal: the paper's section 5, half of few."""
    return next((size for least, size in ((2048, 1000), (768, 512)) if dim >= least), dim // 2)


def _unshrunk(head: GaussianHead) -> FloatArray:
    """The covariance without its isotropic part, which would fill the residual of every sample."""
    weight = head.shrinkage
    if weight == 1:
        return head.covariance
    spread = float(np.trace(head.covariance)) / head.dim
    result: FloatArray = (head.covariance - weight * spread * np.eye(head.dim)) / (1 - weight)
    return result
