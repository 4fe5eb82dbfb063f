"""The weights of `ood.kinds`: fitted on known worlds that `benchmarks/kinds.py` does not judge by.

Each world knows some classes of one set, in one of its domains; foreign are its other classes,
other sets (both new classes), its other domains and corrupted samples (both a new look). Each
window's measures are weighed by ridge logistic regression: each world as much as any other, and in
it both kinds alike. How well that carries over is measured by leaving out each world together with
all that is corrupted alike or comes from the same set. Prints what `ood/kinds.py` has.

    python -m benchmarks.kind_weights --data DIR [--cache DIR]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.command import arguments, parsed, write
from benchmarks.corruptions import CORRUPTIONS, corrupted
from benchmarks.kind_windows import CONFIRM_SHARE, MIXES, SEVERITIES, SIZES, Facts
from benchmarks.worlds import Floats, Rows, Worlds, encoder
from edge_agent.bench import datasets
from ood.frames import frame_facts
from ood.known import Known
from ood.measures import FEATURE_MEASURES, LOOK_MEASURES, measures
from ood.statistics import ClassStatistics, l2_normalise

MEASURES: Final = FEATURE_MEASURES + LOOK_MEASURES
# Of 0.001 to 0.1 the least logarithmic loss in the folds of `carried_over`.
RIDGE: Final = 0.01
# Each measure enters with at most so many standard deviations, as in `ood.kinds`.
LIMIT: Final = 3.0
_MOST, _FIT, _CALIBRATE = 2400, 0.6, 0.15
_FOREIGN, _LEAST, _CORRUPTED = 300, 40, 140
_DRAWS: Final = 4
# A window of another domain is rarer than one of a corruption.
_DOMAIN_WEIGHT: Final = 3.0


@dataclass(frozen=True)
class _Choice:
    """A known world: classes of a set, one of its domains, and what is far from it."""

    file: str
    classes: int
    far: tuple[str, ...]
    domain_key: str | None = None
    domains: tuple[str, ...] = ()


_CIFAR, _PACS, _MNIST = "cifar100-small", "pacs-112", "mnist-small"
_GROCERY, _TINY = "grocery-112", "tiny-imagenet-pretrain-jpeg"
_CHOICES: Final = {
    "tiny50": _Choice(_TINY, 50, (_MNIST, "pacs-112:photo")),
    "grocery40": _Choice(_GROCERY, 40, (_MNIST, _CIFAR)),
    "mnist7": _Choice(_MNIST, 7, (_GROCERY, _CIFAR, "fsdd")),
    "art5": _Choice(_PACS, 5, (_GROCERY, _CIFAR), "domain", ("art_painting",)),
    "cartoon5": _Choice(_PACS, 5, (_MNIST, _TINY), "domain", ("cartoon",)),
    "sketch5": _Choice(_PACS, 5, (_MNIST, _GROCERY), "domain", ("sketch",)),
    "fsdd7": _Choice("fsdd", 7, ("cwru-12k-de",), "speaker", ("theo", "yweweler", "nicolas")),
    "cwru10": _Choice("cwru-12k-de", 10, ("fsdd",), "load_hp", ("1",)),
}
_CHOSEN: Final = {
    "vit-tiny": tuple(_CHOICES),
    "mobilenet": ("tiny50", "grocery40", "mnist7", "art5", "cartoon5"),
}
_FAMILIES: Final = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness", "contrast"),
    "digital": ("elastic_transform", "pixelate", "jpeg_compression"),
}
_FAMILY: Final = {kind: family for family, kinds in _FAMILIES.items() for kind in kinds}


class Row(msgspec.Struct, frozen=True):
    """One window: where it is from, whether its classes are new, and its measures."""

    encoder: str
    world: str
    group: str
    family: str
    new: bool
    values: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Samples:
    features: Floats
    labels: tuple[str, ...]
    frames: Facts


class _Builder:
    """One world's windows under one encoder."""

    def __init__(self, worlds: Worlds, data: Path, name: str) -> None:
        self._worlds, self._data, self._choice = worlds, data / "data", _CHOICES[name]
        self._sets: dict[str, datasets.LabelledSet] = {}
        found = self._set(self._choice.file)
        order = np.random.default_rng(11).permutation(len(found.classes.names))
        self._known = np.isin(found.classes.index, order[: self._choice.classes])
        self._here = self._in_domains(found)
        rows = np.random.default_rng(12).permutation(np.flatnonzero(self._known & self._here))
        fit, held, self._test_rows = np.split(
            rows[:_MOST],
            [round(part * min(len(rows), _MOST)) for part in (_FIT, _FIT + _CALIBRATE)],
        )
        fitted, calibration = (self._samples(self._choice.file, which) for which in (fit, held))
        self._test = self._samples(self._choice.file, self._test_rows)
        self.known = Known(
            [ClassStatistics.fit(fitted.features, fitted.labels)],
            calibration.features,
            calibration.frames,
        )

    def windows(self) -> Iterator[tuple[str, str, bool, Floats, Facts]]:
        """Group, family, whether the classes are new, features and frames."""
        rng = np.random.default_rng(5)
        for group, family, foreign in self._pairs():
            draws = 1 if group == "corruption" else _DRAWS
            for size, mix in [(s, m) for s in SIZES for m in MIXES for _ in range(draws)]:
                taken = rng.permutation(len(foreign.features))[: round(size * mix)]
                rest = rng.permutation(len(self._test.features))
                rest = rest[: round(len(taken) / mix) - len(taken)]
                features = np.concatenate([foreign.features[taken], self._test.features[rest]])
                frames = [foreign.frames[k] for k in taken] + [self._test.frames[k] for k in rest]
                yield group, family, group in {"near", "far"}, features, frames

    def _pairs(self) -> Iterator[tuple[str, str, _Samples]]:
        file, key = self._choice.file, self._choice.domain_key
        found = self._set(file)
        candidates = [("near", "", file, ~self._known & self._here)]
        if key is not None:
            domain = found.domain(key)
            candidates += [
                ("domain", "", file, self._known & (domain.index == place))
                for place, value in enumerate(domain.names)
                if value not in self._choice.domains
            ]
        for far in self._choice.far:
            other, _, value = far.partition(":")
            everything = np.ones(len(self._set(other)), np.bool_)
            if value:
                domain = self._set(other).domain("domain")
                everything = domain.index == domain.names.index(value)
            candidates.append(("far", far, other, everything))
        for group, family, source, which in candidates:
            rows = np.random.default_rng(3).permutation(np.flatnonzero(which))[:_FOREIGN]
            if len(rows) >= _LEAST:
                yield group, family, self._samples(source, rows)
        clean = self._read(file, self._test_rows[:_CORRUPTED])
        for kind in CORRUPTIONS:
            for severity in SEVERITIES:
                images = corrupted(clean, kind, severity)
                yield "corruption", _FAMILY[kind], self._of_images(images)

    def _set(self, file: str) -> datasets.LabelledSet:
        if file not in self._sets:
            self._sets[file] = datasets.load(self._data / f"{file}.npz")
        return self._sets[file]

    def _in_domains(self, found: datasets.LabelledSet) -> NDArray[np.bool_]:
        if self._choice.domain_key is None:
            return np.ones(len(found), np.bool_)
        domain = found.domain(self._choice.domain_key)
        wanted = [domain.names.index(value) for value in self._choice.domains]
        return np.asarray(np.isin(domain.index, wanted), np.bool_)

    def _read(self, file: str, rows: Rows) -> NDArray[np.uint8]:
        return self._set(file).read(rows, self._worlds.package.image_size)

    def _samples(self, file: str, rows: Rows) -> _Samples:
        classes = self._set(file).classes
        labels = tuple(classes.names[k] for k in classes.index[rows])
        return self._of_images(self._read(file, rows), labels)

    def _of_images(self, images: NDArray[np.uint8], labels: tuple[str, ...] = ()) -> _Samples:
        return _Samples(l2_normalise(self._worlds.encoded(images)), labels, frame_facts(images))


