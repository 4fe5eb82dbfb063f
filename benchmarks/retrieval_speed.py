"""How long the nearest of many signatures takes: our two stages, packed bits, and index libraries.

The signatures are made up from those of the variants: half are mixtures of three variants, half
near-duplicates of fifty of these, as samples of the same world differ. Called by `retrieval`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ood.nearest import Nearest
from ood.signature import Signature, similarities, unpacked

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

_FAMILIES: Final = ("lora", "film", "bottleneck", "prompt")
_SHORTLIST: Final = 256
_COARSE: Final = 128
_BITS: Final = 512
_WORLDS: Final = 50
_CHUNK: Final = 2000


def made_up(known: Sequence[Signature], count: int, rng: np.random.Generator) -> list[Signature]:
    """Signatures of a large catalogue."""
    means = np.stack([item.mean * np.float32(item.mean_step) for item in known])
    found: list[Signature] = []
    while len(found) < count // 2:
        chosen = rng.choice(len(known), 3, replace=False)
        mean = rng.dirichlet(np.ones(3)) @ means[chosen]
        found.append(_moved(known[chosen[0]], mean))
    worlds = found[:_WORLDS]
    while len(found) < count:
        found.append(resampled(worlds[len(found) % _WORLDS], 200, rng))
    return found


def resampled(item: Signature, samples: int, rng: np.random.Generator) -> Signature:
    """What fresh samples of a signature's distribution would give, to first order."""
    arrays = unpacked(np.frombuffer(item.to_bytes(), dtype=np.uint8)[None])
    factors = arrays.factors[0]
    within = max(float(arrays.variance[0]) - float(np.square(factors).sum()), 0.0)
    noise = rng.normal(size=len(factors)) @ factors
    noise += np.sqrt(within / factors.shape[1]) * rng.normal(size=factors.shape[1])
    return replace(_moved(item, arrays.means[0] + noise / np.sqrt(samples)), samples=samples)


