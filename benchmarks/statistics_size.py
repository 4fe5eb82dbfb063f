"""How small may class statistics travel before the head they give is worse?

The samples are split into groups by their classes, and by domains where the file has any; every
group's statistics are written and read back in each form, and the head over all groups is compared
with the head of the exact ones. Also with few samples. The last test is only as sure as a few
thousand samples make it: half a point is one or two of its standard errors.

    python -m benchmarks.statistics_size --features FILE.npz [FILE.npz …] [--out FILE]

A file holds `c_train` and `c_test` (float, [n, blocks + 1, d]: the class token after each block,
the last one normalised as the encoder gives it), `m_train` and `m_test` (alike, of the mean patch
token), the integer classes `y_train` and `y_test`, and perhaps integer domains `domain_train`.
Features are the last class token alone, and put together with the mean patch tokens of two depths,
each part at unit length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ood.compact import from_bytes, to_bytes
from ood.mixture import Mixture
from ood.statistics import ClassStatistics, l2_normalise

Floats = NDArray[np.float64]
# What a form makes of statistics: what is read back, and the bytes it took.
Form = Callable[[ClassStatistics], tuple[ClassStatistics, int]]

SEED: Final = 1993
DEPTHS: Final = (7, 4)
BUDGETS: Final = (8, 14, 43, 48)
LOW_RANKS: Final = (4, 8, 16)


def full_factor(bits: int) -> Form:
    """The triangular factor of the whole scatter, so many bits a number; float16 means."""
    largest = 2 ** (bits - 1) - 1

    def form(statistics: ClassStatistics) -> tuple[ClassStatistics, int]:
        values, vectors = np.linalg.eigh(statistics.scatter)
        factor = np.linalg.qr(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T).R
        root = _rounded(factor, largest)
        dim = statistics.dim
        size = dim * (dim + 1) // 2 * bits // 8 + 4 * dim
        return _with(statistics, root.T @ root, size)

    return form


def low_rank(per_class: int) -> Form:
    """The strongest directions in int8, some for each class, and the diagonal that they leave."""

    def form(statistics: ClassStatistics) -> tuple[ClassStatistics, int]:
        rank = min(per_class * len(statistics.labels), statistics.dim)
        values, vectors = np.linalg.eigh(statistics.scatter)
        kept = np.sqrt(np.maximum(values[::-1][:rank], 0))[:, None] * vectors[:, ::-1][:, :rank].T
        factor = _rounded(kept, 127)
        left = np.diagonal(statistics.scatter) - np.square(factor).sum(axis=0)
        scatter = factor.T @ factor + np.diag(np.maximum(left, 0))
        return _with(statistics, scatter, rank * (statistics.dim + 4) + 2 * statistics.dim)

    return form


def diagonal(statistics: ClassStatistics) -> tuple[ClassStatistics, int]:
    """Variances only."""
    scatter = np.diag(np.diagonal(statistics.scatter))
    return _with(statistics, scatter, 2 * statistics.dim)


def isotropic(statistics: ClassStatistics) -> tuple[ClassStatistics, int]:
    """The trace only: every feature of every group varies alike."""
    trace = float(np.trace(statistics.scatter))
    return _with(statistics, np.eye(statistics.dim) * trace / statistics.dim, 8)


def compact(budget: int | None) -> Form:
    """What bundles use, with so many bytes a dimension for factors."""

    def form(statistics: ClassStatistics) -> tuple[ClassStatistics, int]:
        data = to_bytes(statistics, budget=budget)
        return from_bytes(statistics.labels, data), len(data)

    return form


def forms() -> dict[str, Form]:
    """Every form by name."""
    return {
        "full int16 factor": full_factor(16),
        "full int8 factor": full_factor(8),
        **{f"low rank {k} a class, int8, and diagonal": low_rank(k) for k in LOW_RANKS},
        "diagonal": diagonal,
        "isotropic": isotropic,
        **{f"compact, {budget} B a dimension": compact(budget) for budget in BUDGETS},
        "compact, default": compact(None),
    }


def features_of(file: Any, part: str, *, depths: tuple[int, ...]) -> Floats:
    """Features [n, d·(1 + depths)] at unit length."""
    chosen = [file[f"c_{part}"][:, -1], *(file[f"m_{part}"][:, depth] for depth in depths)]
    return l2_normalise(np.hstack([l2_normalise(tokens) for tokens in chosen])).astype(np.float64)


def measure(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the report for one file."""
    with np.load(path) as file:
        truth = {part: file[f"y_{part}"] for part in ("train", "test")}
        splits = {"classes": by_class}
        if "domain_train" in file:
            splits["domains"] = partial(by_domain, domains=file["domain_train"])
        for depths in ((), DEPTHS):
            train, test = (features_of(file, part, depths=depths) for part in ("train", "test"))
            for (split, grouped), shots in product(splits.items(), (None, 10)):
                groups = grouped(train, truth["train"], shots)
                about = {
                    "features": path.stem,
                    "dim": train.shape[1],
                    "split": split,
                    "groups": len(groups),
                    "classes": len({label for group in groups for label in group.labels}),
                    "shots": shots,
                }
                for row in compared(groups, test, truth["test"]):
                    yield about | row


