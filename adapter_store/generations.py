"""Generations on disk: immutable directories, and one pointer that says which one runs.

A generation is written whole and synced under a hidden name before it becomes visible by one
rename; activation replaces one small file. A power cut at any instant leaves the old or the new
generation active, never something between. Older ones stay, so rollback needs no network.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import logging
import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from adapter_store.blobs import BlobStore, sync_directory, write_durably
from adapter_store.errors import DiskFullError, GenerationError, StoreError
from adapter_store.generation import (
    ALIGNMENT,
    CALIBRATION,
    PREPARED,
    Generation,
    GenerationManifest,
    encode_manifest,
)

_MANIFEST: Final = "manifest.json"
_DIGEST_FILE: Final = "manifest.sha256"
_POINTER_KEPT: Final = 20

log = logging.getLogger(__name__)


class GenerationStore:
    """The generations of one device.

    Opening it removes what a power cut left half written; when the pointer names a generation that
    is not whole, the whole one that ran last is taken (the newest whole one, when it is not known
    what ran) and ``recovered`` says so. Thread-safe.

    Args:
        state_dir: The device's state directory.
        blobs: Where its bundles are.
        keep: How many generations stay besides the active one.
        recover: False where it is only read; then nothing on disk is changed by opening it.

    Attributes:
        recovered: What was wrong when it was opened and what runs instead; None when all was well.
    """

    def __init__(
        self, state_dir: Path, blobs: BlobStore, *, keep: int = 5, recover: bool = True
    ) -> None:
        self._root = state_dir / "generations"
        self._pointer = state_dir / "current"
        self._blobs = blobs
        self._keep = keep
        self._lock = threading.RLock()
        self.recovered: str | None = None
        if not recover:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        for leftover in self._root.glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in state_dir.glob(".current.*.tmp"):
            leftover.unlink(missing_ok=True)
        self.recovered = self._recover()
        if self.recovered is not None:
            log.error("%s", self.recovered)

    def create(
        self,
        manifest: GenerationManifest,
        calibration_features: NDArray[np.float16],
        alignment: Mapping[str, NDArray[Any]] | None = None,
        prepared: bytes = b"",
    ) -> Generation:
        """Write a generation; it is not activated.

        Args:
            manifest: What it consists of; its number is given here.
            calibration_features: Base features [m, d].
            alignment: The arrays of its alignment, by name; None for a generation without one.
            prepared: What was computed from the bundles to start sooner; empty for nothing.

        Raises:
            GenerationError: The calibration features are not a finite [m, d].
            StoreError: A bundle it names is not on this disk.
            DiskFullError: It could not be written; nothing is left of it.
        """
        features = np.ascontiguousarray(calibration_features, dtype="<f2")
        if features.ndim != 2 or not features.size or not np.isfinite(features).all():
            raise GenerationError(
                f"calibration features are {list(features.shape)}, expected finite [m, d]"
            )
        for digest in manifest.bundles:
            self._blobs.get(digest)
        arrays = {ALIGNMENT + name: array for name, array in (alignment or {}).items()}
        manifest = msgspec.structs.replace(manifest, aligned=bool(arrays))
        with self._lock:
            return self._create(manifest, save({"features": features, **arrays}), prepared)

    def _create(
        self, manifest: GenerationManifest, calibration: bytes, prepared: bytes
    ) -> Generation:
        number = max([*self._numbers(), *self._activated()], default=0) + 1
        manifest = msgspec.structs.replace(
            manifest,
            number=number,
            bundles=sorted(set(manifest.bundles)),
            calibration=hashlib.sha256(calibration).hexdigest(),
            prepared=hashlib.sha256(prepared).hexdigest() if prepared else "",
        )
        encoded = encode_manifest(manifest)
        building = self._root / f".new-{number:06d}"
        try:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            write_durably(building / CALIBRATION, calibration)
            if prepared:
                write_durably(building / PREPARED, prepared)
            write_durably(building / _MANIFEST, encoded)
            write_durably(building / _DIGEST_FILE, hashlib.sha256(encoded).hexdigest().encode())
            building.rename(self._root / f"{number:06d}")
            sync_directory(self._root)
        except (OSError, DiskFullError) as error:
            shutil.rmtree(building, ignore_errors=True)
            if isinstance(error, DiskFullError):
                raise
            raise DiskFullError(
                f"cannot write generation {number}: {error.strerror or error}; free some space, "
                "the running generation is untouched"
            ) from error
        return self.get(number)

    def activate(self, number: int) -> None:
        """Make a generation the one that runs, now and after every restart.

        Raises:
            GenerationError: There is no such generation.
            StoreError: It is not whole; the active one stays.
            DiskFullError: The pointer could not be written; the active one stays.
        """
        self.get(number).check()
        with self._lock:
            before = self._activated()
            if before[-1:] == [number]:
                return
            try:
                self._point([*before, number])
            except DiskFullError:
                # The name may have changed although its durability is unknown: what is reported
                # must be what runs, so put the old name back where that is still possible.
                if before and self._activated() != before:
                    with contextlib.suppress(DiskFullError):
                        self._point(before)
                raise

    def current(self) -> Generation | None:
        """The generation that is active.

        Raises:
            GenerationError: It was damaged since the store was opened.
        """
        activated = self._activated()
        return self.get(activated[-1]) if activated else None

    def get(self, number: int) -> Generation:
        """A generation by its number.

        Raises:
            GenerationError: There is none, or its manifest is damaged.
        """
        path = self._root / f"{number:06d}"
        if not path.is_dir():
            have = ", ".join(str(n) for n in self._numbers()) or "none"
            raise GenerationError(f"generation {number} is not on this device; it has {have}")
        try:
            data = (path / _MANIFEST).read_bytes()
            expected = (path / _DIGEST_FILE).read_text(encoding="ascii")
            digest = hashlib.sha256(data).hexdigest()
            if digest != expected:
                raise GenerationError(
                    f"generation {number} is damaged: its manifest is not what was written; "
                    "activate another one"
                )
            manifest = msgspec.json.decode(data, type=GenerationManifest)
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise GenerationError(
                f"generation {number} is damaged ({error}); activate another one"
            ) from error
        return Generation(manifest, digest, path, self._blobs)

    def list(self) -> builtins.list[Generation]:
        """Every generation that can be read, oldest first."""
        found = []
        for number in self._numbers():
            with contextlib.suppress(GenerationError):
                found.append(self.get(number))
        return found

    def previous_of(self, number: int) -> Generation | None:
        """The generation a rollback of this one leads to: its parent, or the next older one.

        Raises:
            GenerationError: There is no generation of that number.
        """
        older = {g.number: g for g in self.list() if g.number < number}
        parent = self.get(number).manifest.parent
        if parent in older:
            return older[parent]
        return older[max(older)] if older else None

    def prune(self, protect: Collection[int] = (), protect_blobs: Collection[str] = ()) -> None:
        """Remove old generations, and bundles that no generation needs.

        The active one, its parent and the newest ``keep`` stay. A bundle put while this runs is
        not protected yet: call it where bundles are installed, or name them.

        Args:
            protect: Numbers of generations that stay too.
            protect_blobs: Digests of bundles that stay too.

        Raises:
            DiskFullError: The disk failed; what was to stay is untouched.
        """
        with self._lock:
            current = self.current()
            numbers = self._numbers()
            stay = {*numbers[max(0, len(numbers) - self._keep) :], *numbers[-1:], *protect}
            if current is not None:
                stay |= {current.number, current.manifest.parent or current.number}
            for number in numbers:
                if number not in stay:
                    self._remove(number)
            needed = {d for g in self.list() for d in g.manifest.bundles} | set(protect_blobs)
            for digest in [*self._blobs]:
                if digest not in needed:
                    self._blobs.delete(digest)

    def _remove(self, number: int) -> None:
        # Hidden first: a half-removed directory must never be taken for a generation.
        doomed = self._root / f".new-{number:06d}"
        try:
            (self._root / f"{number:06d}").rename(doomed)
            sync_directory(self._root)
        except OSError as error:
            raise DiskFullError(
                f"cannot remove generation {number}: {error.strerror or error}"
            ) from error
        shutil.rmtree(doomed, ignore_errors=True)

    def _recover(self) -> str | None:
        activated = self._activated()
        if not activated and not self._pointer.exists():
            return None
        problem = "the pointer to the active generation is unreadable"
        if activated:
            try:
                self.get(activated[-1]).check()
            except StoreError as error:
                problem = f"generation {activated[-1]} cannot run: {error}"
            else:
                return None
        # One that ran before is known to be good; one that was only built may have been refused.
        ran = builtins.list(dict.fromkeys(reversed(activated)))
        for number in [*ran, *(n for n in reversed(self._numbers()) if n not in ran)]:
            try:
                self.get(number).check()
            except StoreError:
                continue
            self._point([*(n for n in activated if n in ran[1:] and n != number), number])
            return f"{problem}; generation {number} is used instead"
        raise GenerationError(
            f"{problem}, and no other generation in {self._root} is whole; restore it from a "
            "backup, or start over with a fresh state directory"
        )

    def _activated(self) -> builtins.list[int]:
        """The numbers activated lately, the active one last; empty when that cannot be read."""
        try:
            return [int(number) for number in self._pointer.read_text(encoding="ascii").split()]
        except (OSError, ValueError):
            return []

    def _point(self, activated: builtins.list[int]) -> None:
        lately = activated[-_POINTER_KEPT:]
        write_durably(self._pointer, (" ".join(str(n) for n in lately) + "\n").encode())

    def _numbers(self) -> builtins.list[int]:
        return sorted(int(p.name) for p in self._root.iterdir() if p.name.isdigit())
