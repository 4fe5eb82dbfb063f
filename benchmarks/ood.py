"""Which score tells foreign samples best, and does the default beat every single rival?

    python -m benchmarks.ood --data DIR --cache DIR [--encoders NAMES] [--out FILE]

Encoders that are not named keep what the report already says of them.

Fits this project's scores and pytorch-ood's on the same features of the same samples, and scores
the same pairs (see `benchmarks.worlds`). Rivals are fitted twice, on the network's own output and
on features of all depths, both at unit length; the better of the two counts. Logits, for both
sides, are those of the shared-covariance Gaussian's linear head. The default also gets the held-out
calibration samples, as a device has them; nothing else does. One thread; costs are processor time.
Also how the default's views were weighed (`benchmarks.ood_weights`), and whether it is faster as a
graph (`benchmarks.score_graph`).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks import ood_page, ood_weights, score_graph
from benchmarks.command import arguments, parsed, write
from benchmarks.detection import aupr, auroc, fpr_at_95_tpr
from benchmarks.rivals import LinearHead, Rival, rivals, version
from benchmarks.tasks import circumstances
from benchmarks.worlds import ENCODERS, GROUPS, Pair, World, Worlds, encoder
from ood import fitted
from ood.combined import CombinedScore
from ood.logits import Discriminant
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise

Floats = npt.NDArray[np.float64]
METRICS: Final = {"auroc": auroc, "aupr": aupr, "fpr95": fpr_at_95_tpr}
DEFAULT: Final = "default"
_ROWS: Final = 256
_TIMED: Final = 1000
_PASSES: Final = 3
# Per-class covariances of so many numbers take gigabytes and hours.
_GMM_DIM: Final = 1000
# The encoders that took no part in choosing the default are measured at fewer severities, for the
# rivals' sake, whose Mahalanobis distances take a product of matrices for every class.
_SEVERITIES: Final = {"vit-tiny": "12345", "default": "135", "mobilenet": "3"}
# The encoder the default was chosen on.
_CHOSEN_ON: Final = "vit-tiny"


@dataclass
class Method:
    """A fitted method: what it is given of a sample, its score, and what it cost."""

    columns: slice
    normalised: bool
    score: Callable[[Floats], Floats]
    fit_s: float
    size_bytes: int

    def __call__(self, features: npt.NDArray[np.float32]) -> Floats:
        """Score raw features."""
        rows = self.rows(features)
        parts = [self.score(rows[at : at + _ROWS]) for at in range(0, len(rows), _ROWS)]
        return np.concatenate(parts)

    def rows(self, features: npt.NDArray[np.float32]) -> Floats:
        """What the method is given."""
        chosen = features[:, self.columns]
        return (l2_normalise(chosen) if self.normalised else chosen).astype(np.float64)


@dataclass
class Tally:
    """Everything measured under one encoder, by method."""

    values: dict[str, dict[tuple[str, str, str], dict[str, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    costs: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    left_out: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report, the page's section and its plot.

    Returns:
        0; what was met and missed is told on the page.
    """
    parser = arguments(__doc__ or "", "ood", encoder="all of --encoders")
    parser.add_argument("--cache", type=Path, required=True, help="where features are kept")
    parser.add_argument("--encoders", nargs="*", choices=ENCODERS, default=ENCODERS)
    options = parsed(parser, argv)
    _one_thread()
    earlier = json.loads(options.out.read_bytes()) if options.out.exists() else {}
    kept = earlier.get("encoders", {})
    report: dict[str, Any] = {
        "pytorch_ood": version(),
        "encoders": kept,
        "weights": earlier.get("weights", []),
        "graph": score_graph.measured(),
    }
    for name in options.encoders:
        package = encoder(name, options.data, options.cache)
        report = {**circumstances(package), **report}
        worlds = Worlds(package, options.data, options.cache)
        report["encoders"][name] = measured(worlds, _SEVERITIES[name])
        if name == _CHOSEN_ON:
            bars = report["encoders"][name]["bars"]
            best = {group: bar["rival"] for group, bar in bars.items()}
            report["weights"] = ood_weights.measured(worlds, best)
    del report["encoder"]
    report["encoders"] = {name: kept[name] for name in ENCODERS if name in kept}
    write(report, options.out)
    ood_page.write(report)
    return 0


def measured(worlds: Worlds, severities: str) -> dict[str, Any]:
    """Run every method on every pair under one encoder."""
    tally = Tally()
    for name, world in worlds.worlds.items():
        methods = _fitted(worlds, world, tally)
        pairs = [
            pair
            for pair in worlds.pairs(GROUPS)
            if pair.known == name and (pair.group != "corruption" or pair.foreign[-1] in severities)
        ]
        for label, method in methods.items():
            _score(label, method, world, pairs, tally)
        print(f"{worlds.package.manifest.name}: {name} done", flush=True)
    package = worlds.package
    return {
        "name": package.manifest.name,
        "digest": package.digest,
        "parts": list(package.manifest.feature_parts),
        "severities": severities,
        "pass_ms": _pass_ms(worlds),
        "left_out": sorted(set(tally.left_out)),
        **summary(tally.values),
        "costs": {
            label: {what: float(np.mean(found)) for what, found in cost.items()}
            for label, cost in tally.costs.items()
        },
        "hundred_classes_bytes": _hundred_classes(worlds),
    }


