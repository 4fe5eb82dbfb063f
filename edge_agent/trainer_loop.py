"""The optimisation itself: an adapter's tensors under an objective, on cached prefix activations.

The trainer's process and the strategies call it; with `edge_agent.objectives` it is what imports
torch. It knows batches, learning rates and checkpoints; the loss, the head and whatever happens
after a step are the objective's. Checkpoints, after every epoch and every few seconds between, make
a training that is killed at any step resume to the same weights, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.trainer_checkpoint import Best, Position, Stateful, TrainingState
from exporter.programs import TrainingProgram

Floats = NDArray[np.float32]
Program = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class Rows(Protocol):
    """Samples' activations, in memory or not: an array, or what reads like one."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.floating[Any]]:
        """Some of the rows, float16 or float32 [b, ...]."""


_SGD_MOMENTUM: Final = 0.9


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the samples.
        batch_size: Samples in a step.
        learning_rate: Peak learning rate; it falls to zero along a half cosine.
        seed: Seed of the sample order.
        max_seconds: Budget over all starts; the epoch in progress is finished.
        optimiser: ``adamw``, or ``sgd`` with momentum 0.9.
        weight_decay: Of the optimiser; on the adapter and what is trained beside it.
        patience: Epochs without a better loss on the validation part before training stops; 0 runs
            them all. The best epoch's weights are kept in either case.
        micro_batch: Samples run at once, to bound memory; the gradients of a step are summed over
            its parts. None runs the batch whole.
        nested: Train every step with some of the first ranks only, so that the adapter can be
            truncated afterwards; ``program`` must be a :class:`TrainingProgram`.
        precision: Of the encoder's pass; ``bfloat16`` trains about 2.5 times faster where the
            processor knows it. Weights, head and loss are float32 either way.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    max_seconds: float = math.inf
    optimiser: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    patience: int = 0
    micro_batch: int | None = None
    nested: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        epoch: Finished passes.
        epochs: Passes of the whole training.
        loss: Mean over the pass, or over what is done of it.
        accuracy: Share of samples right on the validation part after the last pass; without one,
            among those trained on in this pass.
        seconds: Spent over all starts.
        step: Steps taken.
        steps: Steps of the whole training.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    seconds: float
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class Validation:
    """Samples that training does not learn from but stops by.

    Attributes:
        hidden: Prefix activations [n, ...].
        targets: Class of each sample, int64 [n].
    """

    hidden: Rows
    targets: NDArray[np.int64]


