"""Which way to make sessions is the fastest here? Candidates, measuring in turns, and the choice.

Pure but for the clock and the runs that it is given: `edge_agent.tune_device` brings both. A
machine has other work and its clock speed wanders, so that candidates are measured in turns,
several times, each between the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exporter.probing import difference
from exporter.providers import PROVIDERS, GraphOptimisation, ProviderName, RuntimeSettings, chosen

# What a device does all day: one sample at a time.
ALONE: Final = 1
# A candidate has to be faster than a simpler one by more than this.
TIE: Final = 0.03
ROUNDS: Final = 5

_LEVELS: Final[tuple[GraphOptimisation, ...]] = ("all", "extended", "basic")
_WARM_UPS: Final = 3
# A turn is of so many runs at least, however little time there is.
_FEWEST_RUNS: Final = 3
# What is so many times slower than the best will not catch up, whatever else the machine does.
_HOPELESS: Final = 3.0

Runs = Mapping[int, Callable[[], object]]
Decisions = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Measured:
    """One candidate and what was measured of it.

    Attributes:
        settings: The candidate.
        runs_ms: Milliseconds of every run, by batch size.
        refused: Why it may not be chosen; empty when it may.
    """

    settings: RuntimeSettings
    runs_ms: Mapping[int, Sequence[float]] = field(default_factory=dict)
    refused: str = ""

    def median_ms(self, batch: int = ALONE) -> float:
        """The median; infinite where nothing was measured."""
        runs = self.runs_ms.get(batch)
        return statistics.median(runs) if runs else float("inf")

    def fastest_ms(self, batch: int = ALONE) -> float:
        """The fastest run; infinite where nothing was measured."""
        return min(self.runs_ms.get(batch, ()), default=float("inf"))


@dataclass(frozen=True, eq=False)
class Decided:
    """What was answered to the same samples.

    Attributes:
        features: float32 [n, d], base features.
        decisions: Label and adapter of each sample.
    """

    features: NDArray[np.float32]
    decisions: Decisions


def candidates(
    available: Collection[ProviderName], cores: int, explicit: Mapping[str, Any]
) -> list[RuntimeSettings]:
    """What there is to choose from; the defaults first.

    Args:
        available: The providers of this machine.
        cores: Cores that may be used.
        explicit: Settings that the configuration names itself; they are not varied. Of a list of
            providers the first that is there is what will run.

    Example:
        >>> [c.threads for c in candidates(("cpu",), 6, {"graph_optimisation": "all"})]
        [1, 2, 3, 4, 6]
    """
    names = [name for name in PROVIDERS if name in available]
    if "providers" in explicit:
        names = [chosen(explicit["providers"], available)[0]]
    found = [
        RuntimeSettings((name,), threads, level)
        for name in names
        for threads in _given(explicit, "threads", thread_counts(cores, name))
        for level in _given(explicit, "graph_optimisation", _levels(name))
    ]
    return sorted(found, key=simplicity)


def thread_counts(cores: int, provider: ProviderName) -> list[int]:
    """Numbers of threads worth trying: each up to 4, then powers of two, and all cores."""
    if not PROVIDERS[provider].threaded:
        return [1]
    powers = {2**power for power in range(2, cores.bit_length())}
    return sorted(n for n in {1, 2, 3, 4, cores} | powers if n <= cores)


def simplicity(settings: RuntimeSettings) -> tuple[int, int, int]:
    """Sorts settings, the simplest first: few threads, the CPU, ONNX Runtime's own optimisation."""
    names = list(PROVIDERS)[::-1]
    return (
        settings.threads,
        names.index(settings.providers[0]),
        _LEVELS.index(settings.graph_optimisation),
    )


