"""Self-refined retrieval: the lazy form decides what the published procedure decides."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.strategies.refinement import MAX_ROUNDS, refine_exhaustive, refine_lazy


@st.composite
def worlds(
    draw: st.DrawFn,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """First logits, every adapter's logits, and owners; coarse numbers, so that ties happen."""
    tasks, samples = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 3), min_size=tasks, max_size=tasks))
    owner = np.repeat(np.arange(tasks), sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owner = rng.permutation(owner)
    levels = draw(st.sampled_from([2, 5, 1000]))
    logits = rng.integers(0, levels, (tasks + 1, samples, len(owner))) / 7.0
    return logits[0], logits[1:], owner


@given(worlds(), st.integers(1, MAX_ROUNDS + 1))
def test_lazy_and_exhaustive_refinement_agree_bit_for_bit(
    world: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]], rounds: int
) -> None:
    first, logits, owner = world
    published = refine_exhaustive(first, logits, owner, rounds)
    lazy = refine_lazy(first, lambda task, rows: logits[task, rows], owner, rounds)
    assert published.logits.tobytes() == lazy.logits.tobytes()
    assert np.array_equal(published.visited, lazy.visited)
    assert published.visited.sum(axis=1).max() <= rounds


@given(worlds())
def test_no_adapter_is_evaluated_twice_for_a_sample_or_without_being_named(
    world: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]],
) -> None:
    first, logits, owner = world
    asked = np.zeros(logits.shape[:2], dtype=int)

    def evaluate(task: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        asked[task, rows] += 1
        return logits[task, rows]

    visited = refine_lazy(first, evaluate, owner).visited
    assert asked.max() <= 1
    assert np.array_equal(asked.T == 1, visited)


def test_an_adapter_that_claims_the_sample_ends_the_search() -> None:
    owner = np.array([0, 1, 2])
    first = np.array([[0.0, 1.0, 0.0]])
    logits = np.array([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]], [[0.0, 0.2, 0.9]]])
    refined = refine_exhaustive(first, logits, owner)
    assert refined.logits.tolist() == [[0.0, 0.2, 0.9]]
    assert refined.visited.tolist() == [[False, True, True]]


def test_two_adapters_that_name_each_other_are_left_after_the_last_round() -> None:
    owner = np.array([0, 1])
    first = np.array([[1.0, 0.0]])
    logits = np.array([[[0.0, 1.0]], [[2.0, 0.0]]])
    ends = [refine_exhaustive(first, logits, owner, rounds).logits for rounds in (1, 2, 3, 4)]
    assert [end.tolist() for end in ends] == [[[0.0, 1.0]], [[2.0, 0.0]]] * 2


@given(worlds())
def test_refinement_changes_no_logits(
    world: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]],
) -> None:
    first, logits, owner = world
    before = hashlib.sha256(first.tobytes() + logits.tobytes()).digest()
    refine_lazy(first, lambda task, rows: logits[task, rows], owner)
    refine_exhaustive(first, logits, owner)
    assert hashlib.sha256(first.tobytes() + logits.tobytes()).digest() == before
