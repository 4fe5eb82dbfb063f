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
