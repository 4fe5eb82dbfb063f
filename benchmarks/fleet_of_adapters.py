"""A thousand bundles for one encoder, made when they are asked for: they only have to cost time.

Class means are features of real samples and some noise, adapters are random and small. Two bundles
look the same in the base space and differ in their adapters', so that one look often leads to a
second. Accuracy of such bundles means nothing. Used by `runtime`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import Bundle, Manifest
from exporter.package import EncoderPackage
from ood.calibration import score_quantiles
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise

Floats = NDArray[np.float32]

RANK: Final = 16
_CLASSES: Final = 2
_SAMPLES: Final = 8
_SPREAD: Final = 0.2
_OWN_SPREAD: Final = 0.05


class Fleet(Mapping[str, Bundle]):
    """Bundles by digest; the same index gives the same bundle.

    Args:
        package: The encoder.
        features: l2-normalised base features of real samples, float32 [m, d].
        count: How many bundles.
    """

    def __init__(self, package: EncoderPackage, features: Floats, count: int) -> None:
        self._package = package
        self._features = features
        self._digests = {f"{index:064x}": index for index in range(count)}
        self._signature = signature(features, seed=package.digest)

    def __getitem__(self, digest: str) -> Bundle:
        index = self._digests[digest]
        labels = [f"class {index}.{k}" for k in range(_CLASSES) for _ in range(_SAMPLES)]
        base = self._samples(index // 2, self._package.feature_dim, _SPREAD)
        rng = np.random.default_rng(index)
        own = self._samples(index + len(self), self._package.network_dim, _OWN_SPREAD)
        family = self._package.families[0]
        statistics = ClassStatistics.fit(base, labels)
        manifest = Manifest(
            encoder=self._package.digest,
            family=family,
            rank=RANK,
            sites=self._package.sites,
            labels=statistics.labels,
            task="only to be timed",
            created_at=0.0,
            created_by="benchmark",
            samples=statistics.samples,
            score_quantiles=tuple(score_quantiles(np.arange(101.0))),
        )
        return Bundle(
            manifest=manifest,
            tensors={
                name: rng.normal(
                    0, 0.01, [RANK if axis == "rank" else int(axis) for axis in shape]
                ).astype(np.float32)
                for name, shape in self._package.family(family).tensors.items()
            },
            base=statistics,
            own=ClassStatistics.fit(own, labels),
            signature=self._signature,
        )

    def _samples(self, seed: int, width: int, spread: float) -> Floats:
        """Samples of each class, float32 [classes * samples, width]."""
        rng = np.random.default_rng(seed)
        places = rng.integers(0, len(self._features), _CLASSES)
        rows = np.repeat(self._features[places, :width], _SAMPLES, axis=0)
        return l2_normalise(rows + rng.normal(0, spread, rows.shape).astype(np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)
