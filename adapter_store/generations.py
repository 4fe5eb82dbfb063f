"""Generations on disk: immutable directories, and one pointer that says which one runs.

A generation is written whole and synced under a hidden name before it becomes visible by one
rename; activation replaces one small file. A power cut at any instant leaves the old or the new
generation active, never something between. Older ones stay, so rollback needs no network.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapter_store.blobs import BlobStore, sync_directory, write_durably
from adapter_store.errors import DiskFullError, GenerationError, StoreError

_MANIFEST: Final = "manifest.json"
_CALIBRATION: Final = "calibration.safetensors"

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


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


@dataclass(frozen=True)
class Generation:
    """One generation on disk."""

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
        data = (self.path / _CALIBRATION).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.calibration:
            raise GenerationError(f"generation {self.number}: {_CALIBRATION} is damaged on disk")
        features: NDArray[np.float16] = load(data)["features"]
        return features

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


class GenerationStore:
    """The generations of one device.

    Opening it removes what a power cut left half written; when the pointer names a generation that
    is not whole, the newest whole one is taken and ``recovered`` says so.

    Args:
        state_dir: The device's state directory.
        blobs: Where its bundles are.
        keep: How many generations stay besides the active one.
    """

    def __init__(self, state_dir: Path, blobs: BlobStore, *, keep: int = 5) -> None:
        self._root = state_dir / "generations"
        self._pointer = state_dir / "current"
        self._blobs = blobs
        self._keep = keep
        self._root.mkdir(parents=True, exist_ok=True)
        for leftover in self._root.glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in state_dir.glob(".current.*.tmp"):
            leftover.unlink(missing_ok=True)
        self.recovered = self._recover()

    def create(
        self, manifest: GenerationManifest, calibration_features: NDArray[np.float16]
    ) -> Generation:
        """Write a generation; it is not activated.

        Args:
            manifest: What it consists of; its number is given here.
            calibration_features: Base features [m, d].

        Raises:
            StoreError: A bundle it names is not on this disk.
            DiskFullError: It could not be written; nothing is left of it.
        """
        for digest in manifest.bundles:
            self._blobs.get(digest)
        number = max([*self._numbers(), self._pointed() or 0]) + 1
        calibration = save({"features": np.ascontiguousarray(calibration_features, np.float16)})
        manifest = msgspec.structs.replace(
            manifest,
            number=number,
            bundles=sorted(manifest.bundles),
            calibration=hashlib.sha256(calibration).hexdigest(),
        )
        building = self._root / f".new-{number:06d}"
        path = self._root / f"{number:06d}"
        try:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            write_durably(building / _CALIBRATION, calibration)
            write_durably(building / _MANIFEST, _encode(manifest))
            building.rename(path)
            sync_directory(self._root)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise DiskFullError(f"cannot write generation {number}: {error.strerror}") from error
        except DiskFullError:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return self.get(number)

    def activate(self, number: int) -> None:
        """Make a generation the one that runs, now and after every restart.

        Raises:
            GenerationError: There is no such generation.
            StoreError: It is not whole; the active one stays.
            DiskFullError: The pointer could not be written; the active one stays.
        """
        self.get(number).check()
        write_durably(self._pointer, f"{number}\n".encode())

    def current(self) -> Generation | None:
        """The generation that is active."""
        number = self._pointed()
        return None if number is None else self.get(number)

    def get(self, number: int) -> Generation:
        """A generation by its number.

        Raises:
            GenerationError: There is none, or its manifest is damaged.
        """
        path = self._root / f"{number:06d}"
        try:
            data = (path / _MANIFEST).read_bytes()
            manifest = msgspec.json.decode(data, type=GenerationManifest)
        except FileNotFoundError as error:
            have = ", ".join(str(n) for n in self._numbers()) or "none"
            raise GenerationError(
                f"generation {number} is not on this device; it has {have}"
            ) from error
        except msgspec.DecodeError as error:
            raise GenerationError(f"generation {number} is damaged: {error}") from error
        return Generation(manifest, hashlib.sha256(data).hexdigest(), path, self._blobs)

    def list(self) -> Sequence[Generation]:
        """Every generation that can be read, oldest first."""
        found = []
        for number in self._numbers():
            try:
                found.append(self.get(number))
            except GenerationError:
                continue
        return found

    def previous_of(self, number: int) -> Generation | None:
        """The generation a rollback of this one leads to: its parent, or the next older one."""
        older = {g.number: g for g in self.list() if g.number < number}
        parent = self.get(number).manifest.parent
        if parent in older:
            return older[parent]
        return older[max(older)] if older else None

    def prune(self, protect: Collection[int] = (), protect_blobs: Collection[str] = ()) -> None:
        """Remove old generations and bundles that no generation needs.

        The active one, its parent and the newest ``keep`` stay.

        Args:
            protect: Numbers of generations that stay too.
            protect_blobs: Digests of bundles that stay too.
        """
        generations = self.list()
        current = self.current()
        stay = {g.number for g in generations[-self._keep :]} | set(protect)
        if current is not None:
            stay |= {current.number, current.manifest.parent or current.number}
        for generation in generations:
            if generation.number not in stay:
                # Hidden first: a half-removed directory must never be taken for a generation.
                doomed = self._root / f".new-{generation.number:06d}"
                generation.path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        needed = {d for g in self.list() for d in g.manifest.bundles} | set(protect_blobs)
        for digest in [*self._blobs]:
            if digest not in needed:
                self._blobs.delete(digest)

    def _recover(self) -> str | None:
        pointed = self._pointed()
        if pointed is None and not self._pointer.exists():
            return None
        problem = "the pointer file is unreadable"
        if pointed is not None:
            try:
                self.get(pointed).check()
            except (StoreError, OSError, SafetensorError) as error:
                problem = str(error)
            else:
                return None
        for generation in reversed(self.list()):
            try:
                self.activate(generation.number)
            except (StoreError, OSError):
                continue
            return f"{problem}; generation {generation.number} is used instead"
        raise GenerationError(f"{problem}, and no other generation on this device is whole")

    def _pointed(self) -> int | None:
        try:
            return int(self._pointer.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None

    def _numbers(self) -> Sequence[int]:
        return sorted(int(p.name) for p in self._root.iterdir() if p.name.isdigit())


def _encode(manifest: GenerationManifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
