"""Adapting to a new domain without labels: features moved back to where the known ones lie.

A new camera or lighting moves and stretches features; per-dimension means and variances undo much
of it (Sun, Feng and Saenko, "Return of frustratingly easy domain adaptation", 2016, with diagonal
covariances; Li et al., "Revisiting batch normalization for practical domain adaptation", 2017).
Whether it helps is judged without labels and without guessing any. Pure NumPy; reads and writes
nothing. Which samples it is fitted to, and what becomes of it, is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.trials import SIGNIFICANCE, Verdict, sign_test
from ood.errors import OodError
from ood.mixture import Mixture
from ood.statistics import ClassStatistics, GaussianHead

MIN_SAMPLES: Final = 64

# The known statistics stand in for so many samples: few shifted ones must not move anything far.
_PRIOR_SAMPLES: Final = 8.0
# Far below the variance of any dimension of unit-length features that is not constant.
_FLOOR: Final = 1e-9

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Alignment:
    """y = known_mean + gain * (x - shifted_mean), dimension by dimension.

    Attributes:
        gain: float32 [d], positive.
        shifted_mean: float32 [d].
        known_mean: float32 [d].
    """

    gain: Floats
    shifted_mean: Floats
    known_mean: Floats

    def __post_init__(self) -> None:
        parts = (self.gain, self.shifted_mean, self.known_mean)
        shapes = {part.shape for part in parts}
        if len(shapes) != 1 or self.gain.ndim != 1 or not self.gain.size:
            raise OodError(f"an alignment needs three vectors of one length; found {shapes}")
        if not all(np.isfinite(part).all() for part in parts) or (self.gain <= 0).any():
            raise OodError("an alignment must be finite, and its gain positive")

    @classmethod
    def fit(cls, shifted: NDArray[np.floating[Any]], known: NDArray[np.floating[Any]]) -> Alignment:
        """Match means and variances, both shrunk towards no change by the number of samples.

        Args:
            shifted: Features of the new domain [n, d].
            known: Features of the known one [m, d].
        """
        new, old = np.asarray(shifted, np.float64), np.asarray(known, np.float64)
        weight = len(new) / (len(new) + _PRIOR_SAMPLES)
        mean = weight * new.mean(axis=0) + (1.0 - weight) * old.mean(axis=0)
        ratio = (old.var(axis=0) + _FLOOR) / (new.var(axis=0) + _FLOOR)
        gain = ratio ** (0.5 * weight)
        return cls(
            gain.astype(np.float32), mean.astype(np.float32), old.mean(axis=0).astype(np.float32)
        )

    def apply(self, features: NDArray[np.floating[Any]]) -> Floats:
        """Features [n, d] as they would lie in the known domain, float32 [n, d]."""
        moved = self.known_mean + self.gain * (features - self.shifted_mean)
        return moved.astype(np.float32)

    def likelier(self, features: Floats, mixture: Mixture) -> NDArray[np.float64]:
        """By how much each sample is likelier with the alignment than as it is.

        log p(T(x)) + log |dT/dx| - log p(x), p the density of everything installed with all labels
        equally likely: a comparison of two densities over the same space.

        Args:
            features: Base features [n, d].
            mixture: The installed statistics' head.

        Returns:
            float64 [n], in nats; positive favours the alignment.
        """
        stretch = float(np.log(self.gain.astype(np.float64)).sum())
        moved = _log_density(mixture, self.apply(features)) + stretch
        result: NDArray[np.float64] = moved - _log_density(mixture, features)
        return result

    def applied(self, features: Floats, mixture: Mixture) -> Floats:
        """Features, aligned where that is likelier.

        A sample of the domain that was known before stays as it is, so a stream of both is served.
        """
        chosen = self.likelier(features, mixture) > 0.0
        return np.where(chosen[:, None], self.apply(features), features)

    def to_arrays(self) -> dict[str, Floats]:
        """What is written: three vectors."""
        return {
            "gain": self.gain,
            "shifted_mean": self.shifted_mean,
            "known_mean": self.known_mean,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Floats]) -> Alignment:
        """What :meth:`to_arrays` gave.

        Raises:
            OodError: The arrays are no alignment.
        """
        if set(arrays) != {"gain", "shifted_mean", "known_mean"}:
            raise OodError(f"an alignment has three arrays; found {sorted(arrays)}")
        return cls(**{name: np.asarray(array, np.float32) for name, array in arrays.items()})


def try_alignment(
    shifted: Floats, known: NDArray[np.floating[Any]], groups: Sequence[ClassStatistics]
) -> tuple[Alignment | None, Verdict]:
    """Fit an alignment and say whether it may be used, by a criterion without pseudo-labels.

    Fitted on every other sample it is judged on the rest, and the other way round. Both times, by a
    one-sided sign test at 5 %, most samples that it was not fitted to must be likelier with it, and
    must show more of the known classes: the density of the classes must gain over that of one
    Gaussian with the same total mean and covariance. Any cloud can be moved to where the known
    ones lie, and that makes new classes likelier too; it does not make them look like old ones.

    Args:
        shifted: Base features since the onset, unlabelled, in order of arrival [n, d].
        known: The running generation's calibration features [m, d].
        groups: Statistics of the installed bundles in the base space, in canonical order.

    Returns:
        The alignment fitted to all samples, or None; and the verdict with what was measured.
    """
    if len(shifted) < MIN_SAMPLES:
        reason = f"too few samples to align by: {len(shifted)} of {MIN_SAMPLES}"
        return None, Verdict(False, reason, {"samples": float(len(shifted))})
    mixture, cloud = Mixture.from_statistics(groups), _one_gaussian(groups)

    def structure(features: Floats) -> NDArray[np.float64]:
        return _log_density(mixture, features) - cloud.log_likelihoods(features)[:, 0]

    likelier, structured = [], []
    for half in (0, 1):
        alignment = Alignment.fit(shifted[half::2], known)
        judged = shifted[1 - half :: 2]
        likelier.append(_better(alignment.likelier(judged, mixture)))
        structured.append(_better(structure(alignment.apply(judged)) - structure(judged)))
    metrics = {
        "samples": float(len(shifted)),
        "likelier": float(np.mean([share for share, _ in likelier])),
        "likelier_p_value": max(p_value for _, p_value in likelier),
        "structured": float(np.mean([share for share, _ in structured])),
        "structured_p_value": max(p_value for _, p_value in structured),
    }
    shown = (
        f"{metrics['likelier']:.2f} of {len(shifted)} unlabelled samples are likelier, "
        f"{metrics['structured']:.2f} look more like the known classes"
    )
    if max(metrics["likelier_p_value"], metrics["structured_p_value"]) > SIGNIFICANCE:
        return None, Verdict(False, f"aligning the features does not help: {shown}", metrics)
    verdict = Verdict(True, f"aligning the features helps: {shown}", metrics)
    return Alignment.fit(shifted, known), verdict


def _one_gaussian(groups: Sequence[ClassStatistics]) -> GaussianHead:
    """All installed classes as one Gaussian: their total mean and covariance."""
    counts = np.concatenate([group.counts for group in groups])
    means = np.vstack([group.means for group in groups])
    centre = (counts / counts.sum()) @ means
    between = (means - centre) * np.sqrt(counts)[:, None]
    within = np.sum([group.scatter for group in groups], axis=0)
    total = ClassStatistics(
        ("all",),
        np.array([counts.sum()], dtype=np.int64),
        centre[None],
        within + between.T @ between,
    )
    return GaussianHead.from_statistics([total])


def _better(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The share of positive differences and the sign test's p-value."""
    gains, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return gains / len(differences), sign_test(gains, losses)


def _log_density(mixture: Mixture, features: Floats) -> NDArray[np.float64]:
    parts = mixture.log_likelihoods(features)
    peak = parts.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = peak[:, 0] + np.log(np.exp(parts - peak).sum(axis=1))
    return result - float(np.log(len(mixture.labels)))
