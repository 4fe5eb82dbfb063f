"""Ranking candidates without training: proxies on one minibatch, combined by their ranks.

Strategies and the benchmark call `rank_candidates`; it trains nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_agent.search import proxies
from edge_agent.search.candidates import Budget, Candidate, first_tensors, parameters
from edge_agent.search.proxies import Minibatch
from exporter.package import EncoderPackage

if TYPE_CHECKING:
    from exporter.programs import TrainingProgram

Proxy = Literal["activations", "gradient", "spectral"]
PROXIES: Final[tuple[Proxy, ...]] = ("activations", "gradient")


@dataclass(frozen=True)
class Ranked:
    """A candidate and what the proxies say of it.

    Attributes:
        candidate: The adapter.
        parameters: How many numbers it consists of.
        scores: By proxy; higher is better.
        rank: Mean over the proxies of the place among the candidates, 1 the best.
    """

    candidate: Candidate
    parameters: int
    scores: Mapping[str, float]
    rank: float


def rank_candidates(
    package: EncoderPackage,
    programs: Callable[[str], TrainingProgram],
    batch: Minibatch,
    candidates: Sequence[Candidate],
    *,
    budget: Budget,
    seed: int,
    chosen: Sequence[Proxy] = PROXIES,
    latency_ms: Callable[[Candidate], float] | None = None,
) -> list[Ranked]:
    """Rank the candidates that fit a budget, the most promising first.

    Args:
        package: The encoder.
        programs: The suffix of a family, as torch differentiates it.
        batch: The samples to compare on.
        candidates: What to choose from.
        budget: What an adapter may cost; those above it are left out.
        seed: Seed of the tensors that proxies look at.
        chosen: The proxies to combine; each counts the same.
        latency_ms: How long a sample takes with a candidate; asked only when the budget limits it.

    Returns:
        The candidates within the budget; of two with equal ranks the smaller one first.
    """
    fitting = [
        item
        for item in candidates
        if parameters(package, item) <= budget.max_parameters
        and (
            latency_ms is None
            or budget.max_latency_ms == np.inf
            or latency_ms(item) <= budget.max_latency_ms
        )
    ]
    # Patterns of different kinds do not compare, so all candidates are read by the one all have.
    rectified = all(proxies.has_rectifiers(programs(name)) for name in {c.family for c in fitting})
    scores = [
        _scores(
            package,
            programs(item.family),
            batch,
            item,
            seed=seed,
            chosen=chosen,
            rectified=rectified,
        )
        for item in fitting
    ]
    places = np.zeros(len(fitting))
    for proxy in chosen:
        places += places_of([-found[proxy] for found in scores]) / len(chosen)
    ranked = [
        Ranked(item, parameters(package, item), found, float(place))
        for item, found, place in zip(fitting, scores, places, strict=True)
    ]
    return sorted(ranked, key=lambda r: (r.rank, r.parameters, r.candidate))


def _scores(
    package: EncoderPackage,
    program: TrainingProgram,
    batch: Minibatch,
    candidate: Candidate,
    *,
    seed: int,
    chosen: Sequence[Proxy],
    rectified: bool,
) -> dict[str, float]:
    plain = first_tensors(package, candidate, seed)
    tensors = proxies.perturbed(candidate, plain, seed)
    found: dict[str, float] = {}
    for proxy in chosen:
        match proxy:
            case "activations":
                patterns = (
                    proxies.rectifier_patterns(program, batch, tensors, candidate)
                    if rectified
                    else proxies.update_patterns(program, batch, tensors, plain)
                )
                found[proxy] = proxies.activation_score(patterns)
            case "gradient":
                found[proxy] = proxies.gradient_score(program, batch, tensors, candidate)
            case "spectral":
                found[proxy] = proxies.spectral_score(program, batch, tensors, candidate)
    return found


def places_of(values: ArrayLike) -> NDArray[np.float64]:
    """The place of each value in ascending order, from 1; equal values share their mean place.

    Example:
        >>> places_of([0.3, 0.1, 0.3]).tolist()
        [2.5, 1.0, 2.5]
    """
    row = np.asarray(values, dtype=np.float64)
    below = (row[:, None] > row[None, :]).sum(axis=1)
    equal = (row[:, None] == row[None, :]).sum(axis=1)
    result: NDArray[np.float64] = below + (equal + 1) / 2
    return result


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, −1..1; 0 when one side does not vary.

    Example:
        >>> round(spearman([1, 2, 3], [10, 30, 20]), 3)
        0.5
    """
    x, y = (places - places.mean() for places in (places_of(a), places_of(b)))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else 0.0
