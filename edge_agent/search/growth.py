"""Reuse, extend or add: what a new task asks of the adapters there are.

A pure decision on signatures, after the progressive growth of EAR ("Efficient model adaptation for
continual learning at the edge", 2023). Strategies call it; it trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ood.signature import DEFAULT_MIN_SIMILARITY, Signature, similarity

# From here on the two are the same distribution rather than not: of 90 pairs of ten CIFAR-100 tasks
# of ten classes (ViT-Tiny features, 200 samples each), fewer than one in ten is as alike.
REUSE_AT = DEFAULT_MIN_SIMILARITY
# Such tasks are 0.007 alike and more; other sets than theirs 0.002 and less. More samples tell
# tasks apart more sharply, hence the margin.
EXTEND_AT = 0.001


@dataclass(frozen=True)
class Growth:
    """What to do about a task.

    Attributes:
        action: ``reuse`` the nearest adapter untrained; ``extend`` a copy of it; ``add`` a new one.
        nearest: Index of the most similar earlier task; None when there is none.
        similarity: How alike it is, 0..1.
    """

    action: Literal["reuse", "extend", "add"]
    nearest: int | None
    similarity: float


def decide(
    task: Signature,
    earlier: Sequence[Signature],
    *,
    reuse_at: float = REUSE_AT,
    extend_at: float = EXTEND_AT,
) -> Growth:
    """Decide what a task asks for.

    Args:
        task: The signature of the task's base features.
        earlier: Signatures of what the present adapters were trained on.
        reuse_at: Similarity from which the nearest adapter serves as it is.
        extend_at: Similarity from which training starts from the nearest adapter.

    Raises:
        OodError: The signatures are of different encoders.
    """
    alike = [similarity(task, known) for known in earlier]
    if not alike:
        return Growth("add", None, 0.0)
    # The first of equals, so that the decision does not depend on rounding in a sort.
    nearest = max(range(len(alike)), key=alike.__getitem__)
    found = alike[nearest]
    if found >= reuse_at:
        return Growth("reuse", nearest, found)
    return Growth("extend" if found >= extend_at else "add", nearest, found)
