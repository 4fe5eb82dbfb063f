"""Statistics added up one group at a time are those of all groups together."""

import numpy as np
import pytest

from ood.errors import OodError
from ood.mixture import Mixture
from ood.pooled import Pooled
from ood.statistics import ClassStatistics


def groups() -> list[ClassStatistics]:
    rng = np.random.default_rng(0)
    return [
        ClassStatistics.fit(rng.normal(k, 1, (20, 3)), [f"{k}-a"] * 10 + [f"{k}-b"] * 10)
        for k in range(3)
    ]


def test_a_mixture_of_what_was_added_up_is_the_mixture_of_the_groups() -> None:
    pooled = Pooled()
    for group in groups():
        pooled.add(group)
    probe = np.random.default_rng(1).normal(size=(5, 3))
    ours = Mixture.of(pooled).log_likelihoods(probe)
    assert np.array_equal(ours, Mixture.from_statistics(groups()).log_likelihoods(probe))
    assert pooled.samples == 60
    assert pooled.freedom == 54


def test_groups_of_two_dimensions_are_refused() -> None:
    pooled = Pooled(groups())
    with pytest.raises(OodError, match=r"\[2, 3\]"):
        pooled.add(ClassStatistics.fit([[0.0, 1.0]], ["a"]))


def test_nothing_added_has_no_means() -> None:
    with pytest.raises(OodError, match="at least one group"):
        _ = Pooled().means


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"counts": None}, "have the arrays"),
        ({"entries": np.frombuffer(b"{]", np.uint8)}, "unreadable"),
        ({"entries": np.frombuffer(b"[1]", np.uint8)}, "unreadable"),
        ({"counts": np.ones(5)}, "different sizes"),
        ({"scatter": np.eye(4)}, "different sizes"),
        ({"scatter": np.full((3, 3), np.nan)}, "not finite"),
        ({"means": np.full((6, 3), np.inf)}, "NaN or infinity"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(changes, problem) -> None:
    arrays = Pooled(groups()).to_arrays() | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(OodError, match=problem):
        Pooled.from_arrays(arrays)


def test_nothing_pooled_is_nothing_when_it_is_taken_back() -> None:
    again = Pooled.from_arrays(Pooled().to_arrays())
    again.add(groups()[0])
    assert (again.samples, again.entries) == (20, [(0, "0-a"), (0, "0-b")])
