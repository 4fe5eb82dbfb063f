"""One Gaussian for one look of a class, several for several, in whatever order they came."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood.errors import OodError
from ood.mixture import Mixture
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise


def looks(rng: np.random.Generator, centre: np.ndarray, count: int) -> np.ndarray:
    return l2_normalise(centre + 0.1 * rng.normal(size=(count, len(centre))))


@pytest.fixture
def centres() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(6, 24))


def test_two_samples_of_one_class_become_one_component(centres) -> None:
    rng = np.random.default_rng(0)
    rows = [looks(rng, centres[k % 2], 40) for k in range(4)]
    first = ClassStatistics.fit(np.vstack(rows[:2]), ["a"] * 40 + ["b"] * 40)
    second = ClassStatistics.fit(np.vstack(rows[2:]), ["a"] * 40 + ["b"] * 40)
    mixture = Mixture.from_statistics([first, second])
    union = GaussianHead.from_statistics([first.merge(second)])
    assert mixture.component.tolist() == [0, 1, 0, 1]
    assert mixture.share.tolist() == [0.5] * 4
    probe = looks(rng, centres[0], 10)
    assert np.allclose(mixture.head.distances(probe), union.distances(probe), rtol=1e-9)


def test_two_domains_of_one_class_stay_two_components(centres) -> None:
    rng = np.random.default_rng(0)
    first = ClassStatistics.fit(looks(rng, centres[0], 40), ["a"] * 40)
    second = ClassStatistics.fit(looks(rng, centres[1], 40), ["a"] * 40)
    mixture = Mixture.from_statistics([first, second])
    assert mixture.component.tolist() == [0, 1]
    assert mixture.labels == ("a",)
    posterior = mixture.evidence(looks(rng, centres[1], 5)).posterior()
    assert (posterior[:, 1] > 0.99).all()


@pytest.mark.parametrize("samples", [3, 10, 50])
def test_random_parts_of_one_class_merge_though_samples_are_few(samples: int) -> None:
    rng = np.random.default_rng(samples)
    centre = rng.normal(size=200)
    scales = np.exp(-np.arange(200) / 40)
    groups = [
        ClassStatistics.fit(
            l2_normalise(centre + scales * rng.normal(size=(4 * samples, 200))),
            [name for name in "abcd" for _ in range(samples)],
        )
        for _ in range(3)
    ]
    kept = len(set(Mixture.from_statistics(groups).component.tolist()))
    assert kept <= 5


def test_a_label_is_as_likely_with_many_components_as_with_one(centres) -> None:
    rng = np.random.default_rng(0)
    groups = [ClassStatistics.fit(looks(rng, centres[k], 30), ["a"] * 30) for k in range(3)]
    groups.append(ClassStatistics.fit(looks(rng, centres[3], 5), ["b"] * 5))
    mixture = Mixture.from_statistics(groups)
    prior = np.bincount(mixture.label, weights=np.exp(mixture.log_prior))
    assert prior == pytest.approx([1.0, 1.0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_posteriors_are_distributions_over_every_entry(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        labels = [str(k) for k in rng.integers(0, 3, rng.integers(1, 20))]
        groups.append(ClassStatistics.fit(l2_normalise(rng.normal(size=(len(labels), 5))), labels))
    mixture = Mixture.from_statistics(groups)
    assert len(mixture.entries) == sum(len(group.labels) for group in groups)
    shares = np.bincount(mixture.component, weights=mixture.share)
    assert shares == pytest.approx(np.ones(len(shares)))
    for entry, component in zip(mixture.entries, mixture.component, strict=True):
        assert mixture.labels[mixture.label[component]] == entry[1]
    posterior = mixture.evidence(l2_normalise(rng.normal(size=(4, 5)))).posterior()
    assert posterior.sum(axis=1) == pytest.approx(np.ones(4))


def test_the_same_groups_give_the_same_numbers_bit_for_bit(centres) -> None:
    rng = np.random.default_rng(0)
    groups = [ClassStatistics.fit(looks(rng, centres[k % 3], 20), ["a"] * 20) for k in range(5)]
    probe = looks(rng, centres[0], 6)
    once, again = (Mixture.from_statistics(groups).log_likelihoods(probe) for _ in range(2))
    assert np.array_equal(once, again)


def test_nothing_and_mixed_dimensions_are_refused() -> None:
    with pytest.raises(OodError, match="at least one group"):
        Mixture.from_statistics([])
    one, two = (ClassStatistics.fit(np.eye(d), ["a"] * d) for d in (2, 3))
    with pytest.raises(OodError, match="different dimensions"):
        Mixture.from_statistics([one, two])
