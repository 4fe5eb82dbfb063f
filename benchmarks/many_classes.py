"""What thousands of installed classes cost a sample, and what a shortlist of them leaves out.

Classes are clusters of real features (the known worlds' and the far sets', ViT-Tiny), cut ever
finer; a device's real ones lie farther apart, so this is the harder case. Reports the share of the
posterior that is lost by looking only at the components on the shortlist, and the time of evidence
and score for one sample.

    python -m benchmarks.many_classes --data DIR [--cache DIR] [--out FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import arguments, parsed, write
from benchmarks.interleaved import timed
from benchmarks.tasks import circumstances
from benchmarks.worlds import Worlds, encoder
from ood.detector import Detector
from ood.mixture import Mixture
from ood.shortlist import Shortlist
from ood.statistics import ClassStatistics, l2_normalise

Floats = NDArray[np.float32]

DIRECTIONS: Final = (96, 128, 160, 192, 288)
CANDIDATES: Final = (32, 64, 128)
COUNTS: Final = (10, 100, 1000, 5000)
_CLUSTERS: Final = 1500
_TESTED: Final = 2000
_CALIBRATION: Final = 300
_ROUNDS: Final = 400


def left_out(mixture: Mixture, test: Floats) -> list[dict[str, float]]:
    """How much of the posterior shortlists of several sizes lose."""
    distances = mixture.head.distances(test)
    posterior = np.exp(-0.5 * (distances - distances.min(axis=1, keepdims=True)))
    posterior /= posterior.sum(axis=1, keepdims=True)
    nearest = distances.argmin(axis=1)
    found = []
    for directions in DIRECTIONS:
        for candidates in CANDIDATES:
            shortlist = Shortlist(mixture.head, candidates=candidates, directions=directions)
            near = shortlist.look(test.astype(np.float64)).near
            lost = 1.0 - np.take_along_axis(posterior, near, axis=1).sum(axis=1)
            found.append(
                {
                    "directions": directions,
                    "candidates": candidates,
                    "nearest_missed": float((near != nearest[:, None]).all(axis=1).mean()),
                    "mean_lost": max(float(lost.mean()), 0.0),
                    "most_lost": max(float(lost.max()), 0.0),
                }
            )
    return found


def costs(features: Floats) -> dict[str, dict[str, float]]:
    """The time of one sample's evidence and score by the number of components."""
    rng = np.random.default_rng(1)
    ways = {}
    for count in COUNTS:
        means = features[rng.integers(0, len(features), count)]
        rows = np.repeat(means, 4, axis=0)
        rows = l2_normalise(rows + rng.normal(0, 0.02, rows.shape).astype(np.float32))
        labels = [f"{k}" for k in range(count) for _ in range(4)]
        calibration = l2_normalise(
            features[:_CALIBRATION] + rng.normal(0, 0.02, (_CALIBRATION, features.shape[1]))
        )
        detector = Detector.fit(
            [ClassStatistics.fit(rows, labels)], calibration, false_alarm_every=1e6
        )

        def one(detector: Detector = detector, row: Floats = features[:1]) -> None:
            seen = detector.mixture.evidence(row)
            detector.score(row, seen)

        ways[f"{count} components"] = one
    return {
        name: {"minimum_ms": timing.minimum_ms, "median_ms": timing.median_ms}
        for name, timing in timed(ways, rounds=_ROUNDS).items()
    }


def main(argv: list[str] | None = None) -> int:
    """Run it and write the report."""
    parser = arguments(__doc__ or "", "many_classes", encoder="ViT-Tiny")
    parser.add_argument("--cache", type=Path, default=Path("bench-out") / "worlds")
    options = parsed(parser, argv)
    package = encoder("vit-tiny", options.data, options.cache)
    worlds = Worlds(package, options.data, options.cache)
    known = [
        part.features
        for world in worlds.worlds.values()
        for part in (world.fit, world.calibration, world.test)
    ]
    foreign = [pair.features for pair in worlds.pairs(("near", "far", "domain"))]
    features = l2_normalise(np.concatenate([*known, *foreign]))
    features = features[np.random.default_rng(0).permutation(len(features))]
    fitted, test = features[:-_TESTED], features[-_TESTED:]
    names = [f"{k:04d}" for k in _clustered(fitted, _CLUSTERS)]
    mixture = Mixture.from_statistics([ClassStatistics.fit(fitted, names)])
    report: dict[str, Any] = {
        "circumstances": circumstances(package),
        "components": len(mixture.label),
        "samples": len(test),
        "left_out": left_out(mixture, test),
        "costs": costs(features),
    }
    write(report, options.out)
    return 0


def _clustered(rows: Floats, count: int) -> NDArray[np.int64]:
    """The cluster of each sample, by a few rounds of k-means from samples drawn at random."""
    centres = rows[np.random.default_rng(0).choice(len(rows), count, replace=False)].copy()
    for _ in range(4):
        owner = (np.square(centres).sum(axis=1) - 2 * rows @ centres.T).argmin(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, owner, rows)
        sizes = np.bincount(owner, minlength=count)
        centres[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
    result: NDArray[np.int64] = owner
    return result


if __name__ == "__main__":
    raise SystemExit(main())
