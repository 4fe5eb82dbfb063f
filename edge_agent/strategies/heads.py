"""Heads of the published strategies, in NumPy: softmax, alignment by class Gaussians, and drift.

Strategies call it to make a head when they learn and to read it when they predict. Everything
random comes from a seed; nothing here runs an encoder, keeps a sample or imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ood.statistics import ClassStatistics, shrunk_covariance

Floats = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_STEPS: Final = 300
_SAMPLES_PER_CLASS: Final = 32
_LEARNING_RATE: Final = 0.02
_MOMENTUM: Final = 0.9
# Of the mean variance of the features; from a hundredth to the whole of it does about the same.
_DRIFT_RIDGE: Final = 0.1


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits that are linear in features.

    Attributes:
        rows: float32 [c, d].
        bias: float32 [c].
    """

    rows: Floats
    bias: Floats

    def logits(self, features: NDArray[np.floating[Any]]) -> FloatArray:
        """Features [n, d] to logits, float64 [n, c]."""
        result: FloatArray = features.astype(np.float64) @ self.rows.T.astype(np.float64)
        return result + self.bias

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.rows.nbytes + self.bias.nbytes


def softmax(logits: NDArray[np.floating[Any]]) -> FloatArray:
    """Row-wise, float64 [n, c].

    Example:
        >>> softmax(np.zeros((1, 4))).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    result: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return result


def label_scores(scores: FloatArray, label: IntArray) -> FloatArray:
    """The best component of each label, rows scaled to sum to one.

    Args:
        scores: float64 [n, k], of the components; not negative, a row not all zero.
        label: int64 [k], the label index of each component.

    Returns:
        float64 [n, labels].
    """
    best = np.zeros((len(scores), int(label.max()) + 1))
    for column, index in enumerate(label):
        np.maximum(best[:, index], scores[:, column], out=best[:, index])
    result: FloatArray = best / best.sum(axis=1, keepdims=True)
    return result


def shared_covariances(groups: Sequence[ClassStatistics]) -> list[FloatArray]:
    """For each group the covariance its classes share, in the group's own space.

    The scatter pooled over all groups stands in for as many samples as features have dimensions:
    a group of few samples, or of one a class, cannot estimate a covariance alone.

    Args:
        groups: Statistics, each in a space of its own, all of one dimension.
    """
    freedoms = [group.samples - len(group.labels) for group in groups]
    scatter = np.sum([group.scatter for group in groups], axis=0)
    pooled, _ = shrunk_covariance(scatter, freedom=sum(freedoms))
    prior = groups[0].dim
    return [
        shrunk_covariance(group.scatter + prior * pooled, freedom=freedom + prior)[0]
        for group, freedom in zip(groups, freedoms, strict=True)
    ]


def carry_over(
    statistics: ClassStatistics,
    before: NDArray[np.floating[Any]],
    after: NDArray[np.floating[Any]],
) -> ClassStatistics:
    """Statistics of a space that is gone, as they would be in the space that took its place.

    The same samples in both spaces show how features moved. A linear map of the movement, fitted
    by ridge regression, is applied to means and scatter of classes whose samples are gone:
    semantic drift compensation (Yu et al., CVPR 2020), with a map in place of a local mean. Along
    directions in which the samples do not vary nothing turns; only their common shift applies.

    Args:
        statistics: Of the space before.
        before: Samples in it, [n, d]; any classes, known to the statistics or not.
        after: The same samples in the space after, [n, d].

    Example:
        >>> old = ClassStatistics.fit([[0.0], [2.0]], ["a", "b"])
        >>> carry_over(old, np.array([[5.0]]), np.array([[6.0]])).means.tolist()
        [[1.0], [3.0]]
    """
    old, new = before.astype(np.float64), after.astype(np.float64)
    origin, goal = old.mean(axis=0), new.mean(axis=0)
    spread, moved = old - origin, new - goal - (old - origin)
    gram = spread.T @ spread
    ridge = _DRIFT_RIDGE * np.trace(gram) / len(gram) + np.finfo(np.float64).tiny
    turn = np.eye(len(gram)) + np.linalg.solve(gram + ridge * np.eye(len(gram)), spread.T @ moved)
    scatter = turn.T @ statistics.scatter @ turn
    return ClassStatistics(
        statistics.labels,
        statistics.counts,
        (statistics.means - origin) @ turn + goal,
        (scatter + scatter.T) / 2,
    )


def align(groups: Sequence[ClassStatistics], seed: int) -> LinearHead:
    """Train one head over all classes of all groups on samples of their Gaussians.

    Classifier alignment of MOS (section 4.1) and SLCA (Zhang et al., ICCV 2023, section 3.3): a
    class that cannot be seen any more is replaced by draws from its stored Gaussian, each in the
    space of its own adapter. Softmax cross-entropy by stochastic gradient descent, started at the
    discriminant of each group; coordinates are whitened by the groups' mean covariance, in which
    one learning rate suits every direction.

    Args:
        groups: Statistics of each adapter's classes in its own space. The published method keeps
            a covariance a class; here the classes of a group share one, which is c times smaller.
        seed: Decides the draws; the same groups and seed give the same head.
    """
    covariances = shared_covariances(groups)
    means = np.concatenate([group.means for group in groups])
    centre = means.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.mean(covariances, axis=0))).T
    white = (means - centre) @ whiten
    spans = np.cumsum([0, *(len(group.labels) for group in groups)])
    # A draw is mean + standard normal @ colour; both in whitened coordinates.
    colours = [np.linalg.cholesky(covariance).T @ whiten for covariance in covariances]
    rows = np.empty_like(white)
    for start, end, colour in zip(spans, spans[1:], colours, strict=False):
        rows[start:end] = np.linalg.solve(colour.T @ colour, white[start:end].T).T
    bias = -0.5 * np.einsum("kd,kd->k", rows, white)
    classes, per = len(white), _SAMPLES_PER_CLASS
    target = np.repeat(np.arange(classes), per)
    rng = np.random.default_rng(seed)
    rows_speed, bias_speed = np.zeros_like(rows), np.zeros_like(bias)
    for step in range(_STEPS):
        draws = rng.standard_normal((classes * per, white.shape[1]))
        for start, end, colour in zip(spans, spans[1:], colours, strict=False):
            draws[start * per : end * per] = draws[start * per : end * per] @ colour
        draws += np.repeat(white, per, axis=0)
        error = softmax(draws @ rows.T + bias)
        error[np.arange(len(target)), target] -= 1.0
        # The sum of a class's errors, not the batch's mean: steps do not shrink as classes come.
        error /= per
        rate = _LEARNING_RATE * 0.5 * (1.0 + np.cos(np.pi * step / _STEPS))
        rows_speed = _MOMENTUM * rows_speed - rate * (error.T @ draws)
        bias_speed = _MOMENTUM * bias_speed - rate * error.sum(axis=0)
        rows, bias = rows + rows_speed, bias + bias_speed
    rows = rows @ whiten.T
    return LinearHead(rows.astype(np.float32), (bias - rows @ centre).astype(np.float32))
