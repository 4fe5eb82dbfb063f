"""Windows of samples of which `benchmarks/kinds.py` asks what has happened.

All shifted or mixed with as many known samples: other classes, another look, other proportions, and
frames of a broken sensor, made here. Nothing here asks or judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.worlds import Floats, Rows, World, Worlds
from ood.frames import FrameFacts, frame_facts
from ood.kinds import Kind
from ood.known import Known
from ood.statistics import ClassStatistics, l2_normalise

SIZES: Final = (64, 256)
MIXES: Final = (1.0, 0.5)
SEVERITIES: Final = (3, 5)
SEED: Final = 20_261
# The share of foreign samples that confirms an alarm.
CONFIRM_SHARE: Final = 0.2
GROUPS: Final = {
    "near": Kind.NEW_CLASSES,
    "far": Kind.NEW_CLASSES,
    "domain": Kind.DOMAIN_SHIFT,
    "corruption": Kind.DOMAIN_SHIFT,
}
_DRAWS: Final = {Kind.NEW_CLASSES: 6, Kind.DOMAIN_SHIFT: 2, Kind.PRIOR_CHANGE: 6}
_FAULT_DRAWS: Final = 3
Images = NDArray[np.uint8]
Facts = Sequence[FrameFacts]


@dataclass(frozen=True, eq=False)
class Window:
    """What the agent would be asked about."""

    truth: Kind
    group: str
    foreign: str
    size: int
    mix: float
    features: Floats
    frames: Facts


def frozen(images: Images, rng: np.random.Generator) -> Images:
    """The sensor gives one frame for ever."""
    return np.repeat(images[rng.integers(len(images))][None], len(images), axis=0)


def black(images: Images, rng: np.random.Generator) -> Images:
    """Next to no light: a fiftieth of it, and noise of two levels."""
    noise = rng.normal(0, 2, images.shape)
    return np.clip(images * 0.02 + noise, 0, 255).astype(np.uint8)


def saturated(images: Images, rng: np.random.Generator) -> Images:
    """Sixteen times too much light, and noise of two levels."""
    lit = (images.astype(np.float64) + 16.0) * 16.0 + rng.normal(0, 2, images.shape)
    return np.clip(lit, 0, 255).astype(np.uint8)


def half_dead(images: Images, rng: np.random.Generator) -> Images:
    """One half of the sensor, one of four, gives nothing."""
    result, side = images.copy(), images.shape[1] // 2
    halves = (np.s_[:, :side], np.s_[:, side:], np.s_[:, :, :side], np.s_[:, :, side:])
    result[halves[rng.integers(4)]] = 0
    return result


FAULTS: Final[dict[str, Callable[[Images, np.random.Generator], Images]]] = {
    "frozen": frozen,
    "black": black,
    "saturated": saturated,
    "half dead": half_dead,
}


class WorldWindows:
    """One world's windows, from the benchmark's features and the facts of its frames.

    Args:
        worlds: All worlds under one encoder.
        world: The one.
        cache: Where facts of frames are kept.
    """

    def __init__(self, worlds: Worlds, world: World, cache: Path) -> None:
        self.worlds, self.world = worlds, world
        self._cache = cache / "frames-2" / worlds.package.digest[:16]
        calibration = self._facts("calibration", self._of(world.calibration.rows))
        self.known = Known(
            [ClassStatistics.fit(l2_normalise(world.fit.features), world.fit.labels)],
            l2_normalise(world.calibration.features),
            calibration,
        )
        self.features = l2_normalise(world.test.features)
        self.frames = self._facts("test", self._of(world.test.rows))
        self._rng = np.random.default_rng([SEED, len(world.name), len(self.features)])

    def windows(self) -> Iterator[Window]:
        """Everything, in an order that is always the same."""
        for pair in self.worlds.pairs():
            if pair.known == self.world.name:
                frames = self._facts(f"{pair.group}-{pair.foreign}", pair.images)
                yield from self._of_pair(
                    GROUPS[pair.group], pair.group, pair.foreign, pair.features, frames
                )
        yield from self._other_proportions()
        for name, broken in FAULTS.items():
            yield from self._faults(name, broken)

    def _of_pair(
        self, truth: Kind, group: str, foreign: str, raw: Floats, frames: Facts
    ) -> Iterator[Window]:
        features = l2_normalise(raw)
        for size, mix, _ in _settings(_DRAWS[truth]):
            taken = self._rng.permutation(len(features))[: round(size * mix)]
            window = features[taken], [frames[k] for k in taken]
            yield self._mixed(truth, group, foreign, size, mix, window)

    def _other_proportions(self) -> Iterator[Window]:
        labels = np.array(self.world.test.labels)
        names = sorted(set(self.world.test.labels))
        for size, mix, _ in _settings(_DRAWS[Kind.PRIOR_CHANGE]):
            few = self._rng.choice(names, max(1, len(names) // 5), replace=False)
            pool = self._rng.permutation(np.flatnonzero(np.isin(labels, few)))
            taken = pool[: round(size * mix)]
            window = self.features[taken], [self.frames[k] for k in taken]
            foreign = "a fifth of the classes"
            yield self._mixed(Kind.PRIOR_CHANGE, "prior", foreign, size, mix, window, taken)

    def _faults(self, name: str, broken: Callable[..., Images]) -> Iterator[Window]:
        for size, mix, _ in _settings(_FAULT_DRAWS):
            taken = self._rng.permutation(len(self.features))[: round(size * mix)]
            images = broken(
                self.worlds.images(self.world.name, self.world.test.rows[taken]), self._rng
            )
            if name == "frozen":
                one = l2_normalise(self.worlds.encoded(images[:1]))
                features = np.repeat(one, len(images), axis=0)
            else:
                features = l2_normalise(self.worlds.encoded(images))
            window = features, frame_facts(images)
            yield self._mixed(Kind.SENSOR_FAULT, "fault", name, size, mix, window, taken)

    def _mixed(  # noqa: PLR0917 - in the order of a window's fields
        self,
        truth: Kind,
        group: str,
        foreign: str,
        size: int,
        mix: float,
        shifted: tuple[Floats, Facts],
        taken: Rows | None = None,
    ) -> Window:
        """Shifted samples among as many known ones as the mixture has, shuffled."""
        features, frames = shifted
        rest = np.arange(len(self.features))
        if taken is not None:
            rest = np.setdiff1d(rest, taken)
        known = self._rng.permutation(rest)[: round(len(features) / mix) - len(features)]
        order = self._rng.permutation(len(features) + len(known))
        both = np.concatenate([features, self.features[known]])[order]
        facts = [*frames, *(self.frames[k] for k in known)]
        return Window(truth, group, foreign, size, mix, both, [facts[k] for k in order])

    def _of(self, rows: Rows) -> Callable[[], Images]:
        return lambda: self.worlds.images(self.world.name, rows)

    def _facts(self, key: str, images: Callable[[], Images]) -> Facts:
        path = self._cache / f"{self.world.name}-{key.replace(' ', '-')}.facts"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = [facts.to_bytes() for facts in frame_facts(images())]
            path.write_bytes(msgspec.json.encode(found))
        kept = msgspec.json.decode(path.read_bytes(), type=list[bytes])
        return [FrameFacts.from_bytes(data) for data in kept]


def _settings(draws: int) -> Iterator[tuple[int, float, int]]:
    for size in SIZES:
        for mix in MIXES:
            for draw in range(draws):
                yield size, mix, draw
