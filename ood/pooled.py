"""The statistics of many groups, added up one group at a time.

A device may have a thousand bundles installed, and the scatter of each is megabytes once unpacked:
what heads are computed from is only their sum, and a mean and a count for every class.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ood.errors import OodError
from ood.statistics import ClassStatistics
from ood.validation import FloatArray


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
        index = len(self._means)
        self.entries += [(index, label) for label in group.labels]
        self._means.append(group.means)
        self._counts.append(group.counts.astype(np.float64))
        self.scatter += group.scatter

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
