"""Where a training is, and the file that lets a killed one resume to the same weights, bit for bit.

`edge_agent.trainer_loop` alone calls it. It knows names and arrays, not what they are trained for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from adapter_store.blobs import write_durably


class Stateful(Protocol):
    """What is trained, or changes, beside the adapter."""

    def parameters(self) -> dict[str, Tensor]:
        """Leaves trained beside the adapter, by name."""

    def buffers(self) -> dict[str, Tensor]:
        """Other state that steps change in place, by name; checkpointed."""


@dataclass
class Position:
    """Where training is: finished epochs, steps into the next, and what that one gave so far."""

    epoch: int = 0
    step: int = 0
    samples: int = 0
    hits: int = 0
    loss: float = 0.0
    validated: float = 0.0
    seconds: float = 0.0

    def took(self, loss: float, hits: int, samples: int) -> None:
        """One more step, on so many samples."""
        self.step += 1
        self.loss += loss
        self.hits += hits
        self.samples += samples


@dataclass
class Best:
    """The weights of the epoch that did best on the validation part."""

    epoch: int = 0
    loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    def consider(self, epoch: int, loss: float, leaves: Mapping[str, Tensor]) -> None:
        """Keep an epoch's weights if its loss is the least yet."""
        if loss < self.loss:
            self.epoch, self.loss = epoch, loss
            self.weights = {name: leaf.detach().clone() for name, leaf in leaves.items()}

    @torch.no_grad()
    def restore(self, leaves: Mapping[str, Tensor]) -> None:
        """Put the kept weights back; nothing when none were kept."""
        for name, weight in self.weights.items():
            leaves[name].copy_(weight)


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds, by name: weights (now and best), buffers, optimiser's moments.

    Attributes:
        tensors: The adapter's, being trained.
        objective: What is trained beside it.
        optimiser: Of both.
        best: The weights that did best so far.
    """

    tensors: Mapping[str, Tensor]
    objective: Stateful
    optimiser: torch.optim.Optimizer
    best: Best

    def save(self, path: Path | None, at: Position) -> None:
        """Write everything durably; nothing without a path."""
        if path is None:
            return
        arrays: dict[str, NDArray[Any]] = {}
        for name, leaf in self.leaves().items():
            arrays[f"weight:{name}"] = leaf.detach().numpy()
            for key, value in self.optimiser.state.get(leaf, {}).items():
                arrays[f"optimiser:{key}:{name}"] = value.numpy()
        for name, buffer in self.objective.buffers().items():
            arrays[f"buffer:{name}"] = buffer.numpy()
        for name, weight in self.best.weights.items():
            arrays[f"best:{name}"] = weight.numpy()
        numbers = {**asdict(at), "best_epoch": self.best.epoch, "best_loss": self.best.loss}
        # np.ascontiguousarray would turn a scalar, such as a step count, into a vector.
        arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
        metadata = {name: repr(number) for name, number in numbers.items()}
        write_durably(path, save(arrays, metadata=metadata))

    def load(self, path: Path | None, at: Position) -> None:
        """Restore everything, the place in the training included; nothing without a file."""
        if path is None or not path.exists():
            return
        with safe_open(path, framework="np") as file, torch.no_grad():
            leaves = self.leaves()
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                kind, _, name = key.partition(":")
                value = torch.from_numpy(file.get_tensor(key).copy())
                if kind == "weight":
                    leaves[name].copy_(value)
                elif kind == "buffer":
                    self.objective.buffers()[name].copy_(value)
                elif kind == "best":
                    self.best.weights[name] = value
                else:
                    moment, _, name = name.partition(":")
                    self.optimiser.state[leaves[name]][moment] = value
            metadata = file.metadata()
        for part in fields(at):
            setattr(at, part.name, type(getattr(at, part.name))(metadata[part.name]))
        self.best.epoch, self.best.loss = int(metadata["best_epoch"]), float(metadata["best_loss"])

    def leaves(self) -> dict[str, Tensor]:
        """Everything the optimiser changes, by name."""
        beside = {f"objective.{name}": leaf for name, leaf in self.objective.parameters().items()}
        return {**self.tensors, **beside}
