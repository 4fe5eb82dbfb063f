"""One training in a process of its own, measured: the ordinary way, or the daemon's.

`benchmarks.training_cost` starts it, `python -m benchmarks.training_ways`, with a job on its
standard input; what it found comes on its standard output. It compares nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.tasks import (
    Floats,
    Samples,
    SplitTask,
    base_features,
    decided_accuracy,
    shared_covariance_accuracy,
)
from edge_agent.decision import OwnFeatures
from exporter.package import PREFIX_KEY, SUFFIX_KEY, EncoderPackage
from exporter.preprocess import prepare
from ood.statistics import ClassStatistics, l2_normalise

if TYPE_CHECKING:
    from torch import Tensor

RANK: Final = 16
_BATCH: Final = 32  # as the daemon encodes
_MB: Final = 2**20


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A way to train.

    Attributes:
        name: What it is called in the report.
        blocks: Where the adapters are: in every block, or in the encoder's last ones.
        precision: Of the encoder's pass.
        micro_batch: Samples of a step run at once; None for all of them.
    """

    name: str
    blocks: Literal["all", "last"]
    precision: Literal["float32", "bfloat16"]
    micro_batch: int | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to do: train one variant on one task, written by `_write_task`."""

    variant: Variant
    encoder: str
    task: str
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    judged: bool


class Measured(msgspec.Struct, kw_only=True):
    """What a process found.

    Attributes:
        load_s: Processor seconds to load the encoder.
        before_s: Of what comes before the first step: the pass that the head's rows are computed
            from, and with it whatever is cached.
        cpu_s: Until the end of each epoch, `before_s` included.
        wall_s: The same by the clock on the wall.
        frozen_accuracy: Without an adapter.
        accuracy: After each epoch; empty when it was not asked for.
        decided_accuracy: The same, as the daemon decides.
        imports_mb: Resident once everything is imported and the images are there.
        loading_mb: By how much that grew while the encoder was loaded.
        peak_mb: The most that was ever resident, judging left out.
    """

    load_s: float
    before_s: float
    cpu_s: list[float]
    wall_s: list[float]
    frozen_accuracy: float | None
    accuracy: list[float]
    decided_accuracy: list[float]
    imports_mb: float
    loading_mb: float
    peak_mb: float


class Way(Protocol):
    """A way to train, with the encoder loaded as far as `encode` needs it."""

    def encode(self, images: NDArray[np.uint8]) -> tuple[Any, Floats]:
        """Rows to train on, and the network's own normalised output for each image [n, d]."""

    def load_training(self) -> None:
        """Load what only training needs."""

    def program(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Rows and an adapter to features [n, d], differentiable."""

    def fresh(self, seed: int) -> dict[str, Floats]:
        """A new adapter."""

    def features(self, rows: Any, count: int, tensors: Mapping[str, Floats]) -> Floats:
        """The network's own normalised output with an adapter [count, d]."""


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Images that are normalised as they are asked for, as a data loader does it."""

    images: NDArray[np.uint8]
    package: EncoderPackage

    def __getitem__(self, rows: NDArray[np.int64]) -> Floats:
        return prepare(self.images[rows], self.package)


class AllBlocks:
    """The whole network in every step, a bottleneck adapter in each of its blocks."""

    def __init__(self, package: EncoderPackage) -> None:
        import torch  # noqa: PLC0415 - each process imports what its variant needs

        from exporter.families import adapter_family, initial_tensors  # noqa: PLC0415
        from exporter.programs import AdaptedSuffix  # noqa: PLC0415
        from exporter.vit import vit_from_state_dict, vit_sites  # noqa: PLC0415

        state = {
            name.removeprefix(key): torch.from_numpy(value)
            for key in (PREFIX_KEY, SUFFIX_KEY)
            for name, value in package.weights(key).items()
        }
        vit = vit_from_state_dict(state, image_size=package.image_size)
        sites = vit_sites(vit, vit.depth)
        family = adapter_family("bottleneck")
        self._package = package
        self._network = AdaptedSuffix(vit.requires_grad_(requires_grad=False), family, sites)
        self._initial: Callable[[int], dict[str, Floats]] = lambda seed: initial_tensors(
            family, sites, RANK, seed
        )

    def encode(self, images: NDArray[np.uint8]) -> tuple[ImageRows, Floats]:
        """As `Way.encode`; nothing is cached."""
        rows = ImageRows(images, self._package)
        return rows, self.features(rows, len(images), self.fresh(0))

    def load_training(self) -> None:
        """Nothing: the network is the one that encoded."""

    def program(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """As `Way.program`."""
        features: Tensor = self._network(rows, *(tensors[name] for name in self._network.tensors))
        return features

    def fresh(self, seed: int) -> dict[str, Floats]:
        """As `Way.fresh`."""
        return self._initial(seed)

    def features(self, rows: Any, count: int, tensors: Mapping[str, Floats]) -> Floats:
        """As `Way.features`."""
        import torch  # noqa: PLC0415

        given = {name: torch.from_numpy(value) for name, value in tensors.items()}
        with torch.no_grad():
            parts = [
                self.program(torch.from_numpy(rows[part]), given).numpy()
                for part in _batches(count)
            ]
        return l2_normalise(np.concatenate(parts))


class LastBlocks:
    """The daemon's way: ONNX Runtime runs the prefix once, torch trains the suffix."""

    def __init__(self, package: EncoderPackage) -> None:
        from exporter.families import adapter_family, initial_tensors  # noqa: PLC0415
        from exporter.sessions import EncoderSessions  # noqa: PLC0415

        self._sessions = EncoderSessions(package, threads=1)
        family = adapter_family("bottleneck")
        self._initial: Callable[[int], dict[str, Floats]] = lambda seed: initial_tensors(
            family, package.manifest.sites, RANK, seed
        )

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float16], Floats]:
        """As `Way.encode`; the rows are the prefix's activations."""
        package = self._sessions.package
        hidden = np.empty((len(images), *package.hidden_shape), np.float16)
        outputs = []
        for part in _batches(len(images)):
            activations = self._sessions.prefix(prepare(images[part], package))
            hidden[part] = activations
            outputs.append(self._sessions.suffix(activations)[:, : package.network_dim])
        return hidden, l2_normalise(np.concatenate(outputs))

    def load_training(self) -> None:
        """Load the program that gives gradients."""
        from exporter.programs import load_training_program  # noqa: PLC0415

        self._program = load_training_program(self._sessions.package, "bottleneck")

    def program(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """As `Way.program`."""
        features: Tensor = self._program(rows, tensors)
        return features

    def fresh(self, seed: int) -> dict[str, Floats]:
        """As `Way.fresh`."""
        return self._initial(seed)

    def features(self, rows: Any, count: int, tensors: Mapping[str, Floats]) -> Floats:
        """As `Way.features`."""
        width = self._sessions.package.network_dim
        parts = [
            self._sessions.suffix(rows[part].astype(np.float32), tensors, "bottleneck")[:, :width]
            for part in _batches(count)
        ]
        return l2_normalise(np.concatenate(parts))


@dataclass
class Clock:
    """Seconds of training at each of several moments, and what loading took besides."""

    cpu: float = field(default_factory=time.process_time)
    wall: float = field(default_factory=time.perf_counter)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    load_s: float = 0.0
    loading_mb: float = 0.0

    def lap(self) -> None:
        """Note the present moment."""
        self.cpu_s.append(round(time.process_time() - self.cpu, 3))
        self.wall_s.append(round(time.perf_counter() - self.wall, 3))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Keep what is done inside apart."""
        cpu, wall, size = time.process_time(), time.perf_counter(), _status_mb("VmRSS")
        yield
        spent = time.process_time() - cpu
        self.cpu, self.wall = self.cpu + spent, self.wall + time.perf_counter() - wall
        self.load_s += spent
        self.loading_mb += _status_mb("VmRSS") - size


def work(job: Job) -> Measured:
    """Train one variant on one task in this process, and judge every epoch's adapter."""
    import torch  # noqa: PLC0415

    from edge_agent.objectives import CosineHead  # noqa: PLC0415
    from edge_agent.trainer_loop import Recipe, train  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    package = EncoderPackage.load(Path(job.encoder))
    task = _read_task(Path(job.task))
    imports_mb = _status_mb("VmRSS")
    kept: list[dict[str, Floats]] = []
    clock = Clock()
    with clock.loading():
        way: Way = AllBlocks(package) if job.variant.blocks == "all" else LastBlocks(package)
    rows, output = way.encode(task.train.images)
    targets = task.train.targets
    head = np.stack([output[targets == k].mean(axis=0) for k in range(len(task.train.names))])
    clock.lap()
    with clock.loading():
        way.load_training()

    def epoch_ended(_: object, tensors: Mapping[str, Tensor]) -> bool:
        clock.lap()
        kept.append({name: tensor.detach().numpy().copy() for name, tensor in tensors.items()})
        return False

    with tempfile.TemporaryDirectory() as folder:
        train(
            way.program,
            rows,
            targets,
            way.fresh(job.seed),
            CosineHead(head),
            recipe=Recipe(
                epochs=job.epochs,
                batch_size=job.batch_size,
                learning_rate=job.learning_rate,
                seed=job.seed,
                precision=job.variant.precision,
                micro_batch=job.variant.micro_batch,
            ),
            checkpoint=Path(folder) / "checkpoint",
            report=lambda _: None,
            should_stop=epoch_ended,
        )
    peak_mb = _status_mb("VmHWM")
    judged = _judged(way, task, rows, kept, package) if job.judged else []
    return Measured(
        load_s=clock.load_s,
        before_s=clock.cpu_s[0],
        cpu_s=clock.cpu_s[1:],
        wall_s=clock.wall_s[1:],
        frozen_accuracy=judged[0][0] if judged else None,
        accuracy=[network for network, _ in judged[1:]],
        decided_accuracy=[decided for _, decided in judged[1:]],
        imports_mb=imports_mb,
        loading_mb=clock.loading_mb,
        peak_mb=peak_mb,
    )


def _judged(
    way: Way,
    task: SplitTask,
    rows: Any,
    adapters: Sequence[dict[str, Floats]],
    package: EncoderPackage,
) -> list[tuple[float, float]]:
    """Accuracy by the network's own output and as the daemon decides, a fresh adapter's first."""
    unseen, _ = way.encode(task.test.images)
    base, base_of_test = (base_features(package, part.images) for part in (task.train, task.test))
    result = []
    for tensors in (way.fresh(0), *adapters):
        own = way.features(rows, len(task.train.labels), tensors)
        own_of_test = way.features(unseen, len(task.test.labels), tensors)
        result.append(
            (
                shared_covariance_accuracy(own, task, own_of_test),
                decided_accuracy(
                    [ClassStatistics.fit(base, task.train.labels)],
                    [ClassStatistics.fit(own, task.train.labels)],
                    task.test.labels,
                    base_of_test,
                    _rows_of(own_of_test),
                ),
            )
        )
    return result


def _rows_of(own: Floats) -> OwnFeatures:
    return lambda _, rows: own[rows]


def _batches(count: int) -> list[slice]:
    return [slice(at, min(at + _BATCH, count)) for at in range(0, count, _BATCH)]


def _status_mb(key: str) -> float:
    """A size in /proc/self/status, which Linux alone has."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return round(int(next(x for x in lines if x.startswith(f"{key}:")).split()[1]) * 1024 / _MB, 1)


def write_task(path: Path, task: SplitTask) -> Path:
    """Save a task's two parts in one file, for the measuring processes to read."""
    parts = {
        f"{name}_{kind}": value
        for name, part in (("train", task.train), ("test", task.test))
        for kind, value in (("images", part.images), ("labels", np.array(part.labels)))
    }
    np.savez(path, allow_pickle=False, **parts)
    return path


def _read_task(path: Path) -> SplitTask:
    with np.load(path) as file:
        train, test = (
            Samples(file[f"{part}_images"], tuple(map(str, file[f"{part}_labels"])))
            for part in ("train", "test")
        )
    return SplitTask(train, test)


if __name__ == "__main__":
    found = work(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    sys.stdout.buffer.write(msgspec.json.encode(found))
