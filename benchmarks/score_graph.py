"""Is the default score faster in NumPy or as an ONNX graph? Part of `benchmarks.ood`.

Random features of random classes: the arithmetic is the same whatever the numbers are. One thread,
processor time of a call, the least of many; NumPy and ONNX Runtime take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from typing import Any, Final

import numpy as np
import onnxruntime

from exporter.score_graph import score_graph
from exporter.sessions import session_options
from ood.combined import CombinedScore
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

DIMENSIONS: Final = (192, 384, 576)
CLASSES: Final = (10, 50, 100)
BATCHES: Final = (1, 32)
_PART: Final = 192
_TURNS: Final = 60
_CALLS: Final = 10


def measured() -> list[dict[str, Any]]:
    """One row for each dimension, number of classes and batch."""
    return [
        _row(dim, classes, batch) for dim, classes, batch in product(DIMENSIONS, CLASSES, BATCHES)
    ]


def _row(dim: int, classes: int, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, dim))
    index = np.arange(20 * classes) % classes
    known = l2_normalise(centres[index] + rng.normal(size=(len(index), dim)))
    head = GaussianHead.from_statistics([ClassStatistics.fit(known, [f"{k:03d}" for k in index])])
    held_out = l2_normalise(centres[index] + rng.normal(size=(len(index), dim)))
    score = CombinedScore(head, held_out, parts=(_PART,) * (dim // _PART))
    session = onnxruntime.InferenceSession(
        score_graph(score).SerializeToString(),
        session_options(),
        providers=["CPUExecutionProvider"],
    )
    rows = held_out[:batch]
    times = {"numpy_us": np.inf, "graph_us": np.inf}
    for _ in range(_TURNS):
        times["numpy_us"] = min(times["numpy_us"], _microseconds(lambda: score.score(rows)))
        times["graph_us"] = min(
            times["graph_us"], _microseconds(lambda: session.run(None, {"features": rows}))
        )
    (found,) = session.run(None, {"features": held_out})
    gap = float(np.abs(found - score.score(held_out)).max())
    return {"dim": dim, "classes": classes, "batch": batch, **times, "largest_difference": gap}


def _microseconds(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    for _ in range(_CALLS):
        call()
    return 1e6 * (time.process_time() - begun) / _CALLS