def summary(values: Mapping[str, Mapping[tuple[str, str, str], Mapping[str, float]]]) -> Any:
    """Means by group, every pair but corruptions (their means by world), and the bars."""
    keys = sorted(values[DEFAULT])
    complete = {label: found for label, found in values.items() if len(found) == len(keys)}
    means: dict[str, Any] = {}
    bars: dict[str, Any] = {}
    for group in GROUPS:
        members = [key for key in keys if key[0] == group]
        means[group] = {
            label: {m: float(np.mean([found[key][m] for key in members])) for m in METRICS}
            for label, found in complete.items()
        }
        theirs = {label: means[group][label]["auroc"] for label in complete if "pytorch" in label}
        best = max(theirs, key=lambda label: theirs[label])
        gaps = {
            key: values[DEFAULT][key]["auroc"] - complete[best][key]["auroc"] for key in members
        }
        any_best = {
            key: values[DEFAULT][key]["auroc"]
            - max(complete[label][key]["auroc"] for label in theirs)
            for key in members
        }
        worst = min(gaps, key=lambda key: gaps[key])
        bars[group] = {
            "best_rival": best,
            "rival": theirs[best],
            "default": means[group][DEFAULT]["auroc"],
            "pairs": len(members),
            "pairs_more_than_half_a_point_below": sum(gap < -0.005 for gap in gaps.values()),
            "worst_pair": " / ".join(worst[1:]),
            "worst_gap": gaps[worst],
            "worst_gap_to_the_best_of_each_pair": min(any_best.values()),
        }
    tables: dict[str, Any] = {}
    for label, found in values.items():
        rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (group, known, foreign), metrics in found.items():
            place = f"{group} / {known} / {'all' if group == 'corruption' else foreign}"
            for metric, value in metrics.items():
                rows[place][metric].append(value)
        tables[label] = {
            place: {metric: float(np.mean(many)) for metric, many in row.items()}
            for place, row in rows.items()
        }
    return {"bars": bars, "means": means, "pairs": tables}


def _fitted(worlds: Worlds, world: World, tally: Tally) -> dict[str, Method]:
    package = worlds.package
    parts, labels = package.manifest.feature_parts, world.fit.labels
    whole = slice(0, sum(parts))
    methods: dict[str, Method] = {}

    def default() -> Any:
        statistics = ClassStatistics.fit(l2_normalise(world.fit.features), labels)
        head = GaussianHead.from_statistics([statistics])
        return CombinedScore(
            head, l2_normalise(world.calibration.features), parts=parts
        ), statistics

    (score, statistics), seconds = _timed(default)
    size = sum(array.nbytes for array in statistics.to_arrays().values())
    methods[DEFAULT] = Method(whole, True, score.score, seconds, size)
    for name in fitted.SCORES:
        kept, seconds = _timed(
            lambda name=name: fitted.fit(name, world.fit.features, labels, seed=package.digest)
        )
        kept.score(world.fit.features[:1])
        methods[name] = Method(whole, False, kept.score, seconds, len(kept.to_bytes()))
    for where, columns in (("output", slice(0, parts[0])), ("all depths", whole)):
        rows = l2_normalise(world.fit.features[:, columns]).astype(np.float64)
        found = ClassStatistics.fit(rows, labels)
        index = np.array([found.labels.index(label) for label in labels])
        head = linear_head(found)
        for name, rival in rivals().items():
            label = f"pytorch-ood {name}, {where}"
            if name == "GMM" and rows.shape[1] > _GMM_DIM:
                tally.left_out.append(label)
                continue
            methods[label] = _rival(rival, rows, index, head, columns)
    return methods


def linear_head(statistics: ClassStatistics) -> LinearHead:
    """The shared-covariance Gaussian's linear classifier."""
    found = Discriminant(GaussianHead.from_statistics([statistics]))
    return LinearHead(found.weights, found.biases - found.weights @ found.centre)


def _rival(
    rival: Rival, rows: Floats, index: npt.NDArray[np.int64], head: LinearHead, columns: slice
) -> Method:
    kept, seconds = _timed(lambda: rival(rows, index, head))
    return Method(columns, True, kept.score, seconds, kept.size_bytes)


def _score(label: str, method: Method, world: World, pairs: Sequence[Pair], tally: Tally) -> None:
    known = method(world.test.features)
    for pair in pairs:
        foreign = method(pair.features)
        tally.values[label][pair.group, pair.known, pair.foreign] = {
            name: metric(known, foreign) for name, metric in METRICS.items()
        }
    rows = method.rows(world.test.features[:_TIMED])
    times = []
    for _ in range(_PASSES):
        _, seconds = _timed(lambda: method.score(rows))
        times.append(seconds)
    cost = tally.costs[label]
    cost["fit_s"].append(method.fit_s)
    cost["score_us"].append(1e6 * min(times) / len(rows))
    cost["state_bytes"].append(method.size_bytes)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    result = action()
    return result, time.process_time() - begun


def _pass_ms(worlds: Worlds) -> float:
    """The encoder's pass for one image, of batches of 64; the fastest of a few."""
    name = worlds.names[0]
    images = worlds.images(name, worlds.worlds[name].test.rows[:64])
    worlds.encoded(images)
    return min(
        1e3 * _timed(lambda: worlds.encoded(images))[1] / len(images) for _ in range(_PASSES)
    )


def _hundred_classes(worlds: Worlds) -> dict[str, int]:
    """Bytes of the hyperdimensional states of a hundred classes: the samples, two names a class."""
    part = worlds.worlds[worlds.names[0]].fit
    labels = [f"{label} {row % 2}" for row, label in enumerate(part.labels)]
    kept = {}
    for name in ("hyperdimensional", "hyperdimensional-binary"):
        found = fitted.fit(name, part.features, labels, seed=worlds.package.digest)
        kept[name] = len(found.to_bytes())
    return kept


def _one_thread() -> None:
    import torch  # noqa: PLC0415 - only this benchmark's rivals need it

    torch.set_num_threads(1)


if __name__ == "__main__":
    raise SystemExit(main())
