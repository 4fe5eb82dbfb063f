"""Candidates are proposed, sized and ranked without training, on the shipped encoder."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.search.candidates import (
    Budget,
    Candidate,
    active,
    extended,
    family_sites,
    first_tensors,
    parameters,
    propose,
)
from edge_agent.search.proxies import Minibatch, activation_score, has_rectifiers, perturbed
from edge_agent.search.ranking import places_of, rank_candidates, spearman
from exporter.package import EncoderPackage, default_encoder_package
from exporter.programs import TrainingProgram, load_training_program
from exporter.sessions import EncoderSessions
from ood.statistics import l2_normalise

RANK = 4


@pytest.fixture(scope="module")
def package() -> EncoderPackage:
    return default_encoder_package()


@cache
def _program(family: str) -> TrainingProgram:
    torch.set_num_threads(1)
    return load_training_program(default_encoder_package(), family)


@pytest.fixture(scope="module")
def batch(package: EncoderPackage) -> Minibatch:
    """Activations of three kinds of noise."""
    rng = np.random.default_rng(0)
    targets = np.arange(6) % 3
    centres = rng.normal(size=(3, *package.hidden_shape))
    hidden = centres[targets] + 0.5 * rng.normal(size=(6, *package.hidden_shape))
    hidden = hidden.astype(np.float32)
    base = EncoderSessions(package).suffix(hidden)
    network = l2_normalise(base[:, : package.network_dim])
    prototypes = np.stack([network[targets == k].mean(axis=0) for k in range(3)])
    return Minibatch(hidden, targets.astype(np.int64), prototypes)


def test_the_first_proposal_is_the_plain_one(package: EncoderPackage) -> None:
    proposed = propose(package, ("bottleneck",), RANK, 8)
    sites = family_sites(package, "bottleneck")
    assert proposed[0] == Candidate("bottleneck", sites, RANK)
    assert len(proposed) == len(set(proposed)) <= 8
    assert propose(package, ("bottleneck",), RANK, 2) == proposed[:2]


def test_parameters_are_those_of_the_candidates_sites(package: EncoderPackage) -> None:
    every = family_sites(package, "bottleneck")
    whole = Candidate("bottleneck", every, RANK)
    one = Candidate("bottleneck", every[-1:], RANK)
    tensors = first_tensors(package, whole, seed=0)
    assert parameters(package, whole) == sum(value.size for value in tensors.values())
    assert parameters(package, one) * len(every) == parameters(package, whole)


def test_an_untrained_candidate_leaves_the_encoder_as_it_is(
    package: EncoderPackage, batch: Minibatch
) -> None:
    candidate = Candidate("bottleneck", family_sites(package, "bottleneck")[-1:], RANK)
    sessions = EncoderSessions(package)
    tensors = first_tensors(package, candidate, seed=0)
    base = sessions.suffix(batch.hidden)
    assert np.allclose(sessions.suffix(batch.hidden, tensors, "bottleneck"), base, atol=1e-5)


def test_an_extended_adapter_computes_what_it_did(
    package: EncoderPackage, batch: Minibatch
) -> None:
    small = Candidate("bottleneck", family_sites(package, "bottleneck"), RANK)
    trained = perturbed(small, first_tensors(package, small, seed=0), seed=1)
    large = Candidate("bottleneck", small.sites, 2 * RANK)
    grown = extended(package, large, trained, seed=2)
    sessions = EncoderSessions(package)
    before = sessions.suffix(batch.hidden, trained, "bottleneck")
    after = sessions.suffix(batch.hidden, grown, "bottleneck")
    assert np.allclose(before, after, atol=1e-4)
    assert not np.allclose(before, sessions.suffix(batch.hidden), atol=1e-4)


def test_ranking_is_repeatable_and_keeps_to_the_budget(
    package: EncoderPackage, batch: Minibatch
) -> None:
    proposed = propose(package, ("bottleneck",), RANK, 6)[1:]
    limit = parameters(package, proposed[2])
    first, second = (
        rank_candidates(
            package,
            _program,
            batch,
            proposed,
            budget=Budget(limit),
            seed=3,
            chosen=("activations", "gradient", "spectral"),
        )
        for _ in range(2)
    )
    assert first == second
    assert {r.candidate for r in first} == {c for c in proposed if parameters(package, c) <= limit}
    assert [r.rank for r in first] == sorted(r.rank for r in first)
    assert all(np.isfinite(list(r.scores.values())).all() for r in first)


def test_a_latency_budget_leaves_out_what_is_too_slow(
    package: EncoderPackage, batch: Minibatch
) -> None:
    proposed = propose(package, ("bottleneck",), RANK, 3)
    ranked = rank_candidates(
        package,
        _program,
        batch,
        proposed,
        budget=Budget(10**9, max_latency_ms=5.0),
        seed=0,
        latency_ms=lambda candidate: float(candidate.rank),
    )
    assert {r.candidate for r in ranked} == {c for c in proposed if c.rank <= 5}


def test_the_adapters_rectifiers_are_told_from_the_encoders(package: EncoderPackage) -> None:
    assert has_rectifiers(_program("bottleneck"))


def test_proxies_look_at_the_candidates_sites_only(package: EncoderPackage) -> None:
    candidate = Candidate("bottleneck", family_sites(package, "bottleneck")[-1:], RANK)
    plain = first_tensors(package, candidate, seed=0)
    moved = perturbed(candidate, plain, seed=0)
    for name, value in plain.items():
        assert np.array_equal(moved[name], value) != active(candidate, name), name


def test_units_that_tell_samples_apart_score_higher() -> None:
    rng = np.random.default_rng(0)
    apart = rng.random((8, 64)) > 0.5
    alike = np.repeat(rng.random((1, 64)) > 0.5, 8, axis=0)
    assert activation_score(apart) > activation_score(alike)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_rank_correlation_of_a_ranking_with_itself_is_one_and_with_its_reverse_minus_one(
    values: list[int],
) -> None:
    expected = 1.0 if len(set(values)) > 1 else 0.0
    assert spearman(values, values) == pytest.approx(expected)
    assert spearman(values, [-v for v in values]) == pytest.approx(-expected)
    assert places_of(values).sum() == pytest.approx(len(values) * (len(values) + 1) / 2)
