"""The optimisation itself: an adapter's tensors and a local head, on cached prefix activations.

The only module of the daemon's package that imports torch; the trainer's process calls it and
nothing else does. The recipe follows MOS (Sun et al., AAAI 2025): cross-entropy with a local head,
and after every step the adapter is merged with the mean of the earlier ones,
W <- (1 - m) W + m * mean(earlier). A checkpoint after every epoch makes a killed training resume
to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.nn import functional

from adapter_store.blobs import write_durably

Floats = NDArray[np.float32]
Program = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

# Cosine logits need a scale for the softmax to be decisive; 16 suits tens of classes.
_LOGIT_SCALE = 16.0
_WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the samples.
        batch_size: Samples in a step.
        learning_rate: Peak learning rate; it falls to zero along a half cosine.
        momentum: Share of the earlier adapters' mean mixed in after every step.
        seed: Seed of the sample order.
        max_seconds: Budget over all starts; the epoch in progress is finished.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    seed: int
    max_seconds: float


@dataclass(frozen=True)
class Progress:
    """One finished epoch."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    seconds: float


def train(
    program: Program,
    hidden: Floats,
    targets: NDArray[np.int64],
    initial: Mapping[str, Floats],
    head: Floats,
    *,
    earlier: Mapping[str, Floats],
    recipe: Recipe,
    checkpoint: Path,
    report: Callable[[Progress], None],
) -> dict[str, Floats]:
    """Train an adapter.

    Args:
        program: ``(hidden, tensors by name) -> features [n, d]``, differentiable in the tensors.
        hidden: Prefix activations of the training samples, float32 [n, ...].
        targets: Class of each sample, int64 [n].
        initial: The adapter to start from, by tensor name.
        head: Rows to start the local head from (class means of base features), float32 [c, d].
            Their mean is taken off both sides: it is what all classes share.
        earlier: Mean of the earlier adapters; empty when there is none.
        recipe: How to train.
        checkpoint: Where progress is kept; an existing one is carried on from.
        report: Called after every epoch.

    Returns:
        The trained tensors, by name.
    """
    torch.use_deterministic_algorithms(True)
    tensors = {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in sorted(initial.items())}
    centre = torch.from_numpy(head.mean(axis=0))
    weights = (torch.from_numpy(head.copy()) - centre).requires_grad_()
    means = {name: torch.from_numpy(mean.copy()) for name, mean in earlier.items()}
    optimiser = torch.optim.AdamW(
        [*tensors.values(), weights],
        lr=recipe.learning_rate,
        weight_decay=_WEIGHT_DECAY,
        foreach=False,
    )
    state = _State({**tensors, "head": weights}, optimiser)
    done, spent = state.load(checkpoint)
    inputs, classes = torch.from_numpy(hidden), torch.from_numpy(targets)
    batches = math.ceil(len(targets) / recipe.batch_size)
    started = time.monotonic() - spent
    for epoch in range(done, recipe.epochs):
        if time.monotonic() - started > recipe.max_seconds:
            break
        # The order depends on seed and epoch alone, so a resumed epoch sees the same batches.
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(targets))
        total, hits = 0.0, 0
        for index, rows in enumerate(np.array_split(order, batches)):
            part = torch.from_numpy(rows)
            position = (epoch * batches + index) / (recipe.epochs * batches)
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * position))
            features = functional.normalize(program(inputs[part], tensors), dim=1) - centre
            features = functional.normalize(features, dim=1)
            logits = _LOGIT_SCALE * features @ functional.normalize(weights, dim=1).T
            loss = functional.cross_entropy(logits, classes[part])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                for name, mean in means.items():
                    tensors[name].mul_(1.0 - recipe.momentum).add_(mean, alpha=recipe.momentum)
            total += float(loss.detach()) * len(rows)
            hits += int((logits.argmax(1) == classes[part]).sum())
        spent = time.monotonic() - started
        state.save(checkpoint, epoch + 1, spent)
        report(Progress(epoch + 1, recipe.epochs, total / len(order), hits / len(order), spent))
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds: weights and the optimiser's two moments, by name."""

    weights: Mapping[str, Tensor]
    optimiser: torch.optim.AdamW

    def save(self, path: Path, epoch: int, seconds: float) -> None:
        arrays: dict[str, Floats] = {}
        for name, tensor in self.weights.items():
            moments = self.optimiser.state[tensor]
            arrays[f"weight:{name}"] = tensor.detach().numpy()
            arrays[f"first:{name}"] = moments["exp_avg"].numpy()
            arrays[f"second:{name}"] = moments["exp_avg_sq"].numpy()
            steps = float(moments["step"])
        metadata = {"epoch": str(epoch), "seconds": repr(seconds), "steps": repr(steps)}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_durably(path, save(arrays, metadata=metadata))

    def load(self, path: Path) -> tuple[int, float]:
        """Restore weights and moments; (finished epochs, seconds spent), zeros without a file."""
        if not path.exists():
            return 0, 0.0
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            for name, tensor in self.weights.items():
                with torch.no_grad():
                    tensor.copy_(torch.from_numpy(file.get_tensor(f"weight:{name}")))
                self.optimiser.state[tensor] = {
                    "step": torch.tensor(float(metadata["steps"])),
                    "exp_avg": torch.from_numpy(file.get_tensor(f"first:{name}").copy()),
                    "exp_avg_sq": torch.from_numpy(file.get_tensor(f"second:{name}").copy()),
                }
        return int(metadata["epoch"]), float(metadata["seconds"])