def measure(
    opened: Callable[[RuntimeSettings], Runs],
    settings: Sequence[RuntimeSettings],
    *,
    seconds: float,
    clock: Callable[[], float],
    rounds: int = ROUNDS,
    tell: Callable[[int, int], None] = lambda _, __: None,
) -> list[Measured]:
    """Measures candidates in turns: in every round each once, beginning with another one.

    Only one is open at a time, so that memory is that of one. After a round, those whose fastest
    run is three times as slow as the best candidate's are not measured further.

    Args:
        opened: Makes a candidate's sessions and gives what to run, by batch size.
        settings: The candidates.
        seconds: About how long to measure; opening comes on top.
        clock: Seconds from any moment.
        rounds: Turns of each candidate.
        tell: Told how many turns are done, and of how many.

    Returns:
        What was measured, in the order given.
    """
    runs: dict[RuntimeSettings, dict[int, list[float]]] = {each: {} for each in settings}
    left, done = list(settings), 0
    remaining = seconds
    for number in range(rounds):
        turn = number % len(left)
        turns = (rounds - number) * len(left)
        for each in [*left[turn:], *left[:turn]]:
            budget = remaining / turns
            began = clock()
            _turn(opened(each), runs[each], budget=budget, clock=clock)
            remaining = max(remaining - min(clock() - began, budget), 0.0)
            turns, done = turns - 1, done + 1
            tell(done, done + turns)
        best = min(Measured(each, runs[each]).fastest_ms() for each in left)
        left = [e for e in left if Measured(e, runs[e]).fastest_ms() <= _HOPELESS * best]
    return [Measured(each, {batch: tuple(ms) for batch, ms in runs[each].items()}) for each in runs]


def choose(measured: Sequence[Measured], *, tie: float = TIE) -> Measured | None:
    """The simplest candidate that no less simple one is clearly faster than, one sample at a time.

    Clearly is by its median and by its fastest run: other work on the machine spoils the one, luck
    the other.

    Args:
        measured: The candidates, refused ones among them.
        tie: What a candidate has to be faster by than a simpler one.

    Returns:
        The choice; None when nothing was measured that may be chosen.
    """
    able = [each for each in measured if not each.refused and each.runs_ms.get(ALONE)]
    if not able:
        return None
    able.sort(key=lambda each: simplicity(each.settings))
    best = able[0]
    for each in able[1:]:
        if each.median_ms() < best.median_ms() * (
            1 - tie
        ) and each.fastest_ms() < best.fastest_ms() * (1 - tie):
            best = each
    return best


def refusal(found: Decided, expected: Decided, *, tolerance: float) -> str:
    """Why a candidate may not answer in place of the defaults; empty when it may.

    Args:
        found: What it answers.
        expected: What the defaults answer to the same samples.
        tolerance: What features may differ by, relative to their size.
    """
    off = difference(found.features, expected.features)
    if not off <= tolerance:
        return f"features differ by {off:.2g} of their size, the tolerance is {tolerance:.2g}"
    changed = sum(a != b for a, b in zip(found.decisions, expected.decisions, strict=True))
    if changed:
        return f"{changed} of {len(expected.decisions)} decisions are others"
    return ""


def _turn(
    jobs: Runs, into: dict[int, list[float]], *, budget: float, clock: Callable[[], float]
) -> None:
    for batch, run in jobs.items():
        kept = into.setdefault(batch, [])
        for _ in range(_WARM_UPS):
            run()
        end, count = clock() + budget / len(jobs), 0
        while count < _FEWEST_RUNS or clock() < end:
            began = clock()
            run()
            kept.append((clock() - began) * 1000.0)
            count += 1


def _levels(provider: ProviderName) -> tuple[GraphOptimisation, ...]:
    # A provider that compiles a graph rewrites it anew, whatever was done to it before.
    return ("all",) if PROVIDERS[provider].compiles else _LEVELS


def _given(explicit: Mapping[str, Any], name: str, otherwise: Sequence[Any]) -> Sequence[Any]:
    return [explicit[name]] if name in explicit else otherwise
