"""The parts every strategy works with: an encoder's features, and training an adapter on them.

A thin layer over the encoder's sessions and the trainer's loop; strategies call it, nothing else
does. Torch is imported only when something is trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.serving import base_passes, suffix_share
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
from ood.statistics import l2_normalise

if TYPE_CHECKING:
    from edge_agent.trainer_loop import Objective, Recipe
    from exporter.programs import TrainingProgram

Floats = NDArray[np.float32]
_BATCH: Final = 64  # bounds the memory of widened activations


class Engine:
    """An encoder and how to train on it.

    Args:
        package: The encoder.
        recipe: How adapters are trained unless a strategy says otherwise; None for strategies
            that train nothing.
        family: The adapters' family.
        rank: The adapters' rank.
        threads: Threads for one inference or training step.
    """

    def __init__(
        self,
        package: EncoderPackage,
        *,
        recipe: Recipe | None = None,
        family: str = "bottleneck",
        rank: int = 16,
        threads: int = 1,
    ) -> None:
        self.package = package
        self.recipe = recipe
        self.family = family
        self.rank = rank
        self.threads = threads
        self.sessions = EncoderSessions(package, threads=threads)
        self.suffix_share = suffix_share(package)
        self.base_passes = base_passes(package)

    def features(self, hidden: NDArray[np.floating[Any]]) -> Floats:
        """Base features, of all depths, of prefix activations [n, *hidden_shape] in any float type.

        Returns:
            l2-normalised features, float32 [n, feature_dim].
        """
        return np.concatenate([self.sessions.base_features(rows) for rows in _batches(hidden)])

    def adapted(
        self,
        hidden: NDArray[np.floating[Any]],
        tensors: Mapping[str, Floats] | None = None,
        family: str | None = None,
    ) -> Floats:
        """What the suffix gives, the network's own output first.

        Args:
            hidden: Prefix activations [n, *hidden_shape] in any float type.
            tensors: An adapter; None for the base encoder.
            family: The adapter's family; the engine's when absent.

        Returns:
            l2-normalised features, float32 [n, suffix_dim].
        """
        family = family or self.family
        parts = [self.sessions.suffix(rows, tensors, family) for rows in _batches(hidden)]
        return l2_normalise(np.concatenate(parts))

    def network(
        self,
        hidden: NDArray[np.floating[Any]],
        tensors: Mapping[str, Floats] | None = None,
        family: str | None = None,
    ) -> Floats:
        """The network's own output alone: float32 [n, network_dim], l2-normalised.

        Takes what `adapted` takes.
        """
        return l2_normalise(self.adapted(hidden, tensors, family)[:, : self.package.network_dim])

    def fresh(self, seed: int) -> dict[str, Floats]:
        """A new adapter's tensors; with them the suffix computes what the base does."""
        from exporter.families import adapter_family, initial_tensors  # noqa: PLC0415

        sites = self.package.manifest.sites
        return initial_tensors(adapter_family(self.family), sites, self.rank, seed)

    @cached_property
    def program(self) -> TrainingProgram:
        """The suffix as torch differentiates it."""
        from exporter.programs import load_training_program  # noqa: PLC0415

        return load_training_program(self.package, self.family)

    def train(
        self,
        hidden: NDArray[np.floating[Any]],
        targets: NDArray[np.int64],
        initial: Mapping[str, Floats],
        objective: Objective,
        recipe: Recipe | None = None,
    ) -> dict[str, Floats]:
        """Train an adapter from ``initial`` under an objective.

        Args:
            hidden: Prefix activations of the samples [n, *hidden_shape].
            targets: Class of each sample, int64 [n].
            initial: The tensors to start from.
            objective: The loss and what it does after every step.
            recipe: How to train; the engine's when absent.
        """
        import torch  # noqa: PLC0415

        from edge_agent.trainer_loop import train  # noqa: PLC0415

        chosen = recipe or self.recipe
        assert chosen is not None, "an engine that trains needs a recipe"
        torch.set_num_threads(self.threads)
        torch.manual_seed(chosen.seed)
        with tempfile.TemporaryDirectory() as folder:
            return train(
                self.program,
                hidden,
                targets,
                initial,
                objective,
                recipe=chosen,
                checkpoint=Path(folder) / "checkpoint",
                report=lambda _: None,
            )


def _batches(hidden: NDArray[np.floating[Any]]) -> Iterator[Floats]:
    for at in range(0, len(hidden), _BATCH):
        yield np.ascontiguousarray(hidden[at : at + _BATCH], dtype=np.float32)
