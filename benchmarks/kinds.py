"""Is the kind of a shift told right? The confusion matrix over all pairs of worlds.

Every pair gives windows of 64 and 256 samples, all shifted or mixed with as many known ones. A
window of new classes or a new look counts when the agent would have confirmed its alarm; windows of
faulty frames and of other proportions count always. The weights in `ood.kinds` were chosen on other
draws of vit-tiny's worlds cifar50 and fsdd; the report keeps what was chosen on apart.

    python -m benchmarks.kinds --data DIR [--cache DIR] [--encoders vit-tiny default]
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.command import arguments, parsed, write
from benchmarks.pages import PAGE, table, write_section
from benchmarks.worlds import Floats, Rows, World, Worlds, encoder
from ood.frames import FrameFacts, frame_facts
from ood.kinds import FOREIGN_P, Kind, diagnose
from ood.known import Known
from ood.statistics import ClassStatistics, l2_normalise

SIZES: Final = (64, 256)
MIXES: Final = (1.0, 0.5)
SEVERITIES: Final = (3, 5)
CHOSEN_ON: Final = (("vit-tiny", "cifar50"), ("vit-tiny", "fsdd"))
BAR: Final = 0.9
_DRAWS: Final = {Kind.NEW_CLASSES: 6, Kind.DOMAIN_SHIFT: 2, Kind.PRIOR_CHANGE: 6}
_FAULT_DRAWS: Final = 3
_CONFIRM_SHARE: Final = 0.2
_SEED: Final = 20_261
_TRUTHS: Final = (Kind.SENSOR_FAULT, Kind.DOMAIN_SHIFT, Kind.NEW_CLASSES, Kind.PRIOR_CHANGE)
_GROUPS: Final = {
    "near": Kind.NEW_CLASSES,
    "far": Kind.NEW_CLASSES,
    "domain": Kind.DOMAIN_SHIFT,
    "corruption": Kind.DOMAIN_SHIFT,
}
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


class _World:
    """One world's windows."""

    def __init__(self, worlds: Worlds, world: World, cache: Path) -> None:
        self.worlds, self.world = worlds, world
        self._cache = cache / "frames" / worlds.package.digest[:16]
        calibration = self._facts("calibration", self._of(world.calibration.rows))
        self.known = Known(
            [ClassStatistics.fit(l2_normalise(world.fit.features), world.fit.labels)],
            l2_normalise(world.calibration.features),
            calibration,
        )
        self.features = l2_normalise(world.test.features)
        self.frames = self._facts("test", self._of(world.test.rows))
        self._rng = np.random.default_rng([_SEED, len(world.name), len(self.features)])

    def windows(self) -> Iterator[Window]:
        """Everything, in an order that is always the same."""
        for pair in self.worlds.pairs():
            if pair.known == self.world.name:
                frames = self._facts(f"{pair.group}-{pair.foreign}", pair.images)
                yield from self._of_pair(
                    _GROUPS[pair.group], pair.group, pair.foreign, pair.features, frames
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


def run(name: str, data: Path, cache: Path) -> list[dict[str, Any]]:
    """Diagnose every window of every world under one encoder; one row a window that counts."""
    worlds = Worlds(encoder(name, data, cache), data, cache, severities=SEVERITIES)
    rows = []
    for world in worlds.worlds.values():
        started, places = time.monotonic(), _World(worlds, world, cache)
        for window in places.windows():
            scores = places.known.mixture.head.distances(window.features).min(axis=1)
            foreign = float((places.known.calibration.p_values(scores) <= FOREIGN_P).mean())
            confirmed = foreign >= _CONFIRM_SHARE
            if not confirmed and window.group in _GROUPS:
                continue
            said = diagnose(window.features, places.known, window.frames)
            rows.append(
                {
                    "encoder": name,
                    "world": world.name,
                    "group": window.group,
                    "foreign": window.foreign,
                    "size": window.size,
                    "mix": window.mix,
                    "truth": str(window.truth),
                    "said": str(said.kind),
                    "confirmed": confirmed,
                }
            )
        print(f"{name} {world.name}: {len(rows)} windows, {time.monotonic() - started:.0f} s")
    return rows


def confusion(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts of what was said, by what it was."""
    return {
        str(truth): dict(Counter(row["said"] for row in rows if row["truth"] == truth))
        for truth in _TRUTHS
    }


def right(rows: Sequence[dict[str, Any]]) -> float:
    """The mean over the kinds present of the share told right: no kind counts for its number."""
    shares = [
        np.mean([row["said"] == truth for row in rows if row["truth"] == truth])
        for truth in _TRUTHS
        if any(row["truth"] == truth for row in rows)
    ]
    return float(np.mean(shares)) if shares else float("nan")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the report that the page quotes."""

    def by(key: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        names = sorted({key(row) for row in rows})
        parts = {name: [row for row in rows if key(row) == name] for name in names}
        return {
            name: {
                "windows": len(part),
                "right": round(right(part), 3),
                **{
                    str(truth): round(
                        float(np.mean([r["said"] == truth for r in part if r["truth"] == truth])), 3
                    )
                    for truth in _TRUTHS
                    if any(r["truth"] == truth for r in part)
                },
            }
            for name, part in parts.items()
        }

    faults = [row for row in rows if row["truth"] == Kind.SENSOR_FAULT]
    alarming = [row for row in faults if row["confirmed"]]
    return {
        "windows": len(rows),
        "right_of_all": round(float(np.mean([row["said"] == row["truth"] for row in rows])), 3),
        "right": round(right(rows), 3),
        "confusion": confusion(rows),
        "chosen_on": by(lambda row: str((row["encoder"], row["world"]) in CHOSEN_ON)),
        "by_encoder": by(lambda row: row["encoder"]),
        "by_world": by(lambda row: f"{row['encoder']} {row['world']}"),
        "by_group": by(lambda row: row["group"]),
        "by_foreign": by(
            lambda row: row["foreign"] if row["group"] != "corruption" else row["foreign"][:-2]
        ),
        "by_size": by(lambda row: f"{row['size']} at {row['mix']:.0%}"),
        "faults_confirmed": len(alarming),
        "faults_confirmed_that_could_train": sum(
            row["said"] not in (Kind.SENSOR_FAULT, Kind.PRIOR_CHANGE) for row in alarming
        ),
    }


def heat_map(counts: dict[str, dict[str, int]], out: Path) -> None:
    """The confusion matrix as an SVG, each row in shares of its kind."""
    said = [*map(str, _TRUTHS), str(Kind.UNCLEAR)]
    cell, left, top = 96, 130, 60
    width, height = left + cell * len(said) + 10, top + 56 * len(_TRUTHS) + 10
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">said</text><text x="8" y="{top - 8}">was</text>',
    ]
    for column, name in enumerate(said):
        x = left + cell * (column + 0.5)
        parts.append(f'<text x="{x}" y="{top - 10}" text-anchor="middle">{name}</text>')
    for row, truth in enumerate(map(str, _TRUTHS)):
        total = max(sum(counts[truth].values()), 1)
        y = top + 56 * row
        parts.append(f'<text x="8" y="{y + 33}">{truth}</text>')
        for column, name in enumerate(said):
            count = counts[truth].get(name, 0)
            share = count / total
            shade, x = round(255 - 200 * share), left + cell * column
            ink = "white" if share > 0.6 else "black"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 3}" height="53" '
                f'fill="rgb({shade},{shade},255)"/><text x="{x + cell / 2 - 1}" y="{y + 33}" '
                f'text-anchor="middle" fill="{ink}">{share:.0%} ({count})</text>'
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """The section of the page, from the report alone."""
    found = report["summary"]
    said = [*map(str, _TRUTHS), str(Kind.UNCLEAR)]
    rows = [
        [f"**{truth}**", *(found["confusion"][str(truth)].get(name, 0) for name in said)]
        for truth in _TRUTHS
    ]
    apart = found["chosen_on"]
    met = "is met" if found["right"] >= BAR else "is **not met**"
    missed = "" if found["right"] >= BAR else f", by {100 * (BAR - found['right']):.1f} points"
    names = ["part", "windows", "right", *map(str, _TRUTHS)]

    def lines(key: str) -> str:
        return table(
            names,
            [
                [name, part["windows"], f"{part['right']:.1%}"]
                + [f"{part[str(t)]:.1%}" if str(t) in part else "–" for t in _TRUTHS]
                for name, part in found[key].items()
            ],
        )

    return f"""\
[`benchmarks/kinds.py`](../../benchmarks/kinds.py) asks [`ood/kinds.py`](../../ood/kinds.py) about
{found["windows"]} windows of 64 and 256 samples, all shifted or mixed with as many known ones, over
every pair of worlds and the encoders {", ".join(report["encoders"])}; corruptions at severities
{" and ".join(map(str, SEVERITIES))}. New classes and new looks count where the agent would have
confirmed the alarm (a fifth of the samples foreign); faults and other proportions always.
A pair of fewer samples than a window needs gives them all.

![Confusion matrix](ood/kinds.svg)

{table(["was / said", *said], rows)}

Right, as the mean over the four kinds: **{found["right"]:.1%}**; of all windows
{found["right_of_all"]:.1%}. The bar of {BAR:.0%} {met}{missed}. The weights were chosen on other
draws of vit-tiny's worlds cifar50 and fsdd: on those worlds {apart["True"]["right"]:.1%}, on all
others {apart["False"]["right"]:.1%}. Of {found["faults_confirmed"]} windows of faulty frames that
would confirm an alarm, {found["faults_confirmed_that_could_train"]} were called something that may
lead to training, so "no sensor fault is ever trained on" holds but for those: all are half-dead
frames of a world of spectrograms whose own frames are half black. Frames that are seen to be faults
are left out of training whatever the window is called.

What fails is telling a new look from new classes, and it fails by world: paintings and sketches of
the known objects are called new classes, corrupted spectrograms of bearings are so under vit-tiny,
and the default encoder sees a new look in nearly all that is foreign to cifar50.
Tried, on the two worlds of the choice only: the share of the distance that one common displacement
explains, variance within and across the directions that tell classes apart, margins, principal
values of the residual, the same over foreign samples only, and the network's output apart from its
earlier depths. None carried over from one of the two worlds to the other by itself; nine numbers
together, two of them of pixels, were best. A yardstick of the world's own, from leaving its classes
out in turn, was not tried.

{lines("by_world")}

{lines("by_foreign")}

{lines("by_size")}
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report, the picture and the section."""
    parser = arguments(
        "Is the kind of a shift told right?", "kinds", encoder="vit-tiny and default"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("bench-out") / "worlds",
    )
    parser.add_argument("--encoders", nargs="+", default=["vit-tiny", "default"])
    options = parsed(parser, argv)
    rows = [row for name in options.encoders for row in run(name, options.data, options.cache)]
    report = {
        "benchmark": "kinds",
        "encoders": options.encoders,
        "seed": _SEED,
        "numpy": np.__version__,
        "summary": summary(rows),
    }
    write(report, options.out)
    heat_map(report["summary"]["confusion"], PAGE.parent / "ood" / "kinds.svg")
    write_section("kinds", page(report))
    print(report["summary"]["confusion"], report["summary"]["right"])
    return 0 if report["summary"]["right"] >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
