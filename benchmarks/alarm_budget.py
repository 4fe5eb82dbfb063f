"""Does the alarm keep its false-alarm budget with a small calibration set, and how late is it?

Run lengths without a shift are measured over fresh calibration sets and streams, and cut at a
multiple of the budget, which can only make their mean too small. The test sees scores only through
their ranks among the calibration scores, so one distribution stands for all continuous ones.

    python -m benchmarks.alarm_budget [--quick] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ood.alarm import AlarmState, ShiftTest

FloatArray = npt.NDArray[np.float64]

CALIBRATION_SIZES = (50, 200, 1000)
BUDGETS = (1e3, 1e4)
DELAY_BUDGETS = (1e3, 1e4, 1e6)
# Part of the samples that are shifted, and whether those lie just above the calibration's 90 %
# quantile or above all of it.
SHIFTS = {
    "all far": (1.0, "far"),
    "80 % near": (0.8, "near"),
    "40 % near": (0.4, "near"),
    "30 % far": (0.3, "far"),
    "10 % far": (0.1, "far"),
}
_LIMIT = 4000


def run_lengths(n: int, budget: float, *, runs: int, cap: int, seed: int) -> FloatArray:
    """Measure run lengths without shift, all runs side by side; those over cap count as cap."""
    rng = np.random.default_rng(seed)
    tests = [ShiftTest(rng.random(n), false_alarm_every=budget) for _ in range(runs)]
    thresholds = np.stack([test.thresholds for test in tests])
    above = np.stack([test.gains_above for test in tests])
    below = np.stack([test.gains_below for test in tests])
    evidence = np.zeros_like(thresholds)
    lengths = np.full(runs, float(cap))
    running = np.arange(runs)
    for step in range(1, cap + 1):
        ratio = np.where(rng.random((len(running), 1)) > thresholds, above, below)
        evidence = ratio * (evidence + 1.0)
        stopped = evidence.mean(axis=1) >= tests[0].alarm_at
        if stopped.any():
            lengths[running[stopped]] = step
            keep = ~stopped
            running, evidence = running[keep], evidence[keep]
            thresholds, above, below = thresholds[keep], above[keep], below[keep]
            if not len(running):
                break
    return lengths


def delays(n: int, budget: float, shift: str, *, runs: int, seed: int) -> FloatArray:
    """Measure samples from the shift to the alarm, after 200 unshifted ones; inf for none."""
    part, where = SHIFTS[shift]
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(runs):
        calibration = rng.normal(size=n)
        test = ShiftTest(calibration, false_alarm_every=budget)
        state, alarm = test.update(test.initial_state(), rng.normal(size=200))
        known = rng.normal(size=_LIMIT)
        if where == "near":
            edge = np.quantile(calibration, 0.9)
            known, foreign = np.minimum(known, edge), np.nextafter(edge, np.inf) + 1e-6
        else:
            foreign = calibration.max() + 1
        stream = np.where(rng.random(_LIMIT) < part, foreign, known)
        _, alarm = test.update(state, stream)
        result.append(alarm.at - 200.0 if alarm else np.inf)
    return np.array(result)


def cost() -> dict[str, float]:
    """Measure time per sample, one by one, and the size of the state."""
    test = ShiftTest(np.arange(1000.0), false_alarm_every=1e6)
    state: AlarmState = test.initial_state()
    started = time.perf_counter()
    for _ in range(5000):
        state, _ = test.update(state, [10.0])
    single = (time.perf_counter() - started) / 5000
    started = time.perf_counter()
    test.update(state, np.full(20000, 10.0))
    batched = (time.perf_counter() - started) / 20000
    return {
        "us_per_sample_alone": round(1e6 * single, 1),
        "us_per_sample_in_a_batch": round(1e6 * batched, 1),
        "state_bytes": len(json.dumps(state.to_dict())),
    }


def measure(*, quick: bool, seed: int) -> dict[str, Any]:
    """Run everything and return the report."""
    lengths = []
    for budget in BUDGETS[:1] if quick else BUDGETS:
        for n in CALIBRATION_SIZES:
            runs, cap = (150, 5) if quick else (400, 10 if budget < 1e4 else 5)
            sample = run_lengths(n, budget, runs=runs, cap=int(cap * budget), seed=seed + n)
            low = sample.mean() - 1.645 * sample.std(ddof=1) / np.sqrt(runs)
            lengths.append(
                {
                    "calibration": n,
                    "budget": budget,
                    "runs": runs,
                    "cut_at": cap * budget,
                    "cut": float((sample == cap * budget).mean()),
                    "mean": round(float(sample.mean()), 1),
                    "lower_95": round(float(low), 1),
                    "part_below_a_tenth_of_budget": float((sample < budget / 10).mean()),
                    "holds": bool(low >= budget),
                }
            )
            print(
                f"run length   n={n:<5} budget={budget:<9g} mean≥{sample.mean():.0f} low={low:.0f}"
            )
    found = []
    for budget in DELAY_BUDGETS[-1:] if quick else DELAY_BUDGETS:
        for n in CALIBRATION_SIZES:
            for shift in SHIFTS:
                sample = delays(n, budget, shift, runs=11 if quick else 41, seed=seed + n)
                median, high = np.quantile(sample, [0.5, 0.9], method="higher")
                found.append(
                    {
                        "calibration": n,
                        "budget": budget,
                        "shift": shift,
                        "median": _number(median),
                        "p90": _number(high),
                    }
                )
                print(
                    f"delay        n={n:<5} budget={budget:<9g} {shift:<10} {median:g} ({high:g})"
                )
    return {
        "benchmark": "alarm_budget",
        "seed": seed,
        "quick": quick,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "run_lengths": lengths,
        "delays": found,
        "cost": cost(),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report and say whether every budget held."""
    parser = argparse.ArgumentParser(description="Run lengths and delays of the alarm.")
    parser.add_argument("--quick", action="store_true", help="a smaller run, under 20 seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "alarm_budget.json"
    )
    options = parser.parse_args(argv)
    report = measure(quick=options.quick, seed=options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['cost']}\nwritten to {options.out}")
    return 0 if all(row["holds"] for row in report["run_lengths"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
