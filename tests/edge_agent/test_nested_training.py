from __future__ import annotations

import numpy as np
import pytest

from edge_agent.objectives import CosineHead
from edge_agent.trainer_loop import Recipe, train
from exporter.families import adapter_family, initial_tensors, truncate
from exporter.package import default_encoder_package
from exporter.programs import load_training_program

torch = pytest.importorskip("torch")


def test_an_adapter_trained_nested_can_be_truncated_to_any_rank() -> None:
    """Real training on the shipped encoder: a lower rank loses little, none breaks."""
    torch.set_num_threads(1)
    package = default_encoder_package()
    family, rank = adapter_family("bottleneck"), 4
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(2), 12)
    means = 0.05 * rng.normal(size=(2, *package.hidden_shape))
    hidden = (means[targets] + rng.normal(size=(24, *package.hidden_shape))).astype(np.float32)
    program = load_training_program(package, family.name)
    fresh = initial_tensors(family, package.manifest.sites, rank, seed=0)

    def features(tensors: dict[str, np.ndarray]) -> torch.Tensor:
        with torch.no_grad():
            given = {name: torch.from_numpy(value) for name, value in tensors.items()}
            return program(torch.from_numpy(hidden), given)

    bare = features(fresh).numpy()
    head = np.stack([bare[targets == k].mean(axis=0) for k in range(2)]).astype(np.float32)
    objective = CosineHead(head)
    classes = torch.from_numpy(targets)

    def loss(tensors: dict[str, np.ndarray]) -> float:
        with torch.no_grad():
            return float(objective.loss(features(tensors), classes))

    trained = train(
        program,
        hidden,
        targets,
        fresh,
        objective,
        recipe=Recipe(epochs=8, batch_size=12, learning_rate=0.02, seed=0, nested=True),
        checkpoint=None,
        report=lambda _: None,
    )
    losses = [loss(truncate(family, trained, r)) for r in range(1, rank + 1)]
    assert all(np.isfinite(losses))
    assert losses[0] < loss(fresh)
    for wider, narrower in zip(losses[1:], losses, strict=False):
        assert wider <= narrower * 1.05
    assert all(trained[name].shape == fresh[name].shape for name in fresh)
