"""One interface to all scores: fit on features of known classes, score, merge, write, read.

A fitted score is chosen by name. Adding a class, or an adapter's classes, is a merge with what was
fitted on them alone; it needs no old data and has one result in any order. Called by benchmarks and
by whoever wants another score than a device's own, which `ood.detector` makes from the statistics
of its generation. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.hyperdimensional import HypervectorState
from ood.logits import BoundaryScore, EnergyScore, GenScore
from ood.mahalanobis import HalfWhitenedScore, RelativeMahalanobisScore
from ood.moments import Moments
from ood.neighbours import NeighbourBank
from ood.scores import MahalanobisScore, Score
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise
from ood.subspace import VimScore
from ood.validation import FloatArray, check_features, check_labels
from ood.wire import Reader, Writer

# What raw features may be at most, as a power of two.
RAW_SCALE: Final = 8
_MAGIC: Final = b"DKF1"


class FittedScore(Protocol):
    """What every kind of score can do once it is fitted."""

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return how foreign each sample is, float64 [n]; higher is more foreign."""
        ...

    def merge(self, other: Self) -> Self:
        """Return the score of both sets of samples; associative and commutative."""
        ...

    def to_bytes(self) -> bytes:
        """Write the state."""
        ...


@dataclass(frozen=True, eq=False)
class StatisticsScore:
    """A score that class statistics determine; its state is their exact sums.

    Attributes:
        name: one of the names in `SCORES`.
        moments: the state.
    """

    name: str
    moments: Moments

    @classmethod
    def fit(
        cls, name: str, features: npt.ArrayLike, labels: Sequence[str], **_: object
    ) -> StatisticsScore:
        """Sum up labelled features [n, d]."""
        rows, scale = _prepared(name, features)
        return cls(name, Moments.fit(rows, labels, scale=scale))

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return self._scorer.score(_prepared(self.name, features)[0])

    def merge(self, other: StatisticsScore) -> StatisticsScore:
        """Return the score of both sets of samples.

        Raises:
            OodError: the two are of different names or dimensions.
        """
        _same_name(self.name, other.name)
        return StatisticsScore(self.name, self.moments.merge(other.moments))

    def to_bytes(self) -> bytes:
        """Write the state."""
        return _named(self.name, self.moments.to_bytes())

    @classmethod
    def from_state(cls, name: str, state: bytes) -> StatisticsScore:
        """Read the state."""
        return cls(name, Moments.from_bytes(state))

    @cached_property
    def _scorer(self) -> Score:
        return _FROM_STATISTICS[self.name.removesuffix("++")](self.moments.statistics())