class Objective(Stateful, Protocol):
    """What training is for; `edge_agent.objectives` holds the shared ones."""

    def loss(self, features: Tensor, classes: Tensor) -> Tensor:
        """Mean over a batch: raw features float32 [b, d], class indices int64 [b]; a scalar."""

    def correct(self, features: Tensor, classes: Tensor) -> int:
        """Samples of a batch that are right, without gradients; for progress only."""

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Called after every step, without gradients."""

    def adapter_frozen(self, epoch: int) -> bool:
        """Whether the adapter stays as it is in an epoch (from 0)."""


def train(
    program: Program,
    hidden: Rows,
    targets: NDArray[np.int64],
    initial: Mapping[str, Floats],
    objective: Objective,
    *,
    recipe: Recipe,
    checkpoint: Path | None,
    report: Callable[[Progress], None],
    validation: Validation | None = None,
    checkpoint_every_s: float = 10.0,
    should_stop: Callable[[Progress, Mapping[str, Tensor]], bool] | None = None,
) -> dict[str, Floats]:
    """Train an adapter.

    Args:
        program: ``(hidden, tensors by name) -> features [n, d]``, differentiable in the tensors.
        hidden: Prefix activations of the training samples, float16 or float32 [n, ...].
        targets: Class of each sample, int64 [n].
        initial: The adapter to start from, by tensor name.
        objective: The loss, what is trained beside the adapter and what follows a step; it holds
            its state afterwards.
        recipe: How to train.
        checkpoint: Where progress is kept, and an existing one is carried on from; None keeps none.
        report: Called after every epoch and every checkpoint.
        validation: Looked at after every epoch; the weights of the epoch with the least loss on it
            are returned. None returns the last epoch's.
        checkpoint_every_s: Seconds between two checkpoints within an epoch.
        should_stop: Asked after every epoch, with its progress and the adapter as it is; a true
            answer ends the training.

    Returns:
        The trained tensors, by name.
    """
    torch.use_deterministic_algorithms(True)
    tensors = {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in sorted(initial.items())}
    optimiser = _optimiser(recipe, [*tensors.values(), *objective.parameters().values()])
    at, best = Position(), Best()
    state = TrainingState(tensors, objective, optimiser, best)
    state.load(checkpoint, at)
    batches = math.ceil(len(targets) / recipe.batch_size)
    steps = recipe.epochs * batches
    saved = time.monotonic()
    started = saved - at.seconds

    def progress() -> Progress:
        accuracy = at.hits / max(at.samples, 1) if validation is None else at.validated
        done = at.epoch * batches + at.step
        mean = at.loss / max(at.samples, 1)
        return Progress(at.epoch, recipe.epochs, mean, accuracy, at.seconds, done, steps)

    while at.epoch < recipe.epochs:
        exhausted = 0 < recipe.patience <= at.epoch - best.epoch and best.weights
        if at.step == 0 and (exhausted or time.monotonic() - started > recipe.max_seconds):
            break
        # The order depends on seed and epoch alone, so a resumed epoch sees the same batches.
        order = np.random.default_rng((recipe.seed, at.epoch)).permutation(len(targets))
        frozen = objective.adapter_frozen(at.epoch)
        for rows in np.array_split(order, batches)[at.step :]:
            _set_rate(optimiser, recipe, (at.epoch * batches + at.step) / steps)
            learned = np.zeros(2)
            optimiser.zero_grad()
            for part in _micro(rows, recipe):
                classes = torch.from_numpy(targets[part])
                with torch.set_grad_enabled(not frozen):
                    features = _features(
                        program, hidden, part, _step_tensors(program, tensors, recipe, at), recipe
                    )
                learned += _backward(objective, features, classes, len(part) / len(rows))
            with torch.no_grad():
                # Without a gradient a tensor is left alone, by weight decay too.
                optimiser.step()
                objective.after_step(tensors)
            at.took(float(learned[0]), int(learned[1]), len(rows))
            if at.step < batches and time.monotonic() - saved >= checkpoint_every_s:
                at.seconds = time.monotonic() - started
                state.save(checkpoint, at)
                report(progress())
                saved = time.monotonic()
        at.epoch, at.step = at.epoch + 1, 0
        if validation is not None:
            held, at.validated = _validated(program, validation, tensors, objective, recipe)
            best.consider(at.epoch, held, state.leaves())
        at.seconds = time.monotonic() - started
        told = progress()
        at.samples, at.hits, at.loss = 0, 0, 0.0
        state.save(checkpoint, at)
        saved = time.monotonic()
        report(told)
        if should_stop is not None and should_stop(told, tensors):
            break
    best.restore(state.leaves())
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def saved_bytes(program: Program, hidden: Rows, initial: Mapping[str, Floats]) -> int:
    """Bytes that one sample's pass keeps for its gradient; the same for every sample.

    Args:
        program: As for :func:`train`.
        hidden: Prefix activations; the first is used.
        initial: Any adapter's tensors.
    """
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    tensors = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in initial.items()}
    first = torch.from_numpy(np.asarray(hidden[np.array([0])], dtype=np.float32))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        program(first, tensors)
    return kept


def _step_tensors(
    program: Program, tensors: Mapping[str, Tensor], recipe: Recipe, at: Position
) -> Mapping[str, Tensor]:
    if not recipe.nested:
        return tensors
    assert isinstance(program, TrainingProgram), "nested training needs a training program"
    # Like the order, the ranks depend on the place in the training alone.
    return program.nested(tensors, np.random.default_rng((recipe.seed, at.epoch, at.step)))


def _features(
    program: Program,
    hidden: Rows,
    rows: NDArray[np.int64],
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
) -> Tensor:
    inputs = torch.from_numpy(np.asarray(hidden[rows], dtype=np.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        features = program(inputs, tensors)
    return features.float()


def _set_rate(optimiser: torch.optim.Optimizer, recipe: Recipe, position: float) -> None:
    """The learning rate at a place in the training, 0..1: a half cosine from its peak to zero."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * position))


def _backward(
    objective: Objective, features: Tensor, classes: Tensor, share: float
) -> tuple[float, int]:
    """Add a part's gradient to its batch's; the part's summed loss and its hits."""
    loss = objective.loss(features, classes)
    # The mean over a batch is the weighted mean over its parts.
    (loss * share).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(loss.detach()) * len(classes), objective.correct(features, classes)


def _micro(rows: NDArray[np.int64], recipe: Recipe) -> list[NDArray[np.int64]]:
    size = recipe.micro_batch or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def _validated(
    program: Program,
    validation: Validation,
    tensors: Mapping[str, Tensor],
    objective: Objective,
    recipe: Recipe,
) -> tuple[float, float]:
    """Mean loss and accuracy on the validation part."""
    every = np.arange(len(validation.targets))
    size = min(recipe.micro_batch or recipe.batch_size, recipe.batch_size)
    loss, hits = 0.0, 0
    for start in range(0, len(every), size):
        part = every[start : start + size]
        classes = torch.from_numpy(validation.targets[part])
        features = _features(program, validation.hidden, part, tensors, recipe)
        loss += float(objective.loss(features, classes)) * len(part)
        hits += objective.correct(features, classes)
    return loss / len(every), hits / len(every)


def _optimiser(recipe: Recipe, leaves: list[Tensor]) -> torch.optim.Optimizer:
    # One tensor at a time: the fused and batched forms round differently from build to build.
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(
            leaves,
            lr=recipe.learning_rate,
            momentum=_SGD_MOMENTUM,
            weight_decay=recipe.weight_decay,
            foreach=False,
        )
    return torch.optim.AdamW(
        leaves, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=False
    )
