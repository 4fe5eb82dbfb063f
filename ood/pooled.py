"""The statistics of many groups, added up one group at a time.

A device may have a thousand bundles installed, and the scatter of each is megabytes once unpacked:
what heads are computed from is only their sum, and a mean and a count for every class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ood.errors import OodError
from ood.statistics import ClassStatistics
from ood.validation import FloatArray, check_features

_ARRAYS: Final = {"counts", "entries", "means", "scatter"}


class Pooled:
    """Class statistics of several groups, in the order in which they were added.

    The sum of the scatters is taken in that order: add groups in a canonical one where the last
    bit matters.

    Attributes:
        entries: (group index, label name) of every class of every group.
        scatter: float64 [d, d], the sum of the groups' scatters; [0, 0] while there is none.

    Example:
        >>> one = ClassStatistics.fit([[0.0], [2.0]], ["a", "a"])
        >>> pooled = Pooled([one, ClassStatistics.fit([[5.0]], ["b"])])
        >>> pooled.entries, pooled.samples, pooled.freedom
        ([(0, 'a'), (1, 'b')], 3, 1)
    """

    def __init__(self, groups: Iterable[ClassStatistics] = ()) -> None:
        self.entries: list[tuple[int, str]] = []
        self._groups = 0
        self.scatter: FloatArray = np.zeros((0, 0))
        self._means: list[FloatArray] = []
        self._counts: list[FloatArray] = []
        for group in groups:
            self.add(group)

    def add(self, group: ClassStatistics) -> None:
        """Take in one group.

        Raises:
            OodError: its dimension is another than that of the groups before.
        """
        if not self._means:
            self.scatter = np.zeros((group.dim, group.dim))
        elif group.dim != len(self.scatter):
            dims = sorted({group.dim, len(self.scatter)})
            raise OodError(f"the groups are of different dimensions: {dims}")
        self.entries += [(self._groups, label) for label in group.labels]
        self._groups += 1
        self._means.append(group.means)
        self._counts.append(group.counts.astype(np.float64))
        self.scatter += group.scatter

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Pooled:
        """Take back what `to_arrays` gave.

        Raises:
            OodError: The arrays are others, or contradict each other.
        """
        if set(arrays) != _ARRAYS:
            raise OodError(f"pooled statistics have the arrays {sorted(_ARRAYS)}")
        pooled = cls()
        try:
            found = json.loads(bytes(arrays["entries"]))
            entries = [(int(group), str(label)) for group, label in found]
        except (ValueError, TypeError) as error:
            raise OodError(f"the entries of pooled statistics are unreadable: {error}") from error
        if not entries:
            return pooled
        means = check_features(arrays["means"])
        counts, scatter = (np.array(arrays[name], np.float64) for name in ("counts", "scatter"))
        square = (means.shape[1], means.shape[1])
        if len(means) != len(entries) or counts.shape != (len(entries),) or scatter.shape != square:
            raise OodError("the arrays of pooled statistics are of different sizes")
        if not (np.isfinite(scatter).all() and np.isfinite(counts).all()):
            raise OodError("pooled statistics are not finite")
        pooled.entries, pooled.scatter = entries, scatter
        pooled._groups = entries[-1][0] + 1
        pooled._means, pooled._counts = [means], [counts]
        return pooled

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything it holds, as arrays by name; nothing is rounded."""
        entries = np.frombuffer(json.dumps(self.entries).encode(), np.uint8)
        means = self.means if self.entries else np.zeros((0, 0))
        return {"counts": self.counts, "entries": entries, "means": means, "scatter": self.scatter}

    @property
    def means(self) -> FloatArray:
        """The mean of every entry, float64 [entries, d].

        Raises:
            OodError: nothing was added.
        """
        if not self._means:
            raise OodError("a head needs the statistics of at least one group; found none")
        return np.vstack(self._means)

    @property
    def counts(self) -> FloatArray:
        """The samples of every entry, float64 [entries]."""
        return np.concatenate([np.zeros(0), *self._counts])

    @property
    def samples(self) -> int:
        """The samples of all entries."""
        return int(self.counts.sum())

    @property
    def freedom(self) -> int:
        """The scatter's degrees of freedom: samples minus classes."""
        return self.samples - len(self.entries)
