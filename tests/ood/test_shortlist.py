"""A shortlist holds what is near, and a mixture of thousands answers as if it looked at all."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ood.mixture import Mixture
from ood.shortlist import Shortlist
from ood.statistics import ClassStatistics, GaussianHead

DIM = 24


@pytest.fixture(scope="module")
def means() -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(0, 4, (600, DIM))


@pytest.fixture(scope="module")
def mixture(means: NDArray[np.float64]) -> Mixture:
    rng = np.random.default_rng(1)
    labels = [f"class {k:03d}" for k in range(len(means)) for _ in range(6)]
    samples = np.repeat(means, 6, axis=0) + rng.normal(size=(len(labels), DIM))
    halves = (slice(0, 1800), slice(1800, None))
    return Mixture.from_statistics(
        [ClassStatistics.fit(samples[half], labels[half]) for half in halves]
    )


def head_of(means: NDArray[np.float64]) -> GaussianHead:
    return GaussianHead([(0, f"{k}") for k in range(len(means))], means, np.eye(DIM))


def test_the_nearest_mean_is_on_the_list(means) -> None:
    rows = means[::7] + np.random.default_rng(2).normal(size=means[::7].shape)
    near = Shortlist(head_of(means), candidates=16, directions=20).look(rows).near
    nearest = np.square(means - rows[:, None]).sum(axis=2).argmin(axis=1)
    assert (near == nearest[:, None]).any(axis=1).all()
    assert near.shape == (len(rows), 16)
    assert (np.diff(near, axis=1) > 0).all()


def test_fewer_means_than_candidates_are_all_on_the_list(means) -> None:
    shortlist = Shortlist(head_of(means[:3]), candidates=16)
    assert shortlist.look(means[5:7]).near.tolist() == [[0, 1, 2]] * 2


def test_a_mixture_of_many_has_a_shortlist_and_one_of_few_has_none(mixture) -> None:
    assert mixture.shortlist is not None
    few = Mixture.from_statistics([ClassStatistics.fit(np.eye(4), list("aabb"))])
    assert few.shortlist is None


def test_what_a_shortlist_leaves_out_has_no_probability(mixture, means) -> None:
    features = means[::40] + np.random.default_rng(3).normal(0, 2, (15, DIM))
    logs = mixture.log_likelihoods(features)
    exact = np.exp(logs - logs.max(axis=1, keepdims=True))
    exact = (exact / exact.sum(axis=1, keepdims=True))[:, mixture.component] * mixture.share
    evidence = mixture.evidence(features)
    assert np.allclose(evidence.posterior(), exact, atol=1e-9)
    distances = mixture.head.distances(features)
    assert np.array_equal(evidence.nearest(), distances.argmin(axis=1))


def test_components_off_the_list_are_as_exact_when_asked_for(mixture, means) -> None:
    features = means[:4] + 0.5
    rows, components = np.array([0, 3]), np.array([599, 0, 300])
    asked = mixture.evidence(features).of(rows, components)
    exact = mixture.log_likelihoods(features)[np.ix_(rows, components)]
    assert np.allclose(asked - asked[:, :1], exact - exact[:, :1], rtol=1e-4)


def test_a_sample_is_looked_at_alone_as_in_a_batch_to_the_last_bit(mixture, means) -> None:
    features = means[:9] + 0.3
    together = mixture.evidence(features).posterior()
    alone = np.vstack([mixture.evidence(row[None]).posterior() for row in features])
    assert np.array_equal(together, alone)
