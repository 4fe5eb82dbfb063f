"""Lazy routing decides as refining over the outputs of every adapter does, at its own cost only."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.router import Components, route

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    first: Array
    components: Components
    evidence: list[Array]
    max_rounds: int


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Bundles with overlapping labels, sharp or flat evidence, some of them without an adapter."""
    group_labels = draw(
        st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=5)
    )
    free = [draw(st.booleans()) for _ in group_labels]
    names = [(g, label) for g, labels in enumerate(group_labels) for label in sorted(labels)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, sharpness = draw(st.integers(1, 8)), draw(st.sampled_from([0.0, 1.0, 5.0, 200.0]))

    def posterior(columns: int) -> Array:
        weights = np.exp(sharpness * (rng.random((n, columns)) - 1.0))
        normalised: Array = weights / weights.sum(axis=1, keepdims=True)
        return normalised

    return Problem(
        posterior(len(names)),
        Components.of(names, free),
        [posterior(len(labels)) for labels in group_labels],
        draw(st.integers(1, 4)),
    )


def exhaustive(problem: Problem, row: int) -> tuple[int, int, list[int]]:
    """The procedure as one would write it for one sample with every adapter's output at hand."""
    components = problem.components
    scores = {k: float(v) for k, v in enumerate(problem.first[row])}
    seen: list[int] = []

    def decide() -> tuple[int, int]:
        sums = [0.0] * len(components.labels)
        for k, score in scores.items():
            sums[components.label[k]] += score
        label = sums.index(max(sums))
        own = [k for k in scores if components.label[k] == label]
        best = max(own, key=lambda k: (scores[k], -k))
        return label, int(components.owner[best])

    while True:
        label, group = decide()
        if group in seen or components.free[group] or len(seen) >= problem.max_rounds:
            return label, group, seen
        columns = [k for k in scores if components.owner[k] == group]
        mass = float(np.sum(problem.first[row][columns][None, :], axis=1)[0])
        for position, k in enumerate(columns):
            scores[k] = mass * float(problem.evidence[group][row, position])
        seen.append(group)


def lazily(problem: Problem) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, list[set[int]]]:
    asked: list[set[int]] = [set() for _ in problem.first]

    def evidence(group: int, rows: NDArray[np.int64]) -> Array:
        for row in rows:
            assert group not in asked[row], "an adapter was run twice for one sample"
            asked[row].add(group)
        chosen: Array = problem.evidence[group][rows]
        return chosen

    routed = route(problem.first, problem.components, evidence, max_rounds=problem.max_rounds)
    for row, groups in enumerate(asked):
        assert not any(problem.components.free[g] for g in groups)
        assert routed.adapter_passes[row] == len(groups)
    return routed.label, routed.group, routed.probabilities, asked


@settings(max_examples=300, deadline=None)
@given(problems())
def test_lazy_decisions_are_those_of_the_exhaustive_procedure(problem: Problem) -> None:
    label, group, _, asked = lazily(problem)
    for row in range(len(problem.first)):
        expected_label, expected_group, adapters = exhaustive(problem, row)
        assert (label[row], group[row]) == (expected_label, expected_group)
        assert asked[row] == set(adapters)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_sample_is_decided_alone_as_in_a_batch(problem: Problem) -> None:
    label, group, probabilities, _ = lazily(problem)
    for row in range(len(problem.first)):
        alone = Problem(
            problem.first[row : row + 1],
            problem.components,
            [e[row : row + 1] for e in problem.evidence],
            problem.max_rounds,
        )
        one_label, one_group, one_probabilities, _ = lazily(alone)
        assert (one_label[0], one_group[0]) == (label[row], group[row])
        assert np.array_equal(one_probabilities[0], probabilities[row])


@settings(max_examples=100, deadline=None)
@given(problems())
def test_probabilities_sum_to_one_and_the_decision_is_the_largest(problem: Problem) -> None:
    label, _, probabilities, _ = lazily(problem)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(len(label)))
    assert np.array_equal(probabilities.argmax(axis=1), label)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_no_sample_runs_more_adapters_than_allowed(problem: Problem) -> None:
    _, _, _, asked = lazily(problem)
    assert max(map(len, asked)) <= problem.max_rounds


def test_a_refined_answer_may_name_another_bundle() -> None:
    components = Components.of([(0, "a"), (0, "b"), (1, "c")], [False, False])
    evidence = [np.array([[0.5, 0.5]]), np.array([[1.0]])]
    problem = Problem(np.array([[0.45, 0.05, 0.5]]), components, evidence, 4)
    label, group, _, asked = lazily(problem)
    assert (components.labels[label[0]], group[0], asked[0]) == ("c", 1, {1})
    sharper = Problem(np.array([[0.5, 0.1, 0.4]]), components, evidence, 4)
    label, group, _, asked = lazily(sharper)
    assert (components.labels[label[0]], group[0], asked[0]) == ("c", 1, {0, 1})


@settings(max_examples=50, deadline=None)
@given(problems(), st.data())
def test_of_a_settled_sample_the_first_guess_stands(problem: Problem, data: st.DataObject) -> None:
    rows = len(problem.first)
    settled = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool)

    def routed(max_rounds: int, settled: NDArray[np.bool_] | None = None) -> Array:
        way = route(
            problem.first,
            problem.components,
            lambda group, rows: problem.evidence[group][rows],
            max_rounds=max_rounds,
            settled=settled,
        )
        return np.column_stack([way.probabilities, way.label, way.group, way.adapter_passes])

    expected = np.where(settled[:, None], routed(0), routed(problem.max_rounds))
    np.testing.assert_array_equal(routed(problem.max_rounds, settled), expected)


def test_cost_does_not_grow_with_the_number_of_adapters() -> None:
    names = [(g, f"class-{g}") for g in range(200)]
    first = np.full((3, 200), 0.001)
    first[:, 7] = 0.801
    problem = Problem(first, Components.of(names, [False] * 200), [np.ones((3, 1))] * 200, 4)
    _, group, _, asked = lazily(problem)
    assert group.tolist() == [7, 7, 7]
    assert asked == [{7}] * 3
