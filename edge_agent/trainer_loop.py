"""The optimisation itself: an adapter's tensors under an objective, on cached prefix activations.

The trainer's process and the strategies call it; with `edge_agent.objectives` it is what imports
torch. It knows batches, learning rates and checkpoints; the loss, the head and whatever happens
after a step are the objective's. A checkpoint after every epoch makes a killed training resume to
the same weights, bit for bit.
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
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from adapter_store.blobs import write_durably

Floats = NDArray[np.float32]
Program = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

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
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Progress:
    """One finished epoch."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    seconds: float


class Objective(Protocol):
    """What training is for; `edge_agent.objectives` holds the shared ones."""

    def parameters(self) -> dict[str, Tensor]:
        """Leaves trained beside the adapter, by name."""

    def buffers(self) -> dict[str, Tensor]:
        """Other state that steps change in place, by name; checkpointed."""

    def loss(self, features: Tensor, classes: Tensor) -> Tensor:
        """Of a batch: raw features float32 [b, d], class indices int64 [b]; a scalar."""

    def correct(self, features: Tensor, classes: Tensor) -> int:
        """Samples of a batch that are right, without gradients; for progress only."""

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Called after every step, without gradients."""

    def adapter_frozen(self, epoch: int) -> bool:
        """Whether the adapter stays as it is in an epoch (from 0)."""


def train(
    program: Program,
    hidden: NDArray[np.floating[Any]],
    targets: NDArray[np.int64],
    initial: Mapping[str, Floats],
    objective: Objective,
    *,
    recipe: Recipe,
    checkpoint: Path | None,
    report: Callable[[Progress], None],
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
        report: Called after every epoch.
        should_stop: Asked after every epoch, with its progress and the adapter as it is; a true
            answer ends the training.

    Returns:
        The trained tensors, by name.
    """
    torch.use_deterministic_algorithms(True)
    tensors = {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in sorted(initial.items())}
    optimiser = _optimiser(recipe, [*tensors.values(), *objective.parameters().values()])
    state = _State(tensors, objective, optimiser)
    done, spent = state.load(checkpoint)
    inputs, classes = torch.from_numpy(hidden), torch.from_numpy(targets)
    batches = math.ceil(len(targets) / recipe.batch_size)
    started = time.monotonic() - spent
    for epoch in range(done, recipe.epochs):
        if time.monotonic() - started > recipe.max_seconds:
            break
        # The order depends on seed and epoch alone, so a resumed epoch sees the same batches.
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(targets))
        frozen = objective.adapter_frozen(epoch)
        total, hits = 0.0, 0
        for index, rows in enumerate(np.array_split(order, batches)):
            part = torch.from_numpy(rows)
            position = (epoch * batches + index) / (recipe.epochs * batches)
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * position))
            with (
                torch.set_grad_enabled(not frozen),
                torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"),
            ):
                features = program(inputs[part].float(), tensors)
            features = features.float()
            optimiser.zero_grad()
            loss = objective.loss(features, classes[part])
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                hits += objective.correct(features, classes[part])
                # Without a gradient a tensor is left alone, by weight decay too.
                optimiser.step()
                objective.after_step(tensors)
            total += float(loss.detach()) * len(rows)
        spent = time.monotonic() - started
        state.save(checkpoint, epoch + 1, spent)
        progress = Progress(epoch + 1, recipe.epochs, total / len(order), hits / len(order), spent)
        report(progress)
        if should_stop is not None and should_stop(progress, tensors):
            break
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


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


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds, by name: weights, objective's buffers, optimiser's moments."""

    tensors: Mapping[str, Tensor]
    objective: Objective
    optimiser: torch.optim.Optimizer

    def save(self, path: Path | None, epoch: int, seconds: float) -> None:
        if path is None:
            return
        arrays: dict[str, NDArray[Any]] = {}
        for name, leaf in self._leaves().items():
            arrays[f"weight:{name}"] = leaf.detach().numpy()
            for key, value in self.optimiser.state.get(leaf, {}).items():
                arrays[f"optimiser:{key}:{name}"] = value.numpy()
        for name, buffer in self.objective.buffers().items():
            arrays[f"buffer:{name}"] = buffer.numpy()
        metadata = {"epoch": str(epoch), "seconds": repr(seconds)}
        # np.ascontiguousarray would turn a scalar, such as a step count, into a vector.
        arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
        write_durably(path, save(arrays, metadata=metadata))

    def load(self, path: Path | None) -> tuple[int, float]:
        """Restore everything; (finished epochs, seconds spent), zeros without a file."""
        if path is None or not path.exists():
            return 0, 0.0
        with safe_open(path, framework="np") as file, torch.no_grad():
            leaves = self._leaves()
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                kind, _, name = key.partition(":")
                value = torch.from_numpy(file.get_tensor(key).copy())
                if kind == "weight":
                    leaves[name].copy_(value)
                elif kind == "buffer":
                    self.objective.buffers()[name].copy_(value)
                else:
                    moment, _, name = name.partition(":")
                    self.optimiser.state[leaves[name]][moment] = value
            metadata = file.metadata()
        return int(metadata["epoch"]), float(metadata["seconds"])

    def _leaves(self) -> dict[str, Tensor]:
        beside = {f"objective.{name}": leaf for name, leaf in self.objective.parameters().items()}
        return {**self.tensors, **beside}
