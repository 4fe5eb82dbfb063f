"""What a task asks for follows from how alike it is to earlier ones."""

import numpy as np
import pytest

from edge_agent.search.growth import EXTEND_AT, REUSE_AT, decide
from ood.errors import OodError
from ood.signature import Signature, signature
from ood.statistics import l2_normalise

DIM = 24


def _task(seed: int, *, shift: float = 0.0, n: int = 200, source: str = "digest") -> Signature:
    """Samples of four classes; `shift` mixes in a direction no other class has."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(4, DIM))
    away = np.random.default_rng(8).normal(size=DIM) * shift
    rows = centres[rng.integers(0, 4, n)] + away + 0.3 * rng.normal(size=(n, DIM))
    return signature(l2_normalise(rows), seed=source)


def test_the_first_task_adds() -> None:
    growth = decide(_task(0), [])
    assert growth.action == "add"
    assert growth.nearest is None


def test_more_of_the_same_reuses_the_nearest() -> None:
    growth = decide(_task(0), [_task(1, shift=3.0), _task(2)])
    assert (growth.action, growth.nearest) == ("reuse", 1)


def test_another_world_adds() -> None:
    assert decide(_task(0), [_task(1, shift=3.0)]).action == "add"


def test_what_lies_between_extends() -> None:
    growth = decide(_task(0), [_task(1, shift=0.06)])
    assert EXTEND_AT <= growth.similarity < REUSE_AT
    assert growth.action == "extend"


def test_thresholds_decide_at_equality() -> None:
    task, known = _task(0), [_task(1, shift=0.2)]
    found = decide(task, known).similarity
    assert decide(task, known, reuse_at=found).action == "reuse"
    assert decide(task, known, reuse_at=1.1, extend_at=found).action == "extend"
    assert decide(task, known, reuse_at=1.1, extend_at=1.1).action == "add"


def test_signatures_of_different_encoders_are_refused() -> None:
    with pytest.raises(OodError, match="different encoders"):
        decide(_task(0), [_task(0, source="other")])
