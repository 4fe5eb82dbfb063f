"""Is a candidate better than what runs? The tests a bundle must pass before it is installed.

Pure functions over predictions and scores; the conductor gathers those on a worker thread. A
bundle from the catalogue passes a trial, one trained here a validation; both must also keep what
the device knew before the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.05
# Of samples from a bundle's own world, 0.95 lie within its scores; of a foreign one, hardly any.
MIN_FIT = 0.6
# A trial with fewer labelled samples than this goes by the fit alone.
MIN_TRIAL_LABELS = 8
# Share of the samples from before the shift that may be answered worse than now.
RETENTION_MARGIN = 0.1
# Fewer samples from before the shift than this say nothing about retention.
MIN_RETAINED = 20
# An unlabelled sample from before the shift counts as known when it was answered this surely.
SURE = 0.8


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may be installed, why, and what was measured."""

    accepted: bool
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """Predictions of what runs and of the candidate on the same samples.

    Attributes:
        truth: True (or, before the shift, surely believed) labels.
        current: What the running generation says.
        candidate: What the candidate generation says.
    """

    truth: Sequence[str]
    current: Sequence[str]
    candidate: Sequence[str]

    def __len__(self) -> int:
        return len(self.truth)

    def hits(self, of: Sequence[str]) -> NDArray[np.bool_]:
        """Which of these predictions are right."""
        return np.array([a == b for a, b in zip(of, self.truth, strict=True)], dtype=bool)

    def discordant(self) -> tuple[int, int]:
        """Samples only the candidate has right, and samples only what runs has right."""
        now, then = self.hits(self.current), self.hits(self.candidate)
        return int((then & ~now).sum()), int((now & ~then).sum())

    def accuracy(self) -> tuple[float, float]:
        """Accuracy of what runs and of the candidate; zeros without samples."""
        if not len(self):
            return 0.0, 0.0
        return float(self.hits(self.current).mean()), float(self.hits(self.candidate).mean())


def sign_test(gains: int, losses: int) -> float:
    """The exact one-sided p-value of McNemar's test: as many gains by chance?

    P(Binomial(gains + losses, 1/2) >= gains) (McNemar, Psychometrika 1947; exact form). A class
    that what runs cannot know counts like any other: there every right answer is a gain.

    Example:
        >>> sign_test(5, 0)
        0.03125
    """
    total = gains + losses
    ways = sum(comb(total, k) for k in range(gains, total + 1))
    return float(ways / 2**total)


def validate(held_out: Answers, before: Answers) -> Verdict:
    """Judge a bundle trained here.

    Args:
        held_out: Labelled samples since the onset that were not trained on.
        before: Samples from before the onset.

    Returns:
        Accepted when the candidate is significantly better on the first and not worse, beyond a
        margin, on the second.
    """
    gains, losses = held_out.discordant()
    p_value = sign_test(gains, losses)
    now, then = held_out.accuracy()
    kept = _retention(before)
    metrics = {
        "held_out": float(len(held_out)),
        "accuracy_before": now,
        "accuracy_after": then,
        "p_value": p_value,
        **kept.metrics,
    }
    shown = f"{now:.2f} -> {then:.2f} on {len(held_out)} held-out samples (p = {p_value:.3g})"
    if p_value > SIGNIFICANCE:
        return Verdict(False, f"no better than what runs: {shown}", metrics)
    if not kept.accepted:
        return Verdict(False, kept.reason, metrics)
    return Verdict(True, f"better than what runs: {shown}", metrics)


