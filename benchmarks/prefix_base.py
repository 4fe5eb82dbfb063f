"""Base features of the prefix alone next to those of the whole encoder: what do they see less?

A ViT-Tiny and a MobileNetV2 are built both ways. Compared are the accuracy of the Gaussian head in
each world of `worlds` and the AUROC of the default shift score in every group of pairs; adapters
are not in it. What the whole encoder's output adds costs a sample a run of the suffix.

    python -m benchmarks.prefix_base --data DIR [--cache DIR] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.torch import load_file

from benchmarks.command import arguments, parsed, write
from benchmarks.pages import table, write_section
from benchmarks.quantised import quality
from benchmarks.tasks import circumstances
from benchmarks.worlds import Worlds, encoder
from edge_agent.bench.suite import suite_encoder
from edge_agent.serving import suffix_share
from exporter.architectures import build_known
from exporter.package import EncoderPackage

PAGE: Final = (
    Path(__file__).parents[1] / "docs" / "decisions" / "0005-base-features-of-the-prefix.md"
)
ENCODERS: Final = ("vit-tiny", "mobilenet")
_MOBILENET: Final = Path("encoders") / "mobilenet_v2_1.0_224.safetensors"


def packages(name: str, data: Path, cache: Path) -> dict[str, EncoderPackage]:
    """An encoder built both ways."""
    whole = encoder(name, data, cache)
    if name == "vit-tiny":
        return {"whole": whole, "prefix": suite_encoder(data, cache, base_features="prefix")}
    folder = cache / "encoders" / f"{whole.name}-prefix"
    if not folder.exists():
        build_known(
            load_file(data / _MOBILENET),
            image_size=whole.image_size,
            suffix_blocks=4,
            name=f"{whole.name}-prefix",
            out=folder,
            base_features="prefix",
        )
    return {"whole": whole, "prefix": EncoderPackage.load(folder)}


def judged(package: EncoderPackage, data: Path, cache: Path) -> dict[str, Any]:
    """Accuracy by world and mean AUROC by group, in percent."""
    worlds = Worlds(package, data, cache)
    found = quality(worlds, worlds)
    groups: dict[str, list[float]] = {}
    for key, value in found["auroc"].items():
        groups.setdefault(key.split(" / ")[0], []).append(value)
    return {
        "name": package.name,
        "digest": package.digest,
        "feature_parts": package.manifest.feature_parts,
        "suffix_share": suffix_share(package),
        "accuracy": found["accuracy"],
        "auroc": {group: float(np.mean(values)) for group, values in groups.items()},
        "test_samples": found["test_samples"],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = arguments(__doc__ or "", "prefix_base", encoder="all of them")
    parser.add_argument("--cache", type=Path, default=Path("bench-out") / "worlds")
    options = parsed(parser, argv)
    report: dict[str, Any] = {}
    for name in ENCODERS:
        both: Mapping[str, EncoderPackage] = packages(name, options.data, options.cache)
        report.setdefault("circumstances", circumstances(both["whole"]))
        report[name] = {
            kind: judged(package, options.data, options.cache) for kind, package in both.items()
        }
        print(name, report[name])
    write(report, options.out)
    write_section("prefix base", section(report), PAGE)
    return 0


def section(report: Mapping[str, Any]) -> str:
    """The table of the decision's page."""
    kinds = [(name, kind) for name in ENCODERS for kind in report[name]]
    one = report[ENCODERS[0]]["whole"]
    rows = [
        (
            name,
            kind,
            *(f"{value:.1f}" for value in report[name][kind]["accuracy"].values()),
            *(f"{value:.1f}" for value in report[name][kind]["auroc"].values()),
            f"{report[name][kind]['suffix_share']:.2f}",
        )
        for name, kind in kinds
    ]
    worlds = (f"{name} (n = {count:,})" for name, count in one["test_samples"].items())
    groups = (f"AUROC {group}" for group in one["auroc"])
    return table(("encoder", "base features", *worlds, *groups, "suffix, of a pass"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
