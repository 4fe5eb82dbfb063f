"""The section of the page about shift that `retrieval` writes, and its figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.pages import PAGE, table, write_section

FIGURE: Final = PAGE.parent / "ood" / "retrieval.svg"
_RATES: Final = ("recall_at_1", "recall_at_3", "none_without_own")
_BARS: Final = {"recall_at_1": 0.95, "recall_at_3": 1.0, "none_without_own": 0.95}
_P99_MS: Final = 20.0
_TITLES: Final = {
    "recall_at_1": "recall@1",
    "recall_at_3": "recall@3",
    "none_without_own": "“none” without the own adapter",
}


def write(report: Mapping[str, Any]) -> None:
    """Write the section and the figure."""
    _plot(report["encoders"]["vit-tiny"]["histogram"], report["min_similarity"], FIGURE)
    write_section("retrieval", section(report))


def section(report: Mapping[str, Any]) -> str:
    """The section, as Markdown."""
    first = report["encoders"]["vit-tiny"]
    bars = [
        [_TITLES[key], f"{bar:.2f}", f"{first['all'][key]:.3f}", _verdict(first["all"][key] - bar)]
        for key, bar in _BARS.items()
    ]
    nearest = first["all"]["own_in_nearest_3"]
    bars.insert(2, ["recall@3, no threshold", "1.00", f"{nearest:.3f}", _verdict(nearest - 1.0)])
    speed = report["speed"]["ways"]["two stages"]
    bars.append(
        [
            f"p99 of a search in {report['speed']['signatures']:,}",
            f"{_P99_MS:g} ms",
            f"{speed['p99_ms']:g} ms",
            _verdict(_P99_MS - speed["p99_ms"]),
        ]
    )
    bars.append(["size", "4,096 bytes", f"{report['signature_bytes']:,} bytes", "met"])
    head = ["", "queries", *(_TITLES[key] for key in _RATES), "nearest is the own"]
    parts = []
    for name, found in report["encoders"].items():
        rows = {
            "all": found["all"],
            "CIFAR-100 and Grocery (chosen on)": found["chosen on"],
            "the others": found["not chosen on"],
            **found["by condition"],
            **found["by set"],
        }
        cells = [
            [key, row["queries"], *(f"{row[k]:.3f}" for k in (*_RATES, "nearest_is_own"))]
            for key, row in rows.items()
        ]
        parts.append(f"### {name}\n\n{table(head, cells)}")
    ways = [
        [
            name,
            way["p50_ms"],
            way["p99_ms"],
            *(way.get(key, "") for key in ("best_found", "similarity_lost_at_most")),
            *(way.get(key, "") for key in ("build_s", "memory_mb")),
        ]
        for name, way in report["speed"]["ways"].items()
    ]
    return "\n\n".join(
        [
            (
                f"Written by `benchmarks/retrieval.py`: {len(report['variants'])} variants of "
                "tasks, domains and cameras; an adapter's signature from half of each (200 samples "
                "or what there is), five draws of fresh samples of the other half in each "
                "condition. Recall counts an adapter only if it is at least "
                f"{report['min_similarity']:g} alike, the default of the catalogue and of the "
                "agent; with the own adapter removed, “none” is right. Settings were chosen for "
                "CIFAR-100 and Grocery under ViT-Tiny, on other draws of these same halves; the "
                "other sets and the default encoder were looked at meanwhile, but nothing was "
                "chosen for them."
            ),
            table(["bar", "wanted", "measured", ""], bars),
            "![Similarity to the own adapter and to the nearest other](ood/retrieval.svg)",
            *parts,
            f"### A search in {report['speed']['signatures']:,} signatures",
            (
                "Half are mixtures of three variants, half near-duplicates of fifty of those. "
                "Every way ends with an exact comparison of 256; they differ in how these are "
                "found. “Best found” is the share of searches whose best is the best by comparing "
                f"with everything ({report['speed']['compared']} searches), “lost” the most "
                f"similarity that a search gave away. {report['speed']['queries']} searches, one "
                "thread, a machine that had "
                "other work."
            ),
            table(["way", "p50 ms", "p99 ms", "best found", "lost", "build s", "MB"], ways),
            retained(),
        ]
    )


def retained() -> str:
    """What was tried and what was kept, in words without numbers."""
    return (
        "Tried and left: mean embeddings under Gaussian kernels (version 1; too sensitive to "
        "class balance), the distance between hulls of the clusters with bounded weights "
        "(too slow for pairs), principal axes in place of cluster means, the larger of the two "
        "directions instead of their mean, the network's own output alone. The catalogue keeps "
        "the plain matrix product over all: it needs no library, takes changes and filters "
        "without rebuilding."
    )


def _verdict(margin: float) -> str:
    return "met" if margin >= 0 else f"missed by {-margin:.3f}"


def _plot(histogram: Mapping[str, Any], threshold: float, path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - of the `demo` extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    # The same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "driftkeel", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        edges = histogram["edges"]
        for name, colour in (("own", "C0"), ("best other", "C3")):
            axes.stairs(
                histogram[name], edges, label=f"{name} adapter", color=colour, fill=True, alpha=0.5
            )
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="offered from")
        axes.set(xlabel="similarity", ylabel="queries", yscale="symlog", xlim=(0, 1))
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
