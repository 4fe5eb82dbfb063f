"""Continual-learning strategies by name; each is one small file on shared parts."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from edge_agent.errors import StrategyError
from edge_agent.strategies.base import Prediction, Predictor, Strategy, Task

# Name to the module and class; imported only when asked for.
_STRATEGIES: Final = {
    "driftkeel": ("edge_agent.strategies.driftkeel", "Driftkeel"),
    "ear": ("edge_agent.strategies.ear", "Ear"),
    "frozen": ("edge_agent.strategies.frozen", "Frozen"),
    "joint": ("edge_agent.strategies.joint", "Joint"),
    "lae": ("edge_agent.strategies.lae", "Lae"),
    "mos": ("edge_agent.strategies.mos", "Mos"),
    "ridge": ("edge_agent.strategies.ridge", "Ridge"),
}
NAMES: Final = tuple(sorted(_STRATEGIES))


def strategy(name: str) -> Strategy[Any]:
    """Find a strategy by name.

    Raises:
        StrategyError: There is no such strategy.
    """
    if name not in _STRATEGIES:
        raise StrategyError(f"no strategy {name!r}; there is {', '.join(NAMES)}")
    module, attribute = _STRATEGIES[name]
    found: Strategy[Any] = getattr(import_module(module), attribute)()
    return found


__all__ = ["NAMES", "Prediction", "Predictor", "Strategy", "Task", "strategy"]
