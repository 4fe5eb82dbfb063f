"""The two-stage search finds what comparing with all would find."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from ood.nearest import Nearest
from ood.signature import Signature, signature, similarity
from ood.statistics import l2_normalise

DIM = 32


def _features(world: int, draw: int, samples: int = 64, spread: float = 3.0) -> np.ndarray:
    """Four classes of a world; worlds of one hundred are near each other."""
    place = np.random.default_rng(world // 100).normal(size=(1, DIM))
    own = 0.3 * np.random.default_rng([1, world]).normal(size=(4, DIM))
    rng = np.random.default_rng([2, world, draw])
    rows = spread * place + own[rng.integers(0, 4, samples)]
    return l2_normalise(rows + 0.2 * rng.normal(size=(samples, DIM)))


@cache
def _known(clustered: bool) -> tuple[tuple[int, Signature], ...]:
    worlds = range(1200) if clustered else range(0, 120_000, 100)
    return tuple((world, signature(_features(world, 0), seed="e")) for world in worlds)


def _filled(items: tuple[tuple[int, Signature], ...]) -> Nearest[int]:
    found: Nearest[int] = Nearest()
    for world, item in items:
        found.put(world, item, family="lora" if world % 200 else "film", status="approved")
    return found


@pytest.mark.parametrize("clustered", [False, True])
def test_the_best_of_many_is_the_best_by_brute_force(clustered) -> None:
    items = _known(clustered)
    index = _filled(items)
    assert len(index) == len(items) > 1000
    for world, _ in items[::100]:
        wanted = signature(_features(world, 1), seed="e")
        every = sorted(((similarity(wanted, item), key) for key, item in items), reverse=True)
        hits = index.search(wanted, limit=3)
        assert hits[0].key == every[0][1] == world
        assert [hit.similarity for hit in hits] == pytest.approx([s for s, _ in every[:3]])


def test_filters_and_exclusions_are_kept_and_encoders_never_mix() -> None:
    index = _filled(_known(clustered=True))
    wanted = signature(_features(201, 1), seed="e")
    assert index.search(wanted, limit=1)[0].key == 201
    assert index.search(wanted, limit=1, exclude=[201])[0].key != 201
    films = index.search(wanted, limit=9, families=["film"])
    assert films
    assert all(hit.key % 200 == 0 for hit in films)
    assert index.search(wanted, limit=1, statuses=["retired", "none such"]) == []
    assert index.search(wanted, limit=9, min_similarity=1.1) == []
    assert index.search(signature(_features(201, 1), seed="other"), limit=1) == []
    assert index.search(signature(_features(201, 1)[:, :9], seed="e"), limit=1) == []


def test_what_is_changed_or_removed_is_found_so_and_an_empty_one_finds_nothing() -> None:
    index: Nearest[str] = Nearest()
    first, second = (signature(_features(w, 0), seed="e") for w in (100, 900))
    assert index.search(first, limit=1) == []
    index.put("a", first)
    index.put("b", second)
    index.put("a", second, status="retired")
    assert len(index) == 2
    assert [hit.key for hit in index.search(second, limit=2, statuses=["retired"])] == ["a"]
    index.remove("a")
    index.remove("never here")
    assert [hit.key for hit in index.search(second, limit=2)] == ["b"]
    index.remove("b")
    assert index.search(second, limit=2) == []
    assert index.size_bytes > 0
