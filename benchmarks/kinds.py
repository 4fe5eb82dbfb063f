"""Is the kind of a shift told right? The confusion matrix over all pairs of worlds.

Every pair gives windows of 64 and 256 samples, all shifted or mixed with as many known ones. A
window of new classes or a new look counts when the agent would have confirmed its alarm; windows of
faulty frames and of other proportions count always. The weights in `ood.kinds` were fitted on
worlds of their own (`benchmarks/kind_weights.py`).

    python -m benchmarks.kinds --data DIR [--cache DIR] [--encoders NAME ...]
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.command import arguments, parsed, write
from benchmarks.kind_windows import CONFIRM_SHARE, GROUPS, SEED, SEVERITIES, WorldWindows
from benchmarks.pages import PAGE, table, write_section
from benchmarks.worlds import Worlds, encoder
from ood.kinds import Kind, diagnose
from ood.measures import FOREIGN_P

BAR: Final = 0.9
_WEIGHTS_REPORT: Final = Path(__file__).parent / "results" / "kind_weights.json"
_TRUTHS: Final = (Kind.SENSOR_FAULT, Kind.DOMAIN_SHIFT, Kind.NEW_CLASSES, Kind.PRIOR_CHANGE)


def run(name: str, data: Path, cache: Path) -> list[dict[str, Any]]:
    """Diagnose every window of every world under one encoder; one row a window that counts."""
    worlds = Worlds(encoder(name, data, cache), data, cache, severities=SEVERITIES)
    rows = []
    for world in worlds.worlds.values():
        started, places = time.monotonic(), WorldWindows(worlds, world, cache)
        for window in places.windows():
            scores = places.known.mixture.head.distances(window.features).min(axis=1)
            foreign = float((places.known.calibration.p_values(scores) <= FOREIGN_P).mean())
            confirmed = foreign >= CONFIRM_SHARE
            if not confirmed and window.group in GROUPS:
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


def page(report: dict[str, Any], weights: dict[str, Any]) -> str:
    """The section of the page, from the reports of this benchmark and of `kind_weights` alone."""
    found = report["summary"]
    said = [*map(str, _TRUTHS), str(Kind.UNCLEAR)]
    rows = [
        [f"**{truth}**", *(found["confusion"][str(truth)].get(name, 0) for name in said)]
        for truth in _TRUTHS
    ]
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
{found["right_of_all"]:.1%}. The bar of {BAR:.0%} {met}{missed}. Of {found["faults_confirmed"]}
windows of faulty frames that would confirm an alarm, {found["faults_confirmed_that_could_train"]}
were called something that may lead to training. Frames that are seen to be faults are left out of
training whatever the window is called.

The weights were fitted by [`benchmarks/kind_weights.py`](../../benchmarks/kind_weights.py) on
{weights["windows"]} windows of eight other known worlds (parts of Tiny-ImageNet, Grocery, MNIST,
each PACS domain but photo, other speakers, another load) under vit-tiny, five of them also under
mobilenet. On the same worlds the measures were chosen, and how sure other proportions must be; no
window of the encoder default was. Both use the same sets and the same kinds of corruption, in other
parts. Where each world is judged by weights that saw neither it nor corruptions of its family nor
the same far set, new classes and a new look are told apart, as the mean over both kinds, in
{weights["with_frames"]["carried_over"]:.1%}, without facts of frames in
{weights["blind"]["carried_over"]:.1%}. That flatters a little, since the measures were chosen by
it; for a corruption unlike all fifteen expect no more. How many empty edges make a sensor dead was
set on clean frames of fsdd, among them those of the judged world.

What fails is to see new classes under the encoder default: Tiny-ImageNet and Grocery look to it
like known classes in a new look. Under vit-tiny digits among as many known samples pass for other
proportions, which closes the episode, and fog, frost and pixelation for new classes.
Tried on the worlds of the choice and left out, since they added little or took away: what the
measures say of the world's own classes when those are left out in turn, as a yardstick of its own;
depths of the encoder apart; squares and products of the measures; only looks relative to the
known ones.

{lines("by_encoder")}

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
        "seed": SEED,
        "numpy": np.__version__,
        "summary": summary(rows),
    }
    write(report, options.out)
    heat_map(report["summary"]["confusion"], PAGE.parent / "ood" / "kinds.svg")
    weights = msgspec.json.decode(_WEIGHTS_REPORT.read_bytes())
    write_section("kinds", page(report, weights))
    print(report["summary"]["confusion"], report["summary"]["right"])
    return 0 if report["summary"]["right"] >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
