"""ViM: how much of a sample lies where known samples do not vary, weighed against its energy.

Computed from class statistics alone. Called by `ood.fitted`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ood.logits import Discriminant, log_sum_exp
from ood.moments import total_covariance
from ood.statistics import ClassStatistics, GaussianHead
from ood.validation import FloatArray, check_features


class VimScore:
    """Virtual-logit matching.

    Wang, Li, Feng and Zhang, "ViM: out-of-distribution with virtual-logit matching" (2022), eqs. 4
    to 7: α·‖residual‖ − log Σ exp(logits). Two things differ, so that statistics are enough:
    features are centred on their mean instead of where all logits are equal, and α is the mean
    logit of samples' own classes (instead of their largest) over the root mean square of the
    residuals (instead of their mean).
    """

    def __init__(self, statistics: ClassStatistics) -> None:
        head = GaussianHead.from_statistics([statistics])
        self._classifier = Discriminant(head)
        self._centre, scatter = total_covariance(statistics)
        _, vectors = np.linalg.eigh(scatter)
        left = statistics.dim - principal_size(statistics.dim)
        self._residual: FloatArray = vectors[:, :left]
        remaining = np.einsum("dr,de,er->", self._residual, scatter, self._residual)
        rms = float(np.sqrt(max(remaining, 0.0) / statistics.samples))
        own = np.diagonal(self._classifier.logits(statistics.means))
        level = float((own * statistics.counts).sum()) / statistics.samples
        # Without any residual in known samples, any at all is foreign.
        self._alpha = abs(level) / max(rms, 1e-9)

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        rows = check_features(features, dim=len(self._centre))
        residual = np.linalg.norm((rows - self._centre) @ self._residual, axis=1)
        result: FloatArray = self._alpha * residual - log_sum_exp(self._classifier.logits(rows))
        return result


def principal_size(dim: int) -> int:
    """Return how many directions count as principal: the paper's section 5, half of few."""
    return next((size for least, size in ((2048, 1000), (768, 512)) if dim >= least), dim // 2)
