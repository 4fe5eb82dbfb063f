"""Small bundles, and a disk that fails at a chosen write."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_store.bundle import Bundle, EncoderInterface, Manifest
from adapter_store.state import StateDir
from ood.signature import signature
from ood.statistics import ClassStatistics, l2_normalise

ENCODER = "e" * 64
DIM = 6
SITES = ("blocks.0.mlp", "blocks.1.mlp")


def example_bundle(
    labels: tuple[str, ...] = ("cat", "dog"),
    *,
    family: str = "frozen",
    rank: int = 2,
    seed: int = 0,
) -> Bundle:
    """A bundle over 6-dimensional features; with an adapter unless it is frozen."""
    rng = np.random.default_rng(seed)
    features = l2_normalise(rng.normal(size=(8 * len(labels), DIM)))
    names = list(labels) * 8
    base = ClassStatistics.fit(features, names)
    frozen = family == "frozen"
    tensors = {
        f"{site}/{name}": rng.normal(size=shape).astype(np.float32)
        for site in SITES
        for name, shape in (("down", (rank, DIM)), ("up", (DIM, rank)))
    }
    manifest = Manifest(
        encoder=ENCODER,
        family=family,
        rank=0 if frozen else rank,
        sites=() if frozen else SITES,
        labels=base.labels,
        task="animals",
        created_at=1.5,
        created_by="device-a",
        samples=base.samples,
        metrics={"accuracy": 0.9},
        score_quantiles=tuple(np.linspace(0.0, 9.0, 101).tolist()),
    )
    own = l2_normalise(rng.normal(size=features.shape))
    return Bundle(
        manifest=manifest,
        tensors={} if frozen else tensors,
        base=base,
        own=base if frozen else ClassStatistics.fit(own, names),
        signature=signature(features, seed=ENCODER),
    )


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Bundle]:
    return example_bundle


@pytest.fixture(scope="session")
def interface() -> EncoderInterface:
    shapes: dict[str, tuple[int | str, ...]] = {}
    for site in SITES:
        shapes |= {f"{site}/down": ("rank", DIM), f"{site}/up": (DIM, "rank")}
    return EncoderInterface(
        digest=ENCODER, feature_dim=DIM, sites=SITES, families={"bottleneck": shapes}
    )


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    with StateDir(tmp_path / "state") as opened:
        yield opened


class FailingDisk:
    """Fails one step of writing: making a directory, writing, syncing or renaming.

    Every file system call that `adapter_store` writes with is patched; the step is counted from 1.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left: int | None = None
        self._code = errno.ENOSPC
        self.failed = False
        for owner, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "mkdir"),
        ):
            monkeypatch.setattr(owner, name, self._step(getattr(owner, name)))
        real_open = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real_open(path, mode, *args, **kwargs)
            if "w" in mode and self._due():
                file.write(b"half"[: len(mode)] if "b" in mode else "half")
                file.close()
                raise OSError(self._code, os.strerror(self._code))
            return file

        monkeypatch.setattr(Path, "open", opened)

    @contextmanager
    def failing(self, step: int, code: int = errno.ENOSPC) -> Iterator[None]:
        """Fail the given step from here on, once."""
        self._left, self._code, self.failed = step, code, False
        try:
            yield
        finally:
            self._left = None

    def _step(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if self._due():
                raise OSError(self._code, os.strerror(self._code))
            return real(*args, **kwargs)

        return stepped

    def _due(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        if self._left == 0:
            self._left, self.failed = None, True
            return True
        return False


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    return FailingDisk(monkeypatch)


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Everything in a directory: relative path to bytes."""

    def read(root: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return read