def measure(
    known: Sequence[Signature],
    count: int,
    *,
    queries: int,
    exact: int,
    external: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time and recall of each way.

    Args:
        known: Signatures of real variants.
        count: How large the catalogue is.
        queries: How many searches are timed.
        exact: How many of them are also compared with everything.
        external: Where faiss and usearch are installed; they are left out if absent.
        say: Told how far it is.
    """
    rng = np.random.default_rng(0)
    items = made_up(known, count, rng)
    say(f"made {count} signatures")
    index: Nearest[int] = Nearest()
    started = time.perf_counter()
    for key, item in enumerate(items):
        index.put(key, item, family=_FAMILIES[key % 4], status="approved" if key % 8 else "retired")
    built = time.perf_counter() - started
    say(f"indexed in {built:.0f} s")
    wanted = [resampled(items[k], 64, rng) for k in rng.integers(0, count, queries)]
    packed = np.stack([np.frombuffer(item.to_bytes(), dtype=np.uint8) for item in items])
    truth = [_everything(item, packed) for item in wanted[:exact]]
    say(f"compared {exact} with everything")
    means = np.concatenate(
        [unpacked(packed[at : at + _CHUNK]).means for at in range(0, count, _CHUNK)]
    )
    ways: dict[str, Any] = {}
    plain = [_timed(lambda q=q: index.search(q, limit=3)) for q in wanted]  # type: ignore[misc]
    ways["two stages"] = {
        **_times([seconds for _, seconds in plain]),
        **_recall([[hit.key for hit in hits] for hits, _ in plain[:exact]], truth),
        "build_s": round(built, 2),
        "memory_mb": round(index.size_bytes / 2**20, 1),
    }
    filtered = [
        _timed(lambda q=q: index.search(q, limit=3, families=["lora"], statuses=["approved"]))  # type: ignore[misc]
        for q in wanted
    ]
    ways["two stages, one family, approved"] = _times([seconds for _, seconds in filtered])
    say(f"two stages: {ways['two stages']}")
    for name, make in _makers(external).items():
        started = time.perf_counter()
        shortlist, size = make(means)
        built = time.perf_counter() - started
        results = [_timed(lambda q=q, s=shortlist: _two(q, s, packed)) for q in wanted]  # type: ignore[misc]
        ways[name] = {
            **_times([seconds for _, seconds in results]),
            **_recall([found for found, _ in results[:exact]], truth),
            "build_s": round(built, 2),
            "memory_mb": round((size + packed.nbytes) / 2**20, 1),
        }
        say(f"{name}: {ways[name]}")
    return {"signatures": count, "queries": queries, "compared": exact, "ways": ways}


Shortlist = Callable[[Floats], Rows]


def _makers(external: Path | None) -> dict[str, Callable[[Floats], tuple[Shortlist, int]]]:
    makers: dict[str, Callable[[Floats], tuple[Shortlist, int]]] = {"packed bits": _bits}
    if external is not None:
        sys.path.append(str(external))
        makers["faiss HNSW"] = _faiss
        makers["usearch HNSW"] = _usearch
    return makers


def _bits(means: Floats) -> tuple[Shortlist, int]:
    """Signs of random projections of the centred means, compared by XOR and counting."""
    centre = means.mean(axis=0)
    planes = np.random.default_rng(1).normal(size=(means.shape[1], _BITS)).astype(np.float32)

    def signs(rows: Floats) -> NDArray[np.uint64]:
        return np.packbits((rows - centre) @ planes > 0, axis=1).view(np.uint64)

    table = np.ascontiguousarray(signs(means).T)

    def shortlist(query: Floats) -> Rows:
        apart = np.zeros(table.shape[1], np.uint16)
        for column, word in zip(table, signs(query[None])[0], strict=True):
            apart += np.bitwise_count(column ^ word)
        return np.argpartition(apart, _SHORTLIST)[:_SHORTLIST]

    return shortlist, table.nbytes


def _faiss(means: Floats) -> tuple[Shortlist, int]:
    import faiss  # type: ignore[import-not-found]  # noqa: PLC0415 - only here, if installed

    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(_COARSE, 32)
    index.hnsw.efSearch = _SHORTLIST
    index.add(np.ascontiguousarray(means[:, :_COARSE]))
    size = len(faiss.serialize_index(index))
    return lambda query: index.search(query[None, :_COARSE], _SHORTLIST)[1][0], size


def _usearch(means: Floats) -> tuple[Shortlist, int]:
    from usearch.index import Index  # type: ignore[import-not-found]  # noqa: PLC0415

    index = Index(ndim=_COARSE, metric="l2sq", dtype="f32", expansion_search=_SHORTLIST)
    coarse = np.ascontiguousarray(means[:, :_COARSE])
    index.add(np.arange(len(coarse)), coarse, threads=1)
    return lambda query: np.asarray(index.search(query[:_COARSE], _SHORTLIST).keys, np.int64), int(
        index.memory_usage
    )


def _two(query: Signature, shortlist: Shortlist, packed: NDArray[np.uint8]) -> list[int]:
    one = unpacked(np.frombuffer(query.to_bytes(), dtype=np.uint8)[None])
    rows = shortlist(one.means[0])
    rows = np.sort(rows[rows >= 0])
    alike = similarities(one, unpacked(packed[rows]))
    return [int(rows[k]) for k in np.argsort(-alike, kind="stable")[:3]]


def _everything(query: Signature, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
    one = unpacked(np.frombuffer(query.to_bytes(), dtype=np.uint8)[None])
    return np.concatenate(
        [
            similarities(one, unpacked(packed[at : at + _CHUNK]))
            for at in range(0, len(packed), _CHUNK)
        ]
    )


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _times(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def _recall(
    found: Sequence[Sequence[int]], truth: Sequence[NDArray[np.float64]]
) -> dict[str, float]:
    best = [keys[0] == int(alike.argmax()) for keys, alike in zip(found, truth, strict=True)]
    lost = [alike.max() - alike[keys[0]] for keys, alike in zip(found, truth, strict=True)]
    return {
        "best_found": round(float(np.mean(best)), 4),
        "similarity_lost_at_most": round(float(max(lost)), 4),
    }


def _moved(item: Signature, mean: NDArray[np.floating[Any]]) -> Signature:
    step = float(np.float32(np.abs(mean).max() / 32767))
    return replace(
        item, mean=np.rint(mean / step).clip(-32767, 32767).astype(np.int16), mean_step=step
    )
