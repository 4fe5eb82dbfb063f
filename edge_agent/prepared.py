"""What a generation's heads and detector are computed from, added up once and kept with it.

Reading a thousand bundles takes a device seconds, and nearly all that is read is added up and
thrown away. The installer keeps the sums beside a generation it has checked; loading it again needs
them and no bundle. Nothing is rounded, so answers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapter_store.bundle import FROZEN, Bundle, Manifest
from edge_agent.errors import InstallError
from ood.errors import OodError
from ood.pooled import Pooled

# What a file says first: sums that another version made are made anew.
_FORMAT: Final = 1
_ABOUT: Final = "about"


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer and a status say of one bundle.

    Attributes:
        family: The adapter's mathematics.
        task: What it was made for, in words.
        labels: The classes it knows, sorted.
        samples: How many samples its statistics were computed from.
    """

    family: str
    task: str
    labels: tuple[str, ...]
    samples: int

    @classmethod
    def of(cls, manifest: Manifest) -> Summary:
        """What a manifest says."""
        return cls(manifest.family, manifest.task, manifest.labels, manifest.samples)


class _About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    encoder: str
    bundles: dict[str, Summary]


@dataclass(frozen=True)
class Prepared:
    """The sums over a generation's bundles.

    Attributes:
        summaries: What each bundle says of itself, by digest, sorted.
        base: The statistics of all of them in the base space.
        own: Those of bundles with an adapter, each in its own space.
    """

    summaries: Mapping[str, Summary]
    base: Pooled
    own: Pooled

    @classmethod
    def of(cls, bundles: Mapping[str, Bundle]) -> Prepared:
        """Read every bundle once, in the order of the digests.

        Raises:
            InstallError: There is no bundle.
            BundleError: A bundle is damaged or for another encoder.
            OodError: Their statistics are of different dimensions.
        """
        if not bundles:
            raise InstallError("a generation needs at least one bundle; none was given")
        summaries: dict[str, Summary] = {}
        base, own = Pooled(), Pooled()
        for digest in sorted(bundles):
            bundle = bundles[digest]
            summaries[digest] = Summary.of(bundle.manifest)
            base.add(bundle.base)
            if bundle.manifest.family != FROZEN:
                own.add(bundle.own)
        return cls(summaries, base, own)

    @classmethod
    def from_bytes(cls, data: bytes, *, encoder: str) -> Prepared | None:
        """Take back what `to_bytes` gave; None for what this version or encoder did not make."""
        try:
            arrays = load(data)
            about = msgspec.json.decode(bytes(arrays.pop(_ABOUT)), type=_About)
            if about.format != _FORMAT or about.encoder != encoder:
                return None
            pooled = [
                Pooled.from_arrays(
                    {
                        name.removeprefix(space): array
                        for name, array in arrays.items()
                        if name.startswith(space)
                    }
                )
                for space in ("base.", "own.")
            ]
        except (SafetensorError, msgspec.DecodeError, OodError, KeyError):
            return None
        return cls(about.bundles, *pooled)

    def to_bytes(self, *, encoder: str) -> bytes:
        """Everything, as one file for one encoder."""
        about = _About(_FORMAT, encoder, dict(self.summaries))
        arrays = {_ABOUT: np.frombuffer(msgspec.json.encode(about), np.uint8)}
        for space, pooled in (("base.", self.base), ("own.", self.own)):
            arrays |= {space + name: array for name, array in pooled.to_arrays().items()}
        data: bytes = save(arrays)
        return data
