"""An engine that trains for two epochs, which is enough for striped images."""

from typing import Any

import pytest

from edge_agent.strategies.engine import Engine


@pytest.fixture(scope="module")
def engine(package: Any) -> Engine:
    from edge_agent.trainer_loop import Recipe  # noqa: PLC0415

    recipe = Recipe(epochs=2, batch_size=16, learning_rate=3e-3, seed=0)
    return Engine(package, recipe=recipe, rank=4)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection of `ridge` is made for hundreds of classes, not for four."""
    monkeypatch.setattr("edge_agent.strategies.ridge._WIDTH", 256)
