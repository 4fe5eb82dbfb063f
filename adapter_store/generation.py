"""What one generation is: its manifest, and what is read from its directory and its bundles.

`adapter_store.generations` writes, activates and removes them. Nothing here writes.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from adapter_store.blobs import BlobStore
from adapter_store.errors import GenerationError

CALIBRATION: Final = "calibration.safetensors"
PREPARED: Final = "prepared.safetensors"
# What the names of an alignment's arrays begin with in that file.
ALIGNMENT: Final = "alignment."

log = logging.getLogger(__name__)

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class GenerationManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a generation consists of.

    Attributes:
        number: Its number on this device; they only grow.
        encoder: Digest of the encoder package.
        bundles: Digests of the installed bundles, sorted.
        parent: The generation it was made from.
        reason: Why it was made, for people.
        created_at: Seconds since the epoch.
        router: The router's settings.
        alarm: The alarm's settings.
        metrics: What was measured of it before it was activated.
        calibration: SHA-256 of the calibration features' file.
        aligned: That file also holds an alignment of the features.
        prepared: SHA-256 of what the agent computed from the bundles to start sooner; empty for
            a generation without it.
        runtime: How its sessions are made, where that was tuned, and on which machine.
    """

    number: int
    encoder: Digest
    bundles: list[Digest]
    parent: int | None
    reason: str
    created_at: float
    router: dict[str, Any] = {}
    alarm: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    calibration: str = ""
    aligned: bool = False
    prepared: str = ""
    runtime: dict[str, Any] = {}


@dataclass(frozen=True)
class Generation:
    """One generation on disk.

    Attributes:
        manifest: What it consists of.
        digest: SHA-256 of the manifest's file.
        path: Its directory.
        blobs: Where its bundles are.
    """

    manifest: GenerationManifest
    digest: str
    path: Path
    blobs: BlobStore

    @property
    def number(self) -> int:
        """Its number on this device."""
        return self.manifest.number

    def calibration_features(self) -> NDArray[np.float16]:
        """Base features [m, d] of held-out samples of the world it knows.

        Raises:
            GenerationError: The file is damaged.
        """
        features: NDArray[np.float16] = self._calibration()["features"]
        return features

    def alignment(self) -> dict[str, NDArray[Any]]:
        """The arrays of its alignment, by name; empty when it has none.

        Raises:
            GenerationError: The file is damaged.
        """
        if not self.manifest.aligned:
            return {}
        return {
            name.removeprefix(ALIGNMENT): array
            for name, array in self._calibration().items()
            if name.startswith(ALIGNMENT)
        }

    def _calibration(self) -> dict[str, NDArray[Any]]:
        try:
            data = (self.path / CALIBRATION).read_bytes()
        except OSError as error:
            raise GenerationError(
                f"generation {self.number}: cannot read {CALIBRATION}: {error.strerror or error}"
            ) from error
        if hashlib.sha256(data).hexdigest() != self.manifest.calibration:
            raise GenerationError(
                f"generation {self.number}: {CALIBRATION} is damaged on disk; activate another "
                "generation"
            )
        return load(data)

    def prepared(self) -> bytes | None:
        """What the agent computed from the bundles when it made the generation, to start sooner.

        None when there is none, or it cannot be read or is damaged: the bundles say the same.
        """
        if not self.manifest.prepared:
            return None
        try:
            data = (self.path / PREPARED).read_bytes()
        except OSError as error:
            log.warning("generation %d: cannot read %s: %s", self.number, PREPARED, error)
            return None
        if hashlib.sha256(data).hexdigest() != self.manifest.prepared:
            log.warning("generation %d: %s is damaged on disk", self.number, PREPARED)
            return None
        return data

    def bundle_bytes(self, digest: str) -> bytes:
        """The bytes of one of its bundles.

        Raises:
            GenerationError: It is not one of them.
            StoreError: It is not on the disk, or damaged.
        """
        if digest not in self.manifest.bundles:
            raise GenerationError(f"bundle {digest[:12]} is not in generation {self.number}")
        return self.blobs.get(digest)

    def check(self) -> None:
        """Read everything it consists of.

        Raises:
            StoreError: Something is missing or damaged.
        """
        self.calibration_features()
        for digest in self.manifest.bundles:
            self.blobs.get(digest)


def encode_manifest(manifest: GenerationManifest) -> bytes:
    """A manifest as its file holds it."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