@dataclass(frozen=True, eq=False)
class StateScore:
    """A score with a state of its own kind: a bank of neighbours, or hypervectors.

    Attributes:
        name: one of the names in `SCORES`.
        state: the state.
    """

    name: str
    state: NeighbourBank | HypervectorState

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Return float64 [n].

        Raises:
            OodError: features are empty, not finite, or of another dimension.
        """
        return self.state.score(l2_normalise(features))

    def merge(self, other: StateScore) -> StateScore:
        """Return the score of both sets of samples.

        Raises:
            OodError: the two do not belong together.
        """
        _same_name(self.name, other.name)
        if isinstance(self.state, NeighbourBank) and isinstance(other.state, NeighbourBank):
            return StateScore(self.name, self.state.merge(other.state))
        if isinstance(self.state, HypervectorState) and isinstance(other.state, HypervectorState):
            return StateScore(self.name, self.state.merge(other.state))
        raise OodError("cannot merge a bank of neighbours and hypervectors")

    def to_bytes(self) -> bytes:
        """Write the state."""
        return _named(self.name, self.state.to_bytes())


@dataclass(frozen=True)
class Kind:
    """How a score of one name is fitted and read.

    Attributes:
        fit: from (features [n, d], labels), and by keyword ``seed``.
        from_state: from the bytes of its state.
    """

    fit: Callable[..., FittedScore]
    from_state: Callable[[bytes], FittedScore]


def fit(
    name: str,
    features: npt.ArrayLike,
    labels: Sequence[str],
    *,
    seed: str = "driftkeel",
) -> FittedScore:
    """Fit a score on features of known classes.

    Args:
        name: one of the names in `SCORES`; a name with ``++`` and those that compare directions
            scale features to unit length first.
        features: [n, d].
        labels: n class names.
        seed: what random projections are drawn from, usually the encoder's digest.

    Raises:
        OodError: the name is unknown, or features or labels are empty, not finite, or do not match.

    Example:
        >>> one = fit("mahalanobis++", [[1.0, 0.0], [0.9, 0.1]], ["a", "a"])
        >>> two = fit("mahalanobis++", [[0.0, 1.0]], ["b"])
        >>> near, far = one.merge(two).score([[0.1, 1.0], [-1.0, -1.0]])
        >>> bool(near < far)
        True
    """
    if name not in SCORES:
        raise OodError(f"no score is called {name!r}; there are {', '.join(SCORES)}")
    return SCORES[name].fit(features, labels, seed=seed)


def from_bytes(data: bytes) -> FittedScore:
    """Read a fitted score, trusting nothing.

    Raises:
        OodError: the bytes are no fitted score.
    """
    reader = Reader(data, _MAGIC)
    try:
        name = reader.blob().decode()
    except UnicodeDecodeError as error:
        raise OodError("the score's name is not UTF-8") from error
    state = reader.blob()
    reader.end()
    if name not in SCORES:
        raise OodError(f"no score is called {name!r}; there are {', '.join(SCORES)}")
    return SCORES[name].from_state(state)


def _prepared(name: str, features: npt.ArrayLike) -> tuple[npt.NDArray[np.floating], int]:
    """Features as a score of this name wants them, and the scale they are within."""
    if name.endswith("++"):
        return l2_normalise(features), 0
    return check_features(features), RAW_SCALE


def _named(name: str, state: bytes) -> bytes:
    writer = Writer(_MAGIC)
    writer.blob(name.encode())
    writer.blob(state)
    return writer.done()


def _same_name(one: str, other: str) -> None:
    if one != other:
        raise OodError(f"cannot merge the scores {one} and {other}")


def _fit_bank(features: npt.ArrayLike, labels: Sequence[str], **_: object) -> StateScore:
    rows = l2_normalise(features)
    check_labels(labels, samples=len(rows))
    return StateScore("knn", NeighbourBank.fit(rows))


def _read_bank(state: bytes) -> StateScore:
    return StateScore("knn", NeighbourBank.from_bytes(state))


def _fit_hypervectors(
    name: str, features: npt.ArrayLike, labels: Sequence[str], *, seed: str
) -> StateScore:
    state = HypervectorState.fit(
        l2_normalise(features), labels, seed=seed, binary=name.endswith("binary")
    )
    return StateScore(name, state)


def _read_hypervectors(name: str, state: bytes) -> StateScore:
    found = HypervectorState.from_bytes(state)
    if found.binary != name.endswith("binary"):
        raise OodError(f"the state is not one of {name}")
    return StateScore(name, found)


def _head(statistics: ClassStatistics) -> GaussianHead:
    return GaussianHead.from_statistics([statistics])


_FROM_STATISTICS: Final[Mapping[str, Callable[[ClassStatistics], Score]]] = MappingProxyType(
    {
        "mahalanobis": lambda statistics: MahalanobisScore(_head(statistics)),
        "half-whitened": lambda statistics: HalfWhitenedScore(_head(statistics)),
        "relative-mahalanobis": RelativeMahalanobisScore,
        "vim": lambda statistics: VimScore(_head(statistics)),
        "energy": lambda statistics: EnergyScore(_head(statistics)),
        "gen": lambda statistics: GenScore(_head(statistics)),
        "boundary": lambda statistics: BoundaryScore(_head(statistics)),
    }
)

SCORES: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        **{
            name + suffix: Kind(
                partial(StatisticsScore.fit, name + suffix),
                partial(StatisticsScore.from_state, name + suffix),
            )
            for name in _FROM_STATISTICS
            for suffix in ("", "++")
        },
        "knn": Kind(_fit_bank, _read_bank),
        **{
            name: Kind(partial(_fit_hypervectors, name), partial(_read_hypervectors, name))
            for name in ("hyperdimensional", "hyperdimensional-binary")
        },
    }
)
