"""A batch whose rows have different adapters, in one run: a bank and an index for each row.

For batch services and for routing a batch at once. The graph is derived from the family's own
(`exporter.bank_graph`): each row's adapter is gathered, and products are batched. NumPy and ONNX
Runtime alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from exporter.derived import bank_graph, read_derived
from exporter.errors import EncoderError
from exporter.families import RANK, adapter_family
from exporter.package import EncoderPackage
from exporter.probing import tolerance
from exporter.sessions import (
    EncoderSessions,
    check_rows,
    check_tensors,
    in_batches,
    open_session,
    rows_at_once,
)

Array = npt.NDArray[np.float32]

BARE = -1


class AdapterBank:
    """T adapters of one family, stacked; adapters of smaller ranks are padded with zeros.

    Behind them lies a neutral one, so that the index `BARE` is the encoder without an adapter.

    Args:
        package: The encoder.
        family: The adapters' family.
        adapters: Each adapter's tensors by name; the order gives their numbers, from 0.

    Attributes:
        family: The adapters' family.
        count: How many adapters there are.
        tensors: Each tensor of all adapters, float32 [count + 1, ...].

    Raises:
        EncoderError: There is none, one is not this encoder's, or their ranks differ in a family
            where zeros are not neutral.
    """

    def __init__(
        self, package: EncoderPackage, family: str, adapters: Sequence[Mapping[str, Array]]
    ) -> None:
        if not adapters:
            raise EncoderError("a bank needs at least one adapter")
        ranks = {check_tensors(package, family, tensors) for tensors in adapters}
        if len(ranks) > 1 and not adapter_family(family).pads:
            raise EncoderError(
                f"adapters of the family {family!r} in one bank cannot differ in rank; "
                f"found {', '.join(map(str, sorted(ranks)))}"
            )
        self.family = family
        self.count = len(adapters)
        self.tensors: dict[str, Array] = {}
        for name, shape in package.family(family).tensors.items():
            axes = [max(ranks) if axis == RANK else int(axis) for axis in shape]
            stacked = np.zeros([self.count + 1, *axes], np.float32)
            for number, tensors in enumerate(adapters):
                own = tuple(slice(size) for size in tensors[name].shape)
                stacked[number][own] = tensors[name]
            self.tensors[name] = stacked


class BankSuffix:
    """The suffix of one family for banks of it; safe to use from several threads at once.

    Args:
        sessions: The encoder.
        family: The family.

    Raises:
        EncoderError: The package has no bank graph for this family.
    """

    def __init__(self, sessions: EncoderSessions, family: str) -> None:
        self._package = sessions.package
        self._family = family
        self._package.family(family)
        graph = read_derived(self._package, bank_graph(family))
        weights = self._package.named_weights(graph.weights)
        self._session = open_session(
            graph.data,
            weights,
            source=bank_graph(family),
            settings=sessions.settings,
            tolerance=tolerance(self._package),
            at_once=rows_at_once(self._package),
        )

    def run(self, hidden: Array, bank: AdapterBank, index: npt.NDArray[np.int64]) -> Array:
        """Runs every row with its own adapter.

        Args:
            hidden: float32 [n, ...], from the prefix.
            bank: The adapters.
            index: int64 [n], each row's adapter, 0 to `bank.count` - 1, or `BARE`.

        Returns:
            Features float32 [n, d]; row i is what the suffix gives for it with adapter `index[i]`.

        Raises:
            EncoderError: The bank is another family's, or an index names no adapter of it.
        """
        check_rows(hidden, self._package.hidden_shape, "hidden")
        if bank.family != self._family:
            raise EncoderError(f"the bank is of {bank.family!r}, the suffix of {self._family!r}")
        if index.dtype != np.int64 or index.shape != (len(hidden),):
            raise EncoderError(
                f"index is {index.dtype} {list(index.shape)}, expected int64 [{len(hidden)}]"
            )
        if len(index) and not (index.min() >= BARE and index.max() < bank.count):
            raise EncoderError(
                f"index has {index.min()} to {index.max()}, the bank has adapters 0 to "
                f"{bank.count - 1}"
            )
        return in_batches(
            lambda part: self._session.run(
                None,
                {
                    "hidden": np.ascontiguousarray(hidden[part]),
                    "index": np.ascontiguousarray(index[part]),
                    **bank.tensors,
                },
            )[0],
            len(hidden),
            (self._package.suffix_dim,),
            at_once=rows_at_once(self._package),
        )