def compared(
    groups: list[ClassStatistics], test: Floats, truth: NDArray[np.integer[Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each form: its size, and what the head loses by it."""
    exact = accuracy(groups, test, truth)
    for name, form in forms().items():
        begun = time.perf_counter()
        read = [form(group) for group in groups]
        seconds = (time.perf_counter() - begun) / len(groups)
        found = accuracy([group for group, _ in read], test, truth)
        size = sum(size for _, size in read) / sum(len(group.labels) for group in groups)
        yield {
            "form": name,
            "bytes_per_class": round(size),
            "accuracy_exact": round(100 * exact, 2),
            "points_lost": round(100 * (exact - found), 2),
            "seconds_per_group": round(seconds, 3),
        }


def by_class(
    features: Floats, classes: NDArray[np.integer[Any]], shots: int | None
) -> list[ClassStatistics]:
    """The statistics of groups of about ten classes, of at least two groups, in a fixed order."""
    order = np.random.RandomState(SEED).permutation(np.unique(classes))
    rng = np.random.RandomState(SEED)
    result = []
    for part in np.array_split(order, max(2, round(len(order) / 10))):
        rows = [rng.permutation(np.flatnonzero(classes == name))[:shots] for name in part]
        index = np.concatenate(rows)
        result.append(ClassStatistics.fit(features[index], _names(classes[index])))
    return result


def by_domain(
    features: Floats,
    classes: NDArray[np.integer[Any]],
    shots: int | None,
    *,
    domains: NDArray[np.integer[Any]],
) -> list[ClassStatistics]:
    """The statistics of each domain, all classes in it."""
    rng = np.random.RandomState(SEED)
    result = []
    for domain in np.unique(domains):
        here = [
            np.flatnonzero((domains == domain) & (classes == name)) for name in np.unique(classes)
        ]
        index = np.concatenate([rng.permutation(rows)[:shots] for rows in here])
        result.append(ClassStatistics.fit(features[index], _names(classes[index])))
    return result


def accuracy(
    groups: list[ClassStatistics], features: Floats, classes: NDArray[np.integer[Any]]
) -> float:
    """Accuracy of the head over all groups."""
    mixture = Mixture.from_statistics(groups)
    posterior = mixture.evidence(features).posterior()
    names = np.array([label for _, label in mixture.entries])
    shares = np.stack([posterior[:, names == label].sum(axis=1) for label in mixture.labels], 1)
    found = np.array(mixture.labels)[shares.argmax(axis=1)]
    return float(np.mean(found == np.array(_names(classes))))


def _names(classes: NDArray[np.integer[Any]]) -> list[str]:
    return [f"{number:05d}" for number in classes.tolist()]


def _rounded(rows: Floats, largest: int) -> Floats:
    step = np.abs(rows).max(axis=1, keepdims=True) / largest
    result: Floats = np.rint(rows / np.where(step > 0, step, 1)) * step
    return result


def _with(statistics: ClassStatistics, scatter: Floats, size: int) -> tuple[ClassStatistics, int]:
    means = statistics.means.astype(np.float16).astype(np.float64)
    return replace(statistics, means=means, scatter=scatter), size + 2 * means.size


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description="Accuracy of heads of statistics that travelled.")
    parser.add_argument("--features", type=Path, nargs="+", required=True, metavar="FILE.npz")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "statistics_size.json"
    )
    options = parser.parse_args(argv)
    rows = []
    for path in options.features:
        for row in measure(path):
            rows.append(row)
            print(
                f"{row['features']:<8} {row['split']:<8} d={row['dim']:<4} "
                f"shots={row['shots'] or 'all':<4} "
                f"{row['form']:<40} {row['bytes_per_class']:>6} B/class "
                f"{row['accuracy_exact']:.2f} {-row['points_lost']:+.2f}",
                flush=True,
            )
    report = {
        "benchmark": "statistics_size",
        "seed": SEED,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
