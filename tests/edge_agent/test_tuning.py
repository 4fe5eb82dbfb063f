"""Choosing by measuring, with a clock that is made up."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.tuning import (
    ALONE,
    Decided,
    Measured,
    candidates,
    choose,
    measure,
    refusal,
    simplicity,
    thread_counts,
)
from exporter.providers import PROVIDERS, RuntimeSettings

ONE = RuntimeSettings()
TWO = RuntimeSettings(threads=2)
BASIC = RuntimeSettings(graph_optimisation="basic")
OPENVINO = RuntimeSettings(providers=("openvino",))


def found(settings: RuntimeSettings, *runs_ms: float, refused: str = "") -> Measured:
    return Measured(settings, {ALONE: runs_ms} if runs_ms else {}, refused)


class Machine:
    """Runs that take as long as they are said to, on its own clock; two take turns to disturb."""

    def __init__(self, takes_ms: Mapping[RuntimeSettings, float]) -> None:
        self.now = 0.0
        self.takes_ms = takes_ms
        self.opened: list[RuntimeSettings] = []

    def clock(self) -> float:
        return self.now

    def open(self, settings: RuntimeSettings) -> dict[int, Callable[[], object]]:
        self.opened.append(settings)

        def run(rows: int) -> Callable[[], object]:
            def once() -> None:
                self.now += self.takes_ms[settings] * rows / 1000.0

            return once

        return {rows: run(rows) for rows in (1, 8)}

    def measured(self, **how: float) -> list[Measured]:
        settings = list(self.takes_ms)
        return measure(self.open, settings, **{"seconds": 10.0, "clock": self.clock, **how})


def test_every_provider_thread_count_and_optimisation_is_a_candidate() -> None:
    found = candidates(("openvino", "cpu"), 2, {})
    assert found[0] == ONE
    assert {(c.threads, c.graph_optimisation) for c in found if c.providers == ("cpu",)} == {
        (threads, level) for threads in (1, 2) for level in ("basic", "extended", "all")
    }
    assert [c.threads for c in found if c.providers == ("openvino",)] == [1, 2]


@pytest.mark.parametrize(
    ("explicit", "left"),
    [
        ({"threads": 2}, {("cpu", 2), ("openvino", 2)}),
        ({"providers": ("tensorrt", "openvino")}, {("openvino", 1), ("openvino", 2)}),
        ({"providers": ("tensorrt",)}, {("cpu", 1), ("cpu", 2)}),
        ({"graph_optimisation": "basic", "threads": 1}, {("cpu", 1), ("openvino", 1)}),
    ],
)
def test_what_the_configuration_names_is_not_varied(explicit, left) -> None:
    found = candidates(("openvino", "cpu"), 2, explicit)
    assert {(c.providers[0], c.threads) for c in found} == left
    if "graph_optimisation" in explicit:
        assert {c.graph_optimisation for c in found} == {"basic"}


@given(st.integers(1, 300))
def test_thread_counts_are_few_reach_every_core_and_no_further(cores: int) -> None:
    counts = thread_counts(cores, "cpu")
    assert counts[0] == 1
    assert counts[-1] == cores
    assert len(counts) <= 13
    assert counts == sorted(set(counts))


def test_threads_are_not_varied_where_the_cpu_does_not_compute() -> None:
    assert thread_counts(16, "cuda") == [1]


def test_candidates_are_measured_in_turns_and_begin_with_another_one_in_each_round() -> None:
    machine = Machine({ONE: 5.0, TWO: 5.0, BASIC: 5.0})
    machine.measured(rounds=3)
    assert machine.opened == [ONE, TWO, BASIC, TWO, BASIC, ONE, BASIC, ONE, TWO]


def test_measuring_takes_about_as_long_as_it_may() -> None:
    machine = Machine({ONE: 5.0, TWO: 6.0, BASIC: 7.0})
    machine.measured(seconds=10.0)
    # Beside that come the runs that warm up.
    assert 10.0 <= machine.now <= 10.0 + 3 * 5 * 4 * 9 * 0.007


def test_every_run_is_kept_and_has_the_time_that_it_took() -> None:
    measured = Machine({ONE: 4.0, TWO: 5.0}).measured()
    assert [each.settings for each in measured] == [ONE, TWO]
    assert measured[0].median_ms() == pytest.approx(4.0)
    assert measured[1].median_ms(8) == pytest.approx(40.0)
    assert measured[1].fastest_ms() == pytest.approx(5.0)
    assert min(len(runs) for each in measured for runs in each.runs_ms.values()) > 10


def test_a_hopeless_candidate_is_not_measured_again() -> None:
    machine = Machine({ONE: 4.0, TWO: 40.0, BASIC: 5.0})
    measured = machine.measured(rounds=4)
    assert machine.opened.count(TWO) == 1
    assert machine.opened.count(BASIC) == machine.opened.count(ONE) == 4
    assert measured[1].median_ms() == pytest.approx(40.0)


def test_a_candidate_gets_some_runs_however_little_time_there_is() -> None:
    measured = Machine({ONE: 400.0, TWO: 500.0}).measured(seconds=0.001, rounds=2)
    assert all(len(each.runs_ms[1]) == 6 for each in measured)


def test_progress_ends_with_all_turns_done() -> None:
    told: list[tuple[int, int]] = []
    machine = Machine({ONE: 4.0, TWO: 40.0})
    machine.measured(rounds=3, tell=lambda done, of: told.append((done, of)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][0] == told[-1][1]


def test_what_is_clearly_faster_is_chosen() -> None:
    measured = [found(ONE, 10.0, 9.0), found(TWO, 6.0, 5.5)]
    assert choose(measured).settings == TWO
    assert choose(measured[::-1]).settings == TWO


def test_a_tie_goes_to_fewer_threads_then_to_the_cpu_then_to_the_usual_optimisation() -> None:
    both = RuntimeSettings(("openvino",), 2)
    ties = [found(each, 10.0 - i / 100) for i, each in enumerate([ONE, BASIC, OPENVINO, TWO, both])]
    for number in range(len(ties)):
        assert choose(ties[number:][::-1]).settings == ties[number].settings


@pytest.mark.parametrize("runs_ms", [(6.0, 6.0, 8.95), (9.8, 9.8, 5.0)])
def test_what_is_faster_by_its_median_or_its_fastest_run_alone_is_not_chosen(runs_ms) -> None:
    slow = found(ONE, 10.0, 10.0, 6.0)
    quick = found(TWO, *runs_ms)
    assert choose([slow, quick]).settings == ONE


def test_a_refused_candidate_is_never_chosen() -> None:
    measured = [found(ONE, 10.0), found(TWO, 1.0, refused="decisions"), found(BASIC)]
    assert choose(measured).settings == ONE
    assert choose(measured[1:]) is None


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=8))
def test_the_choice_is_at_most_a_tie_behind_the_simpler_ones(medians: list[float]) -> None:
    measured = [found(RuntimeSettings(threads=n), ms) for n, ms in enumerate(medians, 1)]
    best = choose(measured)
    simpler = [m for m in measured if simplicity(m.settings) < simplicity(best.settings)]
    assert all(best.median_ms() < each.median_ms() for each in simpler)


def decided(features: np.ndarray, *labels: str) -> Decided:
    return Decided(features, tuple((label, None) for label in labels))


def test_answers_that_are_the_same_are_not_refused() -> None:
    rows = np.ones((2, 3), np.float32)
    assert refusal(decided(rows, "a", "b"), decided(rows, "a", "b"), tolerance=1e-4) == ""


def test_another_decision_is_refused_and_counted() -> None:
    rows = np.ones((2, 3), np.float32)
    why = refusal(decided(rows, "a", "c"), decided(rows, "a", "b"), tolerance=1e-4)
    assert why == "1 of 2 decisions are others"


def test_another_adapter_is_another_decision() -> None:
    rows = np.ones((1, 3), np.float32)
    one, other = Decided(rows, (("a", None),)), Decided(rows, (("a", "0" * 64),))
    assert refusal(one, other, tolerance=1.0)


@pytest.mark.parametrize("found", [1.001, np.nan])
def test_features_that_differ_are_refused_whatever_was_decided(found: float) -> None:
    rows = np.ones((2, 3), np.float32)
    off = decided((rows * found).astype(np.float32), "a", "b")
    why = refusal(off, decided(rows, "a", "b"), tolerance=1e-4)
    assert "features differ" in why
    assert "0.0001" in why


def test_every_provider_can_be_compared_by_its_simplicity() -> None:
    keys = {simplicity(RuntimeSettings((name,))) for name in PROVIDERS}
    assert len(keys) == len(PROVIDERS)
    assert min(keys) == simplicity(ONE)
