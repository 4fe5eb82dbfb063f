"""What does alignment without labels give after a change of camera, and does it know when not to?

scikit-learn's digits through the default encoder: 500 labelled images are known, 128 unlabelled
ones come from another camera (gain, offset, blur, all three with a tint, inverted), or nothing
changes, or new classes come. Reports the accuracy on images of the new camera and of the old one,
before and after, for five draws.

    python -m benchmarks.alignment [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from benchmarks.default_encoder import features_of
from edge_agent.alignment import try_alignment
from exporter.package import default_encoder_package
from exporter.sessions import EncoderSessions
from ood.mixture import Mixture
from ood.statistics import ClassStatistics

DRAWS = 5
KNOWN, CALIBRATION, UNLABELLED = 500, 200, 128

Images = NDArray[np.uint8]


def blurred(images: Images, radius: float) -> Images:
    """Each image through a Gaussian blur of that radius in pixels."""
    kernel = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(image).filter(kernel)) for image in images])


CAMERAS: dict[str, Callable[[Images], Images]] = {
    "gain 0.5": lambda x: (x * 0.5).astype(np.uint8),
    "gain 0.7, offset 70": lambda x: (x * 0.7 + 70).astype(np.uint8),
    "blur 0.8": lambda x: blurred(x, 0.8),
    "blur 0.6, tinted": lambda x: np.clip(
        blurred(x, 0.6) * np.array([0.9, 0.6, 0.5]) + np.array([10, 50, 60]), 0, 255
    ).astype(np.uint8),
    "inverted": lambda x: 255 - x,
}


def draw(
    seed: int, clear: NDArray[np.float32], seen: NDArray[np.float32], labels: NDArray[np.str_]
) -> dict[str, Any]:
    """One draw: clear features are known, seen ones come unlabelled."""
    order = np.random.default_rng(seed).permutation(len(labels))
    known, calibration, unlabelled, test = np.split(
        order, np.cumsum([KNOWN, CALIBRATION, UNLABELLED])
    )
    groups = [ClassStatistics.fit(clear[known], list(labels[known]))]
    mixture = Mixture.from_statistics(groups)
    alignment, verdict = try_alignment(seen[unlabelled], clear[calibration], groups)

    def accuracy(features: NDArray[np.float32], *, aligned: bool) -> float:
        rows = features[test]
        if aligned and alignment is not None:
            rows = alignment.applied(rows, mixture)
        guesses = mixture.evidence(rows).posterior().argmax(axis=1)
        names = np.array([label for _, label in mixture.entries])
        return float(np.mean(names[guesses] == labels[test]))

    return {
        "accepted": verdict.accepted,
        "new_before": accuracy(seen, aligned=False),
        "new_after": accuracy(seen, aligned=True),
        "old_before": accuracy(clear, aligned=False),
        "old_after": accuracy(clear, aligned=True),
    }


def new_classes(seed: int, features: NDArray[np.float32], labels: NDArray[np.str_]) -> bool:
    """Whether an alignment is accepted although five unknown digits came, not another camera."""
    rng = np.random.default_rng(seed)
    old = np.isin(labels, rng.permutation(np.unique(labels))[:5])
    order = rng.permutation(np.flatnonzero(old))
    groups = [ClassStatistics.fit(features[order[:300]], list(labels[order[:300]]))]
    unknown = rng.permutation(np.flatnonzero(~old))[:UNLABELLED]
    _, verdict = try_alignment(features[unknown], features[order[300:450]], groups)
    return verdict.accepted


def measure() -> dict[str, Any]:
    """Every camera, no change, and new classes."""
    package = default_encoder_package()
    sessions = EncoderSessions(package)
    digits = load_digits()
    grey = np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    labels = digits.target.astype(str)
    clear = features_of(sessions, grey)
    results: dict[str, Any] = {}
    for name, camera in {"no change": None, **CAMERAS}.items():
        seen = clear if camera is None else features_of(sessions, camera(grey))
        draws = [draw(seed, clear, seen, labels) for seed in range(DRAWS)]
        results[name] = {key: round(float(np.mean([d[key] for d in draws])), 4) for key in draws[0]}
        print(name, results[name])
    accepted = [new_classes(seed, clear, labels) for seed in range(DRAWS)]
    return {
        "benchmark": "alignment",
        "encoder": {"name": package.name, "digest": package.digest},
        "settings": {
            "known": KNOWN,
            "calibration": CALIBRATION,
            "unlabelled": UNLABELLED,
            "draws": DRAWS,
        },
        "cameras": results,
        "new_classes_accepted": float(np.mean(accepted)),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "scikit-learn")},
        "seed": list(range(DRAWS)),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description="Alignment without labels on digits.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "alignment.json"
    )
    options = parser.parse_args(argv)
    report = measure()
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    hurt = [n for n, r in report["cameras"].items() if r["new_after"] < r["new_before"] - 0.01]
    return int(bool(hurt) or report["new_classes_accepted"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
