"""What benchmarks of adapters share: encoder, tasks of ten classes, heads, the machine's facts.

Tasks are the first classes of the CIFAR-100 subset in the order of the published class-incremental
streams. Nothing here trains.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import SET
from edge_agent.decision import GroupsDecision, OwnFeatures
from edge_agent.snapshot import scale_images
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

ORDER_SEED: Final = 1993
CLASSES: Final = 10
WEIGHTS: Final = Path("encoders") / "vit_tiny_patch16_224.safetensors"
_IMAGE_SIZE: Final = 96
_SUFFIX_BLOCKS: Final = 4
_BATCH: Final = 32
_MAX_ROUNDS: Final = 4

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled images.

    Attributes:
        images: uint8 [n, s, s, 3], at the encoder's input size.
        labels: n label names.
    """

    images: NDArray[np.uint8]
    labels: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def targets(self) -> NDArray[np.int64]:
        """Each sample's place in `names`, int64 [n]."""
        return np.unique(np.array(self.labels), return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True, eq=False)
class SplitTask:
    """A task's samples to learn from, and those to be judged by."""

    train: Samples
    test: Samples


def build_package(data: Path, out: Path, families: Sequence[str] = ("bottleneck",)) -> Path:
    """Build ViT-Tiny at 96 px, adapters in its last four blocks, under a new directory."""
    from safetensors.torch import load_file  # noqa: PLC0415 - torch only where it is needed

    from exporter.build import build_vit  # noqa: PLC0415

    build_vit(
        load_file(data / WEIGHTS),
        image_size=_IMAGE_SIZE,
        suffix_blocks=_SUFFIX_BLOCKS,
        name="vit-tiny-96",
        families=families,
        out=out,
    )
    return out


def load_tasks(data: Path, package: EncoderPackage, count: int) -> list[SplitTask]:
    """The first tasks of ten classes each; images are scaled as the daemon scales them."""
    with np.load(data / SET) as file:
        parts = {p: (file[f"x_{p}"], file[f"y_{p}"].astype(np.int64)) for p in ("train", "test")}
    order = np.random.RandomState(ORDER_SEED).permutation(np.unique(parts["train"][1]))

    def samples(part: str, classes: NDArray[np.int64]) -> Samples:
        images, truth = parts[part]
        rows = np.flatnonzero(np.isin(truth, classes))
        scaled = scale_images(images[rows], package.image_size)
        return Samples(scaled, tuple(f"class {number:02d}" for number in truth[rows]))

    chosen = [order[at : at + CLASSES] for at in range(0, count * CLASSES, CLASSES)]
    return [SplitTask(samples("train", part), samples("test", part)) for part in chosen]


def shared_covariance_accuracy(train: Floats, task: SplitTask, test: Floats) -> float:
    """Accuracy on a task's test samples of the Gaussian head of its training samples' features.

    Args:
        train: l2-normalised features of the task's training samples [n, d].
        task: Whose labels they are.
        test: l2-normalised features of its test samples [m, d].
    """
    head = GaussianHead.from_statistics([ClassStatistics.fit(train, task.train.labels)])
    names = np.array([label for _, label in head.components])
    found = names[head.log_likelihoods(test).argmax(axis=1)]
    return float(np.mean(found == np.array(task.test.labels)))


def base_features(package: EncoderPackage, images: NDArray[np.uint8]) -> Floats:
    """Normalised features of all depths without an adapter, float32 [n, feature_dim]."""
    from exporter.sessions import EncoderSessions  # noqa: PLC0415 - its memory is measured

    sessions = EncoderSessions(package, threads=1)
    parts = [
        sessions.suffix(sessions.prefix(prepare(images[at : at + _BATCH], package)))
        for at in range(0, len(images), _BATCH)
    ]
    return l2_normalise(np.concatenate(parts))


def decided_accuracy(
    base: Sequence[ClassStatistics],
    own: Sequence[ClassStatistics | None],
    labels: Sequence[str],
    features: Floats,
    own_features: OwnFeatures,
) -> float:
    """Accuracy of what a device that has these groups installed would answer.

    Args:
        base: Each group's statistics of base features.
        own: Each group's statistics in its adapter's space; None without one.
        labels: The truth, n label names.
        features: Base features of the samples [n, d].
        own_features: As for `Decision.route`.
    """
    decision = GroupsDecision(base, own, max_rounds=_MAX_ROUNDS)
    found = decision.route(features, own_features).label
    return float(np.mean(np.array(decision.labels)[found] == np.array(labels)))


def circumstances(package: EncoderPackage) -> dict[str, Any]:
    """What a result needs to be understood: machine, versions, encoder, seed of the order."""
    libraries = ("numpy", "onnxruntime", "torch")
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
        "encoder": {"name": package.name, "digest": package.digest},
        "order_seed": ORDER_SEED,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model n"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
