"""What a continual-learning strategy is: it learns one task after another, and predicts.

The benchmark and the daemon hold strategies by these protocols. A strategy is never told, when it
predicts, which task a sample belongs to, and its memory holds no raw sample of any task. Nothing
here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_agent.strategies.engine import Engine

Floats = NDArray[np.float32]
Memory = TypeVar("Memory")


@dataclass(frozen=True, eq=False)
class Task:
    """The samples of one session.

    Attributes:
        number: Its place in the stream, from 0.
        hidden: Prefix activations, float16 or float32 [n, *hidden_shape].
        labels: The label name of each sample, n strings; some may be known from earlier tasks.
        seed: Seed of everything random while this task is learned.
    """

    number: int
    hidden: NDArray[np.floating[Any]]
    labels: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a strategy says of a batch.

    Attributes:
        probabilities: float64 [n, labels], rows sum to one; the largest decides.
        passes: float64 [n], encoder passes each sample took; 1 is the bare encoder.
    """

    probabilities: NDArray[np.float64]
    passes: NDArray[np.float64]


class Predictor(Protocol):
    """A strategy's memory, ready to answer; NumPy and ONNX Runtime only.

    Attributes:
        labels: Every label learned so far, sorted; the columns of the probabilities.
    """

    labels: tuple[str, ...]

    def predict(self, hidden: Floats) -> Prediction:
        """Answer samples by their prefix activations, float32 [n, *hidden_shape]."""


class Strategy(Protocol[Memory]):
    """A way to learn without forgetting.

    Attributes:
        name: The word for it on command lines and in result files.
    """

    name: str

    def learn(self, engine: Engine, memory: Memory | None, task: Task) -> Memory:
        """Learn a task on top of what is known; the memory given stays as it was."""

    def predictor(self, engine: Engine, memory: Memory) -> Predictor:
        """Make the memory ready to answer."""

    def stored_bytes(self, memory: Memory) -> int:
        """Bytes of all that is kept of the tasks so far, as it would be written."""
