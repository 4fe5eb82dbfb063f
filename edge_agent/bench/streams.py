"""From a labelled set to a stream of tasks: which samples arrive when, and what tests each task.

Pure: the same set, settings and seed give the same stream. A training sample is in one task at
most, and no test sample is in any. The runner calls `build`; it knows neither files nor encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.bench.datasets import Column
from edge_agent.errors import BenchmarkError

Kind = Literal["class", "domain", "mixed"]
Rows = NDArray[np.int64]

_TEST_SHARE: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What stream to make of a set.

    Attributes:
        kind: ``class``: every task brings new classes. ``domain``: every task brings all classes
            in a new domain. ``mixed``: task t brings class group g in domain d for all g + d = t,
            so new classes and new domains arrive together.
        init: Classes of the first task (``class``, ``mixed``).
        increment: Classes of every later task; the last may be smaller.
        order_seed: Class order ``numpy.random.RandomState(order_seed).permutation(classes)``;
            domains without a given order are permuted the same way.
        domain_order: Domains by name, in order; all of them, or the seed's permutation if empty.
        shots: Most samples a class may have in a task at home, before others move in.
        imbalance: The first class of the order has this many times the samples of the last, with
            an exponential fall between; 1 changes nothing.
        blurry: Share of each task's samples that arrive in some other task instead.
        revisit: Share of each task's samples that arrive in a later task instead.
        label_noise: Share of each task's samples labelled as another class of that task.
        seed: Seed of the split, of who is chosen by the above, and of training.
    """

    kind: Kind = "class"
    init: int = 10
    increment: int = 10
    order_seed: int = 1993
    domain_order: tuple[str, ...] = ()
    shots: int | None = None
    imbalance: float = 1.0
    blurry: float = 0.0
    revisit: float = 0.0
    label_noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class StreamTask:
    """A task of a stream.

    Attributes:
        name: What arrives, in words.
        train: Rows of the training samples, in the order they are given; int64 [n].
        labels: The class each is labelled as, right or wrong; int64 [n].
        test: Rows that test this task: all test samples of what it is the home of.
    """

    name: str
    train: Rows
    labels: Rows
    test: Rows


def split(
    classes: Column, test: NDArray[np.bool_] | None, domains: Column | None, *, seed: int
) -> NDArray[np.bool_]:
    """Which samples are for testing: the set's own part, or a fifth of every class and domain.

    Args:
        classes: The class of each sample.
        test: The set's own test part, kept as it is; None when it comes in one part.
        domains: The domain of each sample, if the stream has any.
        seed: Which fifth.
    """
    if test is not None:
        return test
    rng = np.random.default_rng((seed, 1))
    chosen = np.zeros(len(classes.index), np.bool_)
    cell = classes.index * (len(domains.names) if domains else 1)
    cell = cell + (domains.index if domains else 0)
    for value in np.unique(cell):
        rows = rng.permutation(np.flatnonzero(cell == value))
        chosen[rows[: round(len(rows) * _TEST_SHARE)]] = True
    return chosen


def build(
    classes: Column,
    test: NDArray[np.bool_] | None,
    domains: Column | None,
    settings: StreamSettings,
) -> tuple[StreamTask, ...]:
    """Make the stream.

    Args:
        classes: The class of each sample.
        test: The set's own test part, if it has one.
        domains: The domain of each sample; needed unless ``settings.kind`` is ``class``.
        settings: What stream.

    Raises:
        BenchmarkError: A setting is out of range or a task would have nothing to learn or to test.
    """
    _check(settings, classes)
    if settings.kind == "class":
        domains = None
    elif domains is None:
        raise BenchmarkError(f"a {settings.kind} stream needs domains; name them by --domain-key")
    tests = split(classes, test, domains, seed=settings.seed)
    order = np.random.RandomState(settings.order_seed).permutation(len(classes.names))
    home, names = _homes(classes, domains, order, settings)
    rng = np.random.default_rng((settings.seed, 2))
    kept = [
        _thinned(np.flatnonzero((home == t) & ~tests), classes.index, order, settings, rng)
        for t in range(len(names))
    ]
    tasks = []
    for t, rows in enumerate(_moved(kept, settings, rng)):
        own = np.flatnonzero((home == t) & tests)
        if not len(rows) or not len(own):
            raise BenchmarkError(
                f"task {t} ({names[t]}) has {len(rows)} samples to learn and {len(own)} to test; "
                "give more samples, fewer tasks or a milder setting"
            )
        shuffled = rng.permutation(rows)
        labels = _noisy(classes.index[shuffled], settings.label_noise, rng)
        tasks.append(StreamTask(names[t], shuffled, labels, own))
    return tuple(tasks)