def measured(name: str, data: Path, cache: Path, progress: Callable[[str], None]) -> list[Row]:
    """The measures of every window of one encoder's worlds that would confirm an alarm."""
    worlds, rows = Worlds(encoder(name, data, cache), data, cache), []
    for world in _CHOSEN[name]:
        path = cache / "kind-weights" / worlds.package.digest[:16] / f"{world}.json"
        if not path.exists():
            built, found = _Builder(worlds, data, world), []
            for group, family, new, features, frames in built.windows():
                values = measures(features, built.known, frames)
                if values["foreign"] >= CONFIRM_SHARE:
                    found.append(Row(name, world, group, family, new, values))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(found))
            progress(f"{name} {world}: {len(found)} windows")
        rows += msgspec.json.decode(path.read_bytes(), type=list[Row])
    return rows


@dataclass(frozen=True, eq=False)
class Fit:
    """A logistic function of measures: weights, what is subtracted, what is divided by, bias."""

    weights: Floats
    centres: Floats
    units: Floats
    bias: float

    @classmethod
    def of(cls, values: Floats, new: NDArray[np.bool_], shares: Floats) -> Fit:
        """Ridge logistic regression by Newton's method (Hastie et al., 2009, section 4.4.1)."""
        shares = shares / shares.sum()
        centres = shares @ values
        units = np.sqrt(shares @ np.square(values - centres)) + 1e-6
        inputs = np.hstack([_limited(values, centres, units), np.ones((len(values), 1))])
        penalty = np.diag([*np.full(values.shape[1], RIDGE), 1e-6])
        found = np.zeros(inputs.shape[1])
        for _ in range(60):
            chance = 1.0 / (1.0 + np.exp(-np.clip(inputs @ found, -30.0, 30.0)))
            slope = inputs.T @ (shares * (chance - new)) + penalty @ found
            bend = (inputs.T * (shares * chance * (1.0 - chance))) @ inputs + penalty
            found -= np.linalg.solve(bend, slope)
        return cls(found[:-1], centres, units, float(found[-1]))

    def __call__(self, values: Floats) -> Floats:
        """The logits, [n]."""
        return _limited(values, self.centres, self.units) @ self.weights + self.bias


