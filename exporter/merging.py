"""Merging several adapters of one family into one: pure NumPy, no samples needed.

An adapter is taken as what it changes: factors that act through their product are merged as the
product, which is brought back to a rank by its singular values, because factors of two adapters
have no common basis. What a merged adapter is worth only samples say;
`driftkeel merge` measures it. Hidden units of a perceptron (`bottleneck`, `compacter`) have no
common order either: unless adapters began as one, put them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.errors import EncoderError
from exporter.families import adapter_family, largest_rank, rank_axes, truncate
from exporter.families.base import AdapterFamily

Array = npt.NDArray[np.float32]
Change = dict[str, npt.NDArray[np.float64]]

_PRODUCT = " · "


@dataclass(frozen=True)
class Merged:
    """A merged adapter.

    Attributes:
        tensors: Its tensors.
        kept: The share of the merged products' squared size that the rank holds, 0 to 1.
    """

    tensors: dict[str, Array]
    kept: float


def weighted(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """The weighted mean; with equal weights the average of a model soup (Wortsman et al., 2022).

    Args:
        changes: What each adapter changes.
        weights: One for each, not negative; they are divided by their sum.

    Raises:
        EncoderError: The weights are not usable.
    """
    given = np.asarray(weights, np.float64)
    if len(given) != len(changes) or not np.all(given >= 0) or not 0 < given.sum() < np.inf:
        raise EncoderError(
            f"weights are {[float(w) for w in given]}, expected {len(changes)} numbers of 0 or "
            "more, and not all 0"
        )
    shares = given / given.sum()
    return _each(changes, lambda values: np.tensordot(shares, values, axes=1))


def arithmetic(changes: Sequence[Change], scale: float) -> Change:
    """The sum, scaled: task arithmetic (Ilharco et al., 2023), section 2.

    Args:
        changes: What each adapter changes.
        scale: λ of the paper.
    """
    return _each(changes, lambda values: scale * values.sum(axis=0))


def ties(changes: Sequence[Change], keep: float, scale: float) -> Change:
    """Trim, elect a sign, merge what agrees: TIES (Yadav et al., 2023), algorithm 1.

    Args:
        changes: What each adapter changes.
        keep: The share of each adapter's entries that is kept, the largest ones, above 0 to 1.
        scale: λ of the paper.

    Raises:
        EncoderError: `keep` is outside its range.
    """
    if not 0 < keep <= 1:
        raise EncoderError(f"the share to keep is {keep}, expected above 0 and at most 1")

    def agreed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        sign = np.sign(values.sum(axis=0))
        agreeing = np.where(np.sign(values) == sign, values, 0.0)
        count = np.count_nonzero(agreeing, axis=0)
        mean: npt.NDArray[np.float64] = agreeing.sum(axis=0) / np.maximum(count, 1)
        return scale * mean

    return _each([_trimmed(change, keep) for change in changes], agreed)


def dare(changes: Sequence[Change], drop: float, rng: np.random.Generator) -> list[Change]:
    """Drops entries at random and rescales the others: DARE (Yu et al., 2024), section 3.2.

    What is left is merged in another way; its expectation is what came in.

    Args:
        changes: What each adapter changes.
        drop: The probability of an entry to be dropped, 0 to below 1.
        rng: Where chance comes from.

    Raises:
        EncoderError: `drop` is outside its range.
    """
    if not 0 <= drop < 1:
        raise EncoderError(f"the share to drop is {drop}, expected 0 or more and below 1")
    return [
        {
            name: np.where(rng.random(value.shape) < drop, 0.0, value / (1 - drop))
            for name, value in sorted(change.items())
        }
        for change in changes
    ]


def by_importance(changes: Sequence[Change], importances: Sequence[Change]) -> Change:
    """The mean, every entry weighted by its importance: Fisher merging (Matena and Raffel, 2022).

    Equation 4 of the paper, with the diagonal of each task's Fisher information as importance. An
    entry that matters to none is averaged.

    Args:
        changes: What each adapter changes.
        importances: For each adapter, how much each entry matters; 0 or more, of the same shapes.

    Raises:
        EncoderError: An importance is missing, negative or not finite.
    """
    for change, importance in zip(changes, importances, strict=True):
        for name, value in change.items():
            given = importance.get(name)
            if given is None or given.shape != value.shape:
                raise EncoderError(f"the importance of {name!r} is missing or of another shape")
            if not np.all((given >= 0) & np.isfinite(given)):
                raise EncoderError(f"the importance of {name!r} has entries that are not usable")
    found: Change = {}
    for name in changes[0]:
        values = np.stack([change[name] for change in changes])
        weights = np.stack([importance[name] for importance in importances])
        total = weights.sum(axis=0)
        shares = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1 / len(changes))
        found[name] = (shares * values).sum(axis=0)
    return found


def side_by_side(
    family_name: str, adapters: Sequence[Mapping[str, Array]], weights: Sequence[float]
) -> dict[str, Array]:
    """Adapters in one, rank beside rank: at every site it adds the weighted mean of what they do.

    Exact at a site and whatever the hidden units, at the price of a rank as large as all together.

    Args:
        family_name: The adapters' family, whose ranks are parts of a sum.
        adapters: The adapters' tensors.
        weights: One for each, as `weighted` takes them.

    Raises:
        EncoderError: Ranks of this family cannot be put side by side.
    """
    family = adapter_family(family_name)
    if not family.pads or not family.linear_in:
        raise EncoderError(f"ranks of the family {family_name!r} cannot be put side by side")
    _check_alike(family, adapters)
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    found = {}
    for name in adapters[0]:
        linear = _param(name) in family.linear_in
        parts = [
            (share if linear else 1.0) * tensors[name].astype(np.float64)
            for share, tensors in zip(shares, adapters, strict=True)
        ]
        axes = rank_axes(family)[_param(name)]
        whole = np.concatenate(parts, axis=axes[0]) if axes else np.sum(parts, axis=0)
        found[name] = whole.astype(np.float32)
    return found


def changes_of(family_name: str, tensors: Mapping[str, Array]) -> Change:
    """What an adapter changes, in double precision, with products in place of their factors."""
    family = adapter_family(family_name)
    found = {name: value.astype(np.float64) for name, value in tensors.items()}
    for left, right in family.products:
        for name in [name for name in found if _param(name) == left]:
            site = name.removesuffix(left)
            product = found.pop(name) @ found.pop(site + right)
            found[site + left + _PRODUCT + right] = product
    return found


def aligned(family_name: str, adapters: Sequence[Mapping[str, Array]]) -> list[Change]:
    """What several adapters change, of the same names and shapes: smaller ranks padded.

    Raises:
        EncoderError: They are not alike, or fewer than two.
    """
    family = adapter_family(family_name)
    _check_alike(family, adapters)
    rank = max(largest_rank(family, tensors) for tensors in adapters)
    return [changes_of(family_name, _padded(family, tensors, rank)) for tensors in adapters]


def spelt_out(family_name: str, change: Change) -> dict[str, Array]:
    """An adapter that makes a change exactly, its products as they are in their left factors.

    The right factors are identities, so a gradient by a left factor is the gradient by the product.
    All of them have the rank of the widest product, which no stored adapter would.

    Args:
        family_name: The family; one with products has no other tensors with a rank.
        change: What the adapter changes, as `changes_of` gives it.
    """
    family = adapter_family(family_name)
    parts = {name: _param(name).partition(_PRODUCT) for name in change}
    widths = [value.shape[1] for name, value in change.items() if parts[name][1]]
    rank = max(widths, default=0)
    found = {}
    for name, value in change.items():
        left, product, right = parts[name]
        if not product:
            found[name] = value.astype(np.float32)
            continue
        assert (left, right) in family.products
        site, width = name.removesuffix(_param(name)), value.shape[1]
        found[site + left] = np.pad(value, ((0, 0), (0, rank - width))).astype(np.float32)
        found[site + right] = np.eye(rank, width, dtype=np.float32)
    return found


def read_back(change: Change, values: Mapping[str, npt.NDArray[np.float64]]) -> Change:
    """Values that belong to the entries of a change, from those of its `spelt_out` tensors.

    Args:
        change: What the adapter changes.
        values: One for every number of the tensors, such as gradients by them.
    """
    found: Change = {}
    for name, value in change.items():
        left = name.partition(_PRODUCT)[0]
        found[name] = values[left][tuple(slice(size) for size in value.shape)]
    return found


def adapter_of(family_name: str, change: Change, rank: int) -> Merged:
    """An adapter that makes a change, as nearly as its rank allows.

    Products come back as the singular vectors of their largest singular values (Eckart and Young,
    1936), each factor with the root of the values.

    Args:
        family_name: The family.
        change: What it should change, as `changes_of` gives it.
        rank: The adapter's rank; without influence in families without products.
    """
    family = adapter_family(family_name)
    found: Change = {}
    whole = held = 0.0
    for name, value in change.items():
        left, _, right = _param(name).partition(_PRODUCT)
        if (left, right) not in family.products:
            found[name] = value
            continue
        site = name.removesuffix(left + _PRODUCT + right)
        u, sizes, vt = np.linalg.svd(value, full_matrices=False)
        roots = np.zeros(rank)
        roots[: len(sizes)] = np.sqrt(sizes[:rank])
        spare = rank - min(rank, len(sizes))
        found[site + left] = np.pad(u[:, :rank], ((0, 0), (0, spare))) * roots
        found[site + right] = np.pad(vt[:rank], ((0, spare), (0, 0))) * roots[:, None]
        whole += float(np.sum(sizes**2))
        held += float(np.sum(sizes[:rank] ** 2))
    tensors = {name: value.astype(np.float32) for name, value in sorted(found.items())}
    return Merged(tensors, held / whole if whole else 1.0)


def merged(
    family_name: str,
    adapters: Sequence[Mapping[str, Array]],
    way: Callable[[Sequence[Change]], Change],
    *,
    rank: int | None = None,
) -> Merged:
    """Merges adapters in one of the ways above.

    Args:
        family_name: The family of all of them.
        adapters: Their tensors, of the same names; ranks may differ where zeros are neutral.
        way: Merges what they change.
        rank: The merged adapter's rank; the largest of theirs when absent.

    Raises:
        EncoderError: They are not alike, fewer than two, or the rank cannot be chosen.

    Example:
        >>> one = {"a/scale": np.array([1.0, 0.0], np.float32)}
        >>> two = {"a/scale": np.array([0.0, 4.0], np.float32)}
        >>> merged("ia3", [one, two], lambda changes: weighted(changes, [1, 1])).tensors
        {'a/scale': array([0.5, 2. ], dtype=float32)}
    """
    family = adapter_family(family_name)
    changes = aligned(family_name, adapters)
    own = max(largest_rank(family, tensors) for tensors in adapters)
    found = adapter_of(family_name, way(changes), own if rank is None else rank)
    if rank is None or rank == own or family.products:
        return found
    if not family.ranked or rank > own:
        raise EncoderError(f"a merged adapter of the family {family_name!r} has the rank {own}")
    return Merged(truncate(family, found.tensors, rank), found.kept)


def _each(
    changes: Sequence[Change],
    merge: Callable[[npt.NDArray[np.float64]], Any],  # NumPy types its reductions so
) -> Change:
    return {name: merge(np.stack([change[name] for change in changes])) for name in changes[0]}


def _trimmed(change: Change, keep: float) -> Change:
    """The largest entries of a whole adapter; the others are zero."""
    sizes = np.abs(np.concatenate([value.ravel() for value in change.values()]))
    count = max(round(keep * len(sizes)), 1)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    return {name: np.where(np.abs(value) >= least, value, 0.0) for name, value in change.items()}


def _check_alike(family: AdapterFamily, adapters: Sequence[Mapping[str, Array]]) -> None:
    if len(adapters) < 2:
        raise EncoderError(f"merging needs at least two adapters; found {len(adapters)}")
    for tensors in adapters[1:]:
        if odd := sorted(set(tensors) ^ set(adapters[0])):
            raise EncoderError(f"adapter tensor {odd[0]!r} is not in all of the adapters")
    ranks = {largest_rank(family, tensors) for tensors in adapters}
    if len(ranks) > 1 and not family.pads:
        raise EncoderError(
            f"adapters of the family {family.name!r} to merge cannot differ in rank; "
            f"found {', '.join(map(str, sorted(ranks)))}"
        )


def _padded(family: AdapterFamily, tensors: Mapping[str, Array], rank: int) -> dict[str, Array]:
    found = {}
    for name, value in tensors.items():
        axes = rank_axes(family)[_param(name)]
        widths = [(0, rank - n if axis in axes else 0) for axis, n in enumerate(value.shape)]
        found[name] = np.pad(value, widths)
    return found


def _param(name: str) -> str:
    return name.rsplit("/", 1)[-1]
