"""The published suite: which sets, which streams, which encoder; nothing tuned to any of them.

`driftkeel bench suite` and `make bench-cil` run it. Sets are found under one directory; the encoder
is built once from its weights into the cache.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import exporter
from edge_agent.bench.streams import StreamSettings
from edge_agent.errors import BenchmarkError
from exporter.errors import EncoderError
from exporter.package import BaseFeatures, EncoderPackage

WEIGHTS: Final = Path("encoders") / "vit_tiny_patch16_224.safetensors"
IMAGE_SIZE: Final = 96
SUFFIX_BLOCKS: Final = 4
STRATEGIES: Final = ("frozen", "ridge", "mos", "lae", "ear", "driftkeel", "joint")
_ORDER_SEED: Final = 1993
_SHOTS: Final = 10


@dataclass(frozen=True)
class Suite:
    """One stream of the suite.

    Attributes:
        name: Its name in files and on command lines.
        title: Its name in tables.
        file: The set, under the directory of sets.
        stream: The stream, of seed 0.
        domain_key: Where domains come from.
    """

    name: str
    title: str
    file: str
    stream: StreamSettings
    domain_key: str | None = None

    def settings(self, seed: int) -> StreamSettings:
        """The stream of a seed.

        The seed decides the split of sets that come in one part, who the shots are, and training.
        Class orders are ``RandomState(1993 + seed)``, so seed 0 has the published one; the order
        of domains stays.
        """
        return replace(self.stream, seed=seed, order_seed=_ORDER_SEED + seed)


_FULL: Final = (
    Suite(
        "cifar100",
        "CIFAR-100 subset, 10 tasks of 10 classes",
        "cifar100-small.npz",
        StreamSettings(kind="class", init=10, increment=10),
    ),
    Suite(
        "grocery",
        "Grocery, 9 tasks of 9 classes",
        "grocery-112.npz",
        StreamSettings(kind="class", init=9, increment=9),
    ),
    Suite(
        "pacs",
        "PACS, photo → art → cartoon → sketch",
        "pacs-112.npz",
        StreamSettings(kind="domain", domain_order=("photo", "art_painting", "cartoon", "sketch")),
        "domain",
    ),
    Suite(
        "fsdd",
        "Spoken digits, 6 speakers one after another",
        "fsdd.npz",
        StreamSettings(
            kind="domain",
            domain_order=("george", "jackson", "lucas", "nicolas", "theo", "yweweler"),
        ),
        "speaker",
    ),
    Suite(
        "cwru",
        "Bearing vibration, motor loads 0 to 3 hp",
        "cwru-12k-de.npz",
        StreamSettings(kind="domain", domain_order=("0", "1", "2", "3")),
        "load_hp",
    ),
)
SUITES: Final = {
    suite.name: suite
    for full in _FULL
    for suite in (
        full,
        replace(
            full,
            name=f"{full.name}-{_SHOTS}shot",
            title=f"{full.title}, {_SHOTS} samples a class",
            stream=replace(full.stream, shots=_SHOTS),
        ),
    )
}


def set_file(suite: Suite, data: Path) -> Path:
    """Where a suite's set lies: in DIR/data or in DIR itself.

    Raises:
        BenchmarkError: In neither.
    """
    for path in (data / "data" / suite.file, data / suite.file):
        if path.exists():
            return path
    raise BenchmarkError(
        f"{suite.file} is neither in {data / 'data'} nor in {data}; benchmarks/README.md says "
        "where it comes from"
    )


def suite_encoder(
    data: Path,
    cache: Path,
    *,
    image_size: int = IMAGE_SIZE,
    base_features: BaseFeatures = "whole",
    progress: Callable[[str], None] = lambda _: None,
) -> EncoderPackage:
    """The suite's encoder: ViT-Tiny at 96 px, the last 4 blocks for adapters; built once.

    It is built anew when the weights or the exporter's code have changed.

    Args:
        data: The directory with the weights.
        cache: Where it is kept.
        image_size: Side of the input, for measurements of other sizes.
        base_features: Whether base features are the whole encoder's or the prefix's alone.
        progress: Told each step as it begins.

    Raises:
        BenchmarkError: The weights are missing.
        EncoderError: They are not what they should be.
    """
    weights = data / WEIGHTS
    if not weights.exists():
        raise BenchmarkError(
            f"{weights} is missing; give the encoder with --encoder DIR, or the directory that has "
            f"{WEIGHTS} with --data (benchmarks/README.md says where it comes from)"
        )
    name = f"vit-tiny-{image_size}px" + ("-prefix" if base_features == "prefix" else "")
    folder = cache / "encoders" / f"{name}-{_built_from(weights)}"
    if folder.exists():
        try:
            return EncoderPackage.load(folder)
        except EncoderError as error:
            progress(f"building again: {error}")
            shutil.rmtree(folder)
    from safetensors.torch import load_file  # noqa: PLC0415 - torch only where it is built

    from exporter.build import build_vit  # noqa: PLC0415

    folder.parent.mkdir(parents=True, exist_ok=True)
    return build_vit(
        load_file(weights),
        image_size=image_size,
        suffix_blocks=SUFFIX_BLOCKS,
        name=name,
        base_features=base_features,
        out=folder,
        progress=progress,
    )


def _built_from(weights: Path) -> str:
    """A digest of the weights, the exporter's code and torch, which writes the programs."""
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(version("torch").encode())
    for file in sorted(Path(exporter.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