def _limited(values: Floats, centres: Floats, units: Floats) -> Floats:
    return np.clip((values - centres) / units, -LIMIT, LIMIT)


def shares_of(rows: Sequence[Row]) -> Floats:
    """What each window weighs: worlds, and both kinds in each, alike."""
    own = [_DOMAIN_WEIGHT if row.group == "domain" else 1.0 for row in rows]
    keys = [(row.encoder, row.world, row.new) for row in rows]
    total: Counter[tuple[str, str, bool]] = Counter()
    for key, share in zip(keys, own, strict=True):
        total[key] += share  # type: ignore[assignment]  # a Counter of floats
    return np.array([share / total[key] for key, share in zip(keys, own, strict=True)])


def carried_over(rows: Sequence[Row], names: Sequence[str]) -> float:
    """The mean share told right of both kinds, each window by weights that saw nothing like it."""
    values, new, shares = _table(rows, names)
    worlds = np.array([row.world for row in rows])
    families = np.array([row.family for row in rows])
    logits = np.zeros(len(rows))
    for world, family in sorted({(row.world, row.family) for row in rows}):
        seen = (worlds != world) & ((families != family) | (family == ""))
        asked = (worlds == world) & (families == family)
        logits[asked] = Fit.of(values[seen], new[seen], shares[seen])(values[asked])
    told = (logits > 0) == new
    return float(np.mean([np.average(told[new == k], weights=shares[new == k]) for k in (0, 1)]))


def _table(rows: Sequence[Row], names: Sequence[str]) -> tuple[Floats, NDArray[np.bool_], Floats]:
    values = np.array([[row.values[name] for name in names] for row in rows])
    return values, np.array([row.new for row in rows]), shares_of(rows)


def main(argv: list[str] | None = None) -> int:
    """Measure, fit, write the report, print the weights."""
    parser = arguments("The weights of ood.kinds", "kind_weights", encoder=" and ".join(_CHOSEN))
    parser.add_argument("--cache", type=Path, default=Path("bench-out") / "worlds")
    options = parsed(parser, argv)
    rows = [row for name in _CHOSEN for row in measured(name, options.data, options.cache, print)]
    report: dict[str, Any] = {"benchmark": "kind_weights", "windows": len(rows)}
    for key, names in (("with_frames", MEASURES), ("blind", FEATURE_MEASURES)):
        fit = Fit.of(*_table(rows, names))
        parts = zip(names, fit.weights, fit.centres, fit.units, strict=True)
        report[key] = {
            "weights": {name: [round(float(v), 3) for v in part] for name, *part in parts},
            "bias": round(fit.bias, 3),
            "carried_over": round(carried_over(rows, names), 3),
        }
    write(report, options.out)
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