def _check(settings: StreamSettings, classes: Column) -> None:
    problems = [
        f"{name} is {value}, expected {expected}"
        for name, value, right, expected in (
            ("init", settings.init, settings.init >= 1, "at least 1 class"),
            ("increment", settings.increment, settings.increment >= 1, "at least 1 class"),
            ("shots", settings.shots, settings.shots is None or settings.shots > 0, "at least 1"),
            ("imbalance", settings.imbalance, settings.imbalance >= 1, "1 or more"),
            ("blurry", settings.blurry, 0 <= settings.blurry < 1, "0 to below 1"),
            ("revisit", settings.revisit, 0 <= settings.revisit < 1, "0 to below 1"),
            ("label noise", settings.label_noise, 0 <= settings.label_noise < 1, "0 to below 1"),
            ("order seed", settings.order_seed, 0 <= settings.order_seed < 2**32, "0 to 2^32 - 1"),
        )
        if not right
    ]
    if settings.kind != "domain" and settings.init > len(classes.names):
        problems.append(f"init is {settings.init}, but there are {len(classes.names)} classes")
    if problems:
        raise BenchmarkError("; ".join(problems))


def _homes(
    classes: Column, domains: Column | None, order: NDArray[Any], settings: StreamSettings
) -> tuple[Rows, list[str]]:
    """The task each sample is at home in, and the tasks' names."""
    cuts = range(settings.init, len(order), settings.increment)
    groups = np.split(order, list(cuts))
    group_of = np.empty(len(order), np.int64)
    for number, group in enumerate(groups):
        group_of[group] = number
    group_names = [_listed([classes.names[k] for k in group]) for group in groups]
    if domains is None:
        return group_of[classes.index], group_names
    ranks = _domain_ranks(domains, settings)
    domain_names = [domains.names[k] for k in np.argsort(ranks)]
    if settings.kind == "domain":
        return ranks[domains.index], domain_names
    home = group_of[classes.index] + ranks[domains.index]
    names = [
        "; ".join(
            f"{group_names[g]} in {domain_names[t - g]}"
            for g in range(len(groups))
            if 0 <= t - g < len(domain_names)
        )
        for t in range(len(groups) + len(domain_names) - 1)
    ]
    return home, names


def _domain_ranks(domains: Column, settings: StreamSettings) -> Rows:
    count = len(domains.names)
    if not settings.domain_order:
        rng = np.random.RandomState(settings.order_seed)
        return np.argsort(rng.permutation(count)).astype(np.int64)
    if sorted(settings.domain_order) != sorted(domains.names):
        raise BenchmarkError(
            f"the domain order is {', '.join(settings.domain_order)}; the set's domains are "
            f"{', '.join(domains.names)}; name each once"
        )
    return np.array([settings.domain_order.index(name) for name in domains.names])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _thinned(
    rows: Rows,
    classes: Rows,
    order: NDArray[Any],
    settings: StreamSettings,
    rng: np.random.Generator,
) -> Rows:
    """What imbalance and shots leave of a task's own training samples."""
    kept = []
    for place, k in enumerate(order):
        own = rng.permutation(rows[classes[rows] == k])
        limit = len(own)
        if limit and len(order) > 1:
            limit = max(round(limit * settings.imbalance ** (-place / (len(order) - 1))), 1)
        kept.append(own[: limit if settings.shots is None else min(limit, settings.shots)])
    return np.concatenate(kept).astype(np.int64)


def _moved(kept: list[Rows], settings: StreamSettings, rng: np.random.Generator) -> list[Rows]:
    """Sends shares of every task's samples to other tasks (blurry) and to later ones (revisit)."""
    count = len(kept)
    arriving: list[list[Rows]] = [[] for _ in kept]
    for t, rows in enumerate(kept):
        shuffled = rng.permutation(rows)
        blurred = round(settings.blurry * len(rows)) if count > 1 else 0
        later = round(settings.revisit * len(rows)) if t + 1 < count else 0
        later = min(later, len(rows) - blurred)
        goal = np.full(len(rows), t)
        if blurred:
            others = rng.integers(0, count - 1, blurred)
            goal[:blurred] = others + (others >= t)
        if later:
            goal[blurred : blurred + later] = rng.integers(t + 1, count, later)
        for target in range(count):
            arriving[target].append(shuffled[goal == target])
    return [np.concatenate(parts) for parts in arriving]


def _noisy(labels: Rows, share: float, rng: np.random.Generator) -> Rows:
    """Labels with a share of them replaced by another class among them."""
    present = np.unique(labels)
    wrong = round(share * len(labels))
    if not wrong or len(present) < 2:
        return labels
    noisy = labels.copy()
    rows = rng.permutation(len(labels))[:wrong]
    shift = rng.integers(1, len(present), wrong)
    noisy[rows] = present[(np.searchsorted(present, labels[rows]) + shift) % len(present)]
    return noisy
