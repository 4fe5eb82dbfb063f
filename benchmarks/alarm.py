"""Does the alarm keep its budget, and is it sooner than others that run as long without a shift?

Run lengths are measured over fresh calibration sets and streams, independent and not. Delays are
compared with river's ADWIN, KSWIN and PageHinkley and frouros's CUSUM and KSTest on the same score
streams, after every detector's one parameter has been set to the same measured run length.

    pip install --no-deps river frouros tqdm
    python -m benchmarks.alarm --data DIR [--cache DIR] [--quick] [--seed 0] [--out FILE]

``--no-deps`` because frouros asks for an older NumPy. Features are kept in the cache; the first run
computes them. Corruptions are left out unless ``--groups`` names them: their features take hours.
"""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import alarm_own, alarm_page, alarm_rivals
from benchmarks.alarm_delays import NAMES, OURS, POOLED, Comparison, Size, pools
from benchmarks.command import arguments, parsed, write
from benchmarks.worlds import GROUPS, Worlds, encoder

FULL: Final = Size(streams=2000, cut=4000, repeats=60, after=3000)
QUICK: Final = Size(streams=100, cut=2000, repeats=12, after=600, wanted=500.0, adwin_streams=50)


def measure_delays(worlds: Worlds, groups: list[str], size: Size, seed: int) -> dict[str, Any]:
    """Run lengths and delays of all detectors on every world."""
    found: dict[str, Any] = {"settings": vars(size), "run_lengths": [], "delays": []}
    for place, name in enumerate(worlds.names):
        started = time.perf_counter()
        known, foreign = pools(worlds, name, groups)
        comparison = Comparison(known, size, np.random.default_rng([seed, place]))
        comparison.dependent()
        for detector in NAMES:
            found["run_lengths"].append(
                {
                    "world": name,
                    "detector": detector,
                    "threshold": comparison.thresholds[detector],
                    **{k: round(v, 1) for k, v in comparison.run_lengths[detector].items()},
                }
            )
        for pair, pool in foreign.items():
            found["delays"] += [
                {"world": name, "pair": pair, **row} for row in comparison.delays(pool)
            ]
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return found


def compare(delays: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our median delay by the best rival's, for every pair and shape."""
    by_case: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in delays:
        case = (row["world"], row["pair"], row["shape"])
        median = np.inf if row["median"] is None else row["median"]
        by_case.setdefault(case, {})[row["detector"]] = median
    found = []
    for (world, pair, shape), medians in by_case.items():
        best = min(alarm_rivals.NAMES, key=medians.__getitem__)
        row = {"world": world, "pair": pair, "shape": shape, "best_rival": best}
        row["rival"] = medians[best] if np.isfinite(medians[best]) else None
        for key, name in (("ours", OURS), ("pooled", POOLED)):
            ratio = medians[name] / medians[best] if np.isfinite(medians[best]) else np.nan
            row[key] = medians[name] if np.isfinite(medians[name]) else None
            row[f"{key}_ratio"] = round(ratio, 3) if np.isfinite(ratio) else None
        found.append(row)
    return found


def bars(report: dict[str, Any]) -> dict[str, Any]:
    """What was asked, and what was measured."""

    def share(shape: str, key: str, most: float) -> dict[str, Any]:
        rows = [row for row in report["compared"] if row["shape"] == shape]
        ratios = [np.inf if row[key] is None else row[key] for row in rows]
        middle = float(np.median(ratios))
        return {
            "pairs": len(rows),
            "met_in": sum(ratio <= most for ratio in ratios),
            "median_ratio": round(middle, 3) if np.isfinite(middle) else None,
        }

    asked = [r for r in report["budgets"] if r["stream"] == "independent" or r["block"] > 1]
    spent, state = report["cost"], "bytes of state"
    return {
        "budgets_held": sum(row["holds"] for row in asked),
        "budgets_asked": len(asked),
        "least_margin": round(min(row["lower_95"] / row["budget"] for row in asked), 3),
        "abrupt": share("abrupt", "ours_ratio", 0.5),
        "gradual": share("gradual", "ours_ratio", 1.0),
        "abrupt_pooled": share("abrupt", "pooled_ratio", 0.5),
        "gradual_pooled": share("gradual", "pooled_ratio", 1.0),
        "us_one_by_one": spent["us a sample, one by one"],
        "state_bytes": max(v for k, v in spent.items() if k.startswith(state)),
        "restart_safe": report["restarts"]["same"],
    }


def measure(worlds: Worlds, groups: list[str], *, quick: bool, seed: int) -> dict[str, Any]:
    """Run everything and return the report."""
    rng = np.random.default_rng(seed)
    size = QUICK if quick else FULL
    streams = rng.normal(size=(4, 1500)) + (np.arange(1500) >= 400)
    agree = alarm_rivals.check(streams, rng.normal(size=(4, 200)))
    report: dict[str, Any] = {
        "benchmark": "alarm",
        "seed": seed,
        "quick": quick,
        "groups": groups,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy", "river", "frouros")},
        "same_as_the_real_ones": agree | {OURS: alarm_own.same_as_the_real_one(seed)},
        "cost": alarm_own.cost(5000 if quick else 50_000),
        "restarts": alarm_own.restarts(600, seed),
        "budgets": alarm_own.budgets(*((100, 1e3) if quick else (2000, 1e5)), seed),
        "slow_drift": alarm_own.slow_drift(3 if quick else 40, seed),
    }
    report["proportions"] = {}
    for name in worlds.names:
        known, _ = pools(worlds, name, [])
        report["proportions"][name] = alarm_own.proportions(
            known, streams=40 if quick else 1000, samples=200 if quick else 1000, seed=seed
        )
    report |= measure_delays(worlds, groups, size, seed)
    report["compared"] = compare(report["delays"])
    report["bars"] = bars(report)
    return report


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report and say whether every budget held."""
    parser = arguments("Run lengths and delays of the alarm.", "alarm", encoder="vit-tiny")
    parser.add_argument("--cache", type=Path, default=Path("bench-out") / "worlds")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["near", "far", "domain"])
    parser.add_argument("--quick", action="store_true", help="a smaller run, half a minute")
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser, argv)
    started = time.perf_counter()
    package = encoder("vit-tiny", options.data, options.cache)
    only = ["pacs-photo"] if options.quick else []
    worlds = Worlds(package, options.data, options.cache, progress=print, only=only)
    report = measure(worlds, options.groups, quick=options.quick, seed=options.seed)
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    write(report, options.out)
    if not options.quick:
        alarm_page.write(report)
    print(report["bars"])
    return 0 if report["bars"]["budgets_held"] == report["bars"]["budgets_asked"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
