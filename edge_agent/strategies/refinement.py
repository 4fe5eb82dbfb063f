"""Self-refined retrieval of MOS: whose adapter looks at a sample, as pure functions over arrays.

Two forms of one procedure: the published one is given every adapter's logits; the lazy one asks
only for those it visits, and decides the same. `edge_agent.strategies.mos` calls the lazy form;
the other is the yardstick it is proved against. Nothing here runs an encoder or changes its input.

MOS (Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning", AAAI
2025, section 4.2): the class guessed first names an adapter, the class that adapter's logits name
may belong to another, and so on until the adapter stays the same, at most `MAX_ROUNDS` times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]
Evaluate = Callable[[int, IntArray], Logits]

MAX_ROUNDS: Final = 4


@dataclass(frozen=True, eq=False)
class Refined:
    """Where refinement ended.

    Attributes:
        logits: [n, c], of the adapter each sample ended with; its argmax is the refined guess.
        visited: bool [n, tasks], the adapters that were asked about each sample.
    """

    logits: Logits
    visited: NDArray[np.bool_]


def refine_exhaustive(
    first_logits: Logits, all_logits: Logits, owner: IntArray, max_rounds: int = MAX_ROUNDS
) -> Refined:
    """Refine when every adapter has been evaluated on every sample, one sample at a time.

    Args:
        first_logits: [n, c], the first guess.
        all_logits: [tasks, n, c], what each task's adapter says.
        owner: int64 [c], the task whose adapter learned each class.
        max_rounds: Most adapters asked about one sample; at least one.
    """
    logits = np.empty_like(all_logits[0])
    visited = np.zeros((len(first_logits), len(all_logits)), dtype=np.bool_)
    for row, first in enumerate(first_logits):
        task = owner[first.argmax()]
        for _ in range(max_rounds):
            asked = task
            visited[row, asked] = True
            logits[row] = all_logits[asked, row]
            task = owner[logits[row].argmax()]
            if task == asked:
                break
    return Refined(logits, visited)


def refine_lazy(
    first_logits: Logits,
    evaluate: Evaluate,
    owner: IntArray,
    max_rounds: int = MAX_ROUNDS,
) -> Refined:
    """Refine by evaluating only the adapters that guesses name.

    Args:
        first_logits: [n, c], the first guess.
        evaluate: ``evaluate(task, rows)`` gives the logits [len(rows), c] of a task's adapter;
            called at most once for a task and row.
        owner: int64 [c], the task whose adapter learned each class.
        max_rounds: Most adapters asked about one sample; at least one.

    Returns:
        What `refine_exhaustive` returns for the same logits, bit for bit.
    """
    samples, tasks = len(first_logits), int(owner.max()) + 1
    visited = np.zeros((samples, tasks), dtype=np.bool_)
    known: dict[int, Logits] = {}
    logits = np.empty_like(first_logits)
    active = np.arange(samples)
    wanted = owner[first_logits.argmax(axis=1)]
    for _ in range(max_rounds):
        for task in np.unique(wanted[active]).tolist():
            asking = active[wanted[active] == task]
            # A sample may be sent back to an adapter that has seen it.
            fresh = asking[~visited[asking, task]]
            if fresh.size:
                found = evaluate(task, fresh)
                if task not in known:
                    known[task] = np.empty((samples, found.shape[1]), found.dtype)
                    logits = logits.astype(found.dtype, copy=False)
                known[task][fresh] = found
                visited[fresh, task] = True
            logits[asking] = known[task][asking]
        named = owner[logits[active].argmax(axis=1)]
        moved = named != wanted[active]
        active = active[moved]
        wanted[active] = named[moved]
        if not active.size:
            break
    return Refined(logits, visited)