def earns_its_place(held_out: Answers) -> Verdict:
    """Judge an adapter against the statistics of the same samples without it.

    An adapter costs a pass for every sample it looks at and most of a bundle's bytes, so it must be
    better, not as good: McNemar's exact test, one-sided, at 5 %. At least five samples are needed.

    Args:
        held_out: Samples that neither was fitted on; ``current`` is what the statistics alone say,
            ``candidate`` what they say with the adapter.
    """
    gains, losses = held_out.discordant()
    p_value = sign_test(gains, losses)
    alone, adapted = held_out.accuracy()
    metrics = {
        "held_out_accuracy_base": alone,
        "held_out_accuracy_adapter": adapted,
        "adapter_gains": float(gains),
        "adapter_losses": float(losses),
        "adapter_p_value": p_value,
    }
    kept = p_value <= SIGNIFICANCE
    said = "earns its place" if kept else "is left out: statistics alone are as good"
    shown = f"{alone:.2f} -> {adapted:.2f} on {len(held_out)} held-out samples (p = {p_value:.3g})"
    return Verdict(kept, f"the adapter {said}: {shown}", metrics)


def try_out(fit: float, samples: int, labelled: Answers, before: Answers) -> Verdict:
    """Judge a bundle from the catalogue on this device's own samples.

    Args:
        fit: Share of the foreign-looking samples since the onset within the bundle's own scores.
        samples: How many those are.
        labelled: Labelled samples since the onset; may be few or none.
        before: Samples from before the onset.

    Returns:
        Accepted when it fits, does not answer the labelled samples worse, and forgets nothing.
    """
    kept = _retention(before)
    now, then = labelled.accuracy()
    metrics = {"fit": fit, "fit_samples": float(samples), **kept.metrics}
    if fit < MIN_FIT:
        reason = f"does not fit: {fit:.2f} of {samples} samples are like its own (need {MIN_FIT})"
        return Verdict(False, reason, metrics)
    shown = f"{fit:.2f} of {samples} samples are like its own"
    if len(labelled) >= MIN_TRIAL_LABELS:
        metrics |= {"accuracy_before": now, "accuracy_after": then}
        shown += f"; {now:.2f} -> {then:.2f} on {len(labelled)} labelled samples"
        gains, losses = labelled.discordant()
        if gains <= losses:
            return Verdict(False, f"no better than what runs: {shown}", metrics)
    if not kept.accepted:
        return Verdict(False, kept.reason, metrics)
    return Verdict(True, f"fits: {shown}", metrics)


def does_not_hurt(labelled: Answers, before: Answers) -> Verdict:
    """Judge a change that needs no labels by the few there are: it may not answer any set worse.

    Args:
        labelled: Labelled samples since the onset; may be none.
        before: Samples from before the onset.
    """
    gains, losses = labelled.discordant()
    if losses > gains:
        now, then = labelled.accuracy()
        reason = f"answers worse: {now:.2f} -> {then:.2f} on {len(labelled)} labelled samples"
        return Verdict(False, reason, {"accuracy_before": now, "accuracy_after": then})
    return _retention(before)


def _retention(before: Answers) -> Verdict:
    if len(before) < MIN_RETAINED:
        return Verdict(True, "too few samples from before the shift to compare")
    now, then = before.accuracy()
    metrics = {"retained_before": now, "retained_after": then}
    if now - then > RETENTION_MARGIN:
        reason = f"forgets: {now:.2f} -> {then:.2f} on {len(before)} samples from before the shift"
        return Verdict(False, reason, metrics)
    return Verdict(True, "keeps what was known", metrics)


def balanced_calibration(
    previous: NDArray[np.floating], new: NDArray[np.floating], *, cap: int = 512, least: int = 64
) -> NDArray[np.float16]:
    """Calibration features of the next generation: the new world's, and as many of the old.

    Args:
        previous: The running generation's calibration features [m, d], oldest first.
        new: Base features [k, d] of samples since the onset that were not trained on, oldest first.
        cap: Most features kept.
        least: Old features kept even when there are fewer new ones.

    Returns:
        float16 [<= cap, d]; which ones depends on the counts only.
    """
    newest = new[-(cap // 2) :]
    room = min(max(len(newest), least), cap - len(newest), len(previous))
    spread = np.linspace(0, len(previous) - 1, room).round().astype(np.int64)
    return np.concatenate([previous[spread], newest]).astype(np.float16)
