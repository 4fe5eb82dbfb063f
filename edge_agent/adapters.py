"""The installed bundles of one generation, of which only a few are in memory at a time.

A device may have a thousand adapters on its disk and memory for fifty: what heads and detector are
computed from was added up when the generation was loaded, and an adapter is read again when a
sample needs it. The least recently used goes first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import Bundle, EncoderInterface, check_compatible, unpack
from edge_agent.decision import OwnHeads
from edge_agent.router import FloatArray
from exporter.sessions import EncoderSessions, FedAdapter
from ood.errors import DriftkeelError
from ood.logits import Discriminant
from ood.statistics import l2_normalise

log = logging.getLogger(__name__)


class StoredBundles(Mapping[str, Bundle]):
    """Bundles by digest, sorted; each is read and checked when it is asked for, and not kept.

    Args:
        read: Gives a bundle's bytes by digest, and refuses damaged ones.
        digests: Which bundles, in any order; each counts once.
        interface: The encoder they must fit.
    """

    def __init__(
        self, read: Callable[[str], bytes], digests: Sequence[str], interface: EncoderInterface
    ) -> None:
        self._read = read
        self._interface = interface
        self._digests = dict.fromkeys(sorted(set(digests)))

    def __getitem__(self, digest: str) -> Bundle:
        """Read one bundle.

        Raises:
            BundleError: It is damaged or for another encoder; the message says which.
            StoreError: It cannot be read.
        """
        if digest not in self._digests:
            raise KeyError(digest)
        bundle = unpack(self._read(digest))
        check_compatible(bundle, self._interface)
        return bundle

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What it takes to look at a sample with one adapter.

    Attributes:
        labels: The labels of its bundle.
        network: The encoder's last blocks, adapted.
        head: Compares those labels in the adapter's own space; what it was computed from is a
            hundred times its size and is not kept.
    """

    labels: tuple[str, ...]
    network: FedAdapter
    head: Discriminant

    def log_likelihoods(self, hidden: NDArray[np.float32]) -> FloatArray:
        """How likely samples are under each label, up to a number of each sample's own.

        Args:
            hidden: float32 [n, *package.hidden_shape].

        Returns:
            float64 [n, labels].
        """
        adapted = self.network.run(hidden)
        return self.head.of_rows(l2_normalise(adapted[:, : len(self.head.centre)]))


class Adapters:
    """The adapters of a generation, the most recently used ones in memory; thread-safe.

    Args:
        sessions: The encoder they adapt.
        bundles: The installed bundles by digest.
        heads: Makes the head of each.
        capacity: Most adapters in memory, at least 1.
    """

    def __init__(
        self,
        sessions: EncoderSessions,
        bundles: Mapping[str, Bundle],
        heads: OwnHeads,
        *,
        capacity: int,
    ) -> None:
        self._sessions = sessions
        self._bundles = bundles
        self._heads = heads
        self._capacity = capacity
        self._held: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()
        self._lost: set[str] = set()

    def on(self, sessions: EncoderSessions) -> Adapters:
        """The same adapters on other sessions of the same encoder; none is in memory yet."""
        return Adapters(sessions, self._bundles, self._heads, capacity=self._capacity)

    def get(self, digest: str) -> Adapter | None:
        """One adapter; None, with a word in the log, when its bundle can no longer be used."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                self._held.move_to_end(digest)
                return held
            try:
                made = self._made(self._bundles[digest])
            except (DriftkeelError, OSError) as error:
                if digest not in self._lost:
                    self._lost.add(digest)
                    log.warning("adapter %s is left out of answers: %s", digest[:12], error)
                return None
            self._lost.discard(digest)
            self._held[digest] = made
            if len(self._held) > self._capacity:
                self._held.popitem(last=False)
            return made

    def _made(self, bundle: Bundle) -> Adapter:
        head = self._heads.head(bundle.own)
        network = FedAdapter(self._sessions, bundle.manifest.family, bundle.tensors)
        return Adapter(head.labels, network, Discriminant(head))
