"""What the demo leaves behind: `report.json`, a table, and a picture of the stream."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

mpl.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_PACKAGES = ("driftkeel", "torch", "onnxruntime", "numpy", "paho-mqtt", "scikit-learn")
_WINDOW = 25


@dataclass
class Track:
    """What one device's stream looked like, sample by sample, and what happened when."""

    correct: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)

    def mark(self, what: str) -> None:
        """Note that something happened before the next sample."""
        self.events.append((len(self.correct), what))


def versions() -> dict[str, str]:
    """The versions of what was run."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: version(name) for name in _PACKAGES},
    }


def write_report(report: dict[str, Any], out: Path) -> Path:
    """Write `report.json`."""
    path = out / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the report says, one line of words and one value each."""
    accuracy, alarm = report["accuracy"], report["alarm"]
    delays = alarm["delay_samples"]
    return [
        ("accuracy before the shift (digits 0-4)", _share(accuracy["before_shift"])),
        ("new digits 5-9, without adapting", _share(accuracy["new_classes_unadapted"])),
        ("new digits 5-9, adapted", _share(accuracy["new_classes_adapted"])),
        ("new camera, without adapting", _share(accuracy["new_camera_unadapted"])),
        ("new camera, adapted", _share(accuracy["new_camera_adapted"])),
        ("digits 0-4 after everything", _share(accuracy["first_classes_at_end"])),
        ("false alarms", str(alarm["false_alarms"])),
        *((f"samples until alarm, {what}", str(n)) for what, n in delays.items()),
        ("bundle on the wire", f"{report['bundle_bytes'] / 1000:.1f} kB"),
        ("time to swap generations", f"{report['swap_ms']:.1f} ms"),
        ("requests failed / sent", f"{report['failed_requests']} / {report['requests']}"),
        ("encoder passes per sample", f"{report['passes_per_sample']:.2f}"),
        (
            "latency p50 / p99",
            f"{report['latency_ms']['p50']:.1f} / {report['latency_ms']['p99']:.1f} ms",
        ),
        ("device B trained", "yes" if report["device_b_trained"] else "no"),
        (
            "rollback, command to reported",
            f"{report['rollback']['command_to_reported_ms']:.0f} ms",
        ),
        (
            "predictions equal after rollback / return",
            (
                f"{report['rollback']['equal_after_rollback']} / "
                f"{report['rollback']['equal_after_return']}"
            ),
        ),
    ]


def print_table(report: dict[str, Any], console: Console, out: Path) -> Path:
    """Print the table of results, and write it as text beside the report."""
    table = Table(title="What happened", show_header=False)
    for name, value in rows(report):
        table.add_row(name, value)
    console.print(table)
    path = out / "report.txt"
    with path.open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    return path


def draw(tracks: dict[str, Track], out: Path) -> Path:
    """Draw accuracy and OOD score along each device's stream, the events marked.

    Returns:
        The path of the PNG file.
    """
    figure, axes = plt.subplots(
        2 * len(tracks),
        1,
        figsize=(11, 3.6 * len(tracks)),
        height_ratios=[3, 2] * len(tracks),
        layout="constrained",
    )
    for row, (device, track) in enumerate(tracks.items()):
        upper, lower = axes[2 * row], axes[2 * row + 1]
        x = np.arange(len(track.correct))
        upper.plot(x, _rolling(track.correct), color="#2a6f4f", linewidth=1.8)
        upper.set_ylim(-0.03, 1.25)
        upper.set_yticks([0, 0.5, 1])
        upper.set_ylabel(f"accuracy\n(last {_WINDOW})")
        upper.set_title(device, loc="left", fontweight="bold")
        upper.tick_params(labelbottom=False)
        lower.scatter(x, track.scores, s=5, color="#7a4fa3", alpha=0.6, linewidths=0)
        # About 0 for known samples, on either side.
        lower.set_yscale("symlog", linthresh=3)
        lower.set_ylabel("OOD score")
        lower.set_xlabel("sample")
        for number in sorted(set(track.generations)):
            here = np.flatnonzero(np.asarray(track.generations) == number)
            for axis in (upper, lower):
                axis.axvspan(here[0], here[-1] + 1, color=f"C{number}", alpha=0.10, linewidth=0)
            _label(upper, f"generation {number} serves", (int(here[0]) + 4, 0.10), "#34495e")
        for at, what in track.events:
            shift = what.startswith("shift")
            colour = "#c0392b" if shift else "#34495e"
            for axis in (upper, lower):
                axis.axvline(at, color=colour, linestyle="-" if shift else "--", linewidth=1)
            _label(upper, what, (at + 4, 1.24 if shift else 1.12), colour)
        for axis in (upper, lower):
            axis.set_xlim(0, max(1, len(x)))
            axis.spines[["top", "right"]].set_visible(False)
    path = out / "stream.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _label(axis: Axes, text: str, at: tuple[float, float], colour: str) -> None:
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    axis.text(*at, text, fontsize=8, color=colour, va="top", bbox=box)


def _rolling(correct: list[bool]) -> list[float]:
    values = np.asarray(correct, dtype=float)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - _WINDOW)
    return [float(v) for v in (sums[ends] - sums[starts]) / (ends - starts)]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
