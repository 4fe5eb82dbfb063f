"""What the alarm does alone: run lengths at a budget, proportions, slow drift, cost, restarts.

Called by `benchmarks.alarm`. The test sees scores only through their ranks among the calibration
scores, so one distribution stands for all continuous ones.
"""

from __future__ import annotations

import json
import time
from typing import Any, Final

import numpy as np

from benchmarks.alarm_delays import CORRELATION, SCENE, Stretch, evidence
from benchmarks.alarm_streams import Evidence, Floats, Pool, first_above
from ood.alarm import AlarmState, ShiftTest
from ood.exceedance import Exceedance

CALIBRATION: Final = (50, 200, 1000)
# Samples that an AR(1) process of 0.9 needs to forget: its correlation is then 0.005.
APART: Final = 50
CUT: Final = 2.5
_DRIFT: Final = 20_000


def run_lengths(n: int, budget: float, kind: str, block: int, *, runs: int, seed: int) -> Floats:
    """First run lengths without shift, in samples, cut at 2.5 budgets; all runs side by side."""
    rng = np.random.default_rng([seed, n, int(budget), block])
    alarm_at = ShiftTest([0.0], false_alarm_every=budget, block=block).alarm_at
    running = Evidence([Exceedance.fit(rng.normal(size=n), None) for _ in range(runs)])
    steps = int(CUT * budget / block)
    lengths = np.full(runs, float(steps * block))
    left = np.arange(runs)
    carried = CORRELATION**block if kind == "AR(1)" else 0.0
    score = rng.normal(size=runs)
    for step in range(steps):
        if kind != "scenes" or step * block % SCENE == 0:
            score = carried * score + np.sqrt(1 - carried**2) * rng.normal(size=len(left))
        stopped = running.step(score) >= alarm_at
        if stopped.any():
            lengths[left[stopped]] = step * block + 1
            left, score = left[~stopped], score[~stopped]
            running.keep(~stopped)
            if not len(left):
                break
    return lengths


def budgets(runs: int, largest: float, seed: int) -> list[dict[str, Any]]:
    """Whether the mean run length is at least the budget, by 95 % confidence."""
    found = []
    for budget in (b for b in (1e3, 1e4, 1e5) if b <= largest):
        for n in CALIBRATION:
            for kind, block in (
                ("independent", 1),
                ("AR(1)", APART),
                ("scenes", SCENE),
                ("AR(1)", 1),
                ("scenes", 1),
            ):
                if block == 1 and kind != "independent" and budget > 1e3:
                    continue
                sample = run_lengths(n, budget, kind, block, runs=runs, seed=seed)
                low = sample.mean() - 1.645 * sample.std(ddof=1) / np.sqrt(runs)
                found.append(
                    {
                        "calibration": n,
                        "budget": budget,
                        "stream": kind,
                        "block": block,
                        "runs": runs,
                        "cut_at": CUT * budget,
                        "cut": round(float((sample >= CUT * budget).mean()), 3),
                        "mean": round(float(sample.mean()), 1),
                        "lower_95": round(float(low), 1),
                        "below_a_tenth": round(float((sample < budget / 10).mean()), 4),
                        "holds": bool(low >= budget),
                    }
                )
                print(f"run length {kind} block={block} n={n} budget={budget:g} low={low:.0f}")
    return found


def proportions(known: Pool, *, streams: int, samples: int, seed: int) -> dict[str, Any]:
    """Alarms within some samples at a budget of 10,000, where only proportions change.

    Every stream has proportions of its own, drawn from a Dirichlet distribution of 0.3: a few
    classes are nearly all of it. They are those of the nearest classes (what the guarantee is
    about) or of the true ones (what the world would do).
    """
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {"budget": 1e4, "samples": samples, "streams": streams}
    for n in (200, 1000):
        for name, owner in (("nearest", known.nearest), ("true", known.labels)):
            present = np.unique(owner)
            weight = rng.dirichlet(np.full(len(present), 0.3), size=streams)
            classes = np.stack([rng.choice(present, samples, p=row) for row in weight])
            rows = np.empty_like(classes)
            for k in present:
                at = classes == k
                rows[at] = rng.choice(np.flatnonzero(owner == k), at.sum())
            stretch = Stretch(*known.take(rows, rng), *known.draw((streams, n), rng))
            for by_class in (True, False):
                first = first_above(evidence(stretch, by_class=by_class), 1e4)
                key = f"{name}, {'by class' if by_class else 'one pool'}, n={n}"
                result[key] = round(float(np.isfinite(first).mean()), 4)
    return result


def slow_drift(runs: int, seed: int) -> list[dict[str, Any]]:
    """A Gaussian score that rises by 1.5 deviations over 20,000 samples, at a budget of 1e6."""
    found = []
    for n in CALIBRATION:
        rng = np.random.default_rng([seed, n])
        tests = [ShiftTest(rng.normal(size=n), false_alarm_every=1e6) for _ in range(runs)]
        drift = np.concatenate([np.zeros(1000), np.linspace(0, 1.5, _DRIFT)])
        delays = []
        for test in tests:
            scores = rng.normal(size=len(drift)) + drift
            alarm = test.update(test.initial_state(), scores)[1]
            delays.append(alarm.at - 1000 if alarm else np.inf)
        median, high = np.quantile(delays, [0.5, 0.9], method="higher")
        found.append(
            {
                "calibration": n,
                "runs": runs,
                "median": float(median) if np.isfinite(median) else None,
                "p90": float(high) if np.isfinite(high) else None,
                "drift_at_median": round(1.5 * float(median) / _DRIFT, 3),
            }
        )
    return found


def cost(samples: int) -> dict[str, float]:
    """Processor time per sample, alone and in a batch, and the largest state."""
    rng = np.random.default_rng(0)
    result: dict[str, float] = {}
    for name, watched in (("", False), (" watching proportions", True)):
        owner = np.arange(1000) % 10
        test = ShiftTest(
            rng.normal(size=1000), false_alarm_every=1e6, class_of=owner, prior_changes=watched
        )
        scores, classes = rng.normal(size=samples), rng.integers(0, 10, samples)
        state = test.initial_state()
        started = time.process_time()
        test.update(state, scores, classes)
        result[f"us a sample, batch{name}"] = (time.process_time() - started) / samples * 1e6
        singles = [(scores[k : k + 1], classes[k : k + 1]) for k in range(samples // 10)]
        started = time.process_time()
        for score, class_ in singles:
            state, _ = test.update(state, score, class_)
        result[f"us a sample, one by one{name}"] = (
            (time.process_time() - started) / len(singles) * 1e6
        )
        for classes_ in (10, 400):
            many = ShiftTest(
                rng.normal(size=20 * classes_),
                false_alarm_every=1e6,
                class_of=np.arange(20 * classes_) % classes_,
                prior_changes=watched,
            )
            after, _ = many.update(
                many.initial_state(), rng.normal(size=20_000), rng.integers(0, classes_, 20_000)
            )
            result[f"bytes of state, {classes_} classes{name}"] = len(json.dumps(after.to_dict()))
    return {key: round(value, 1) for key, value in result.items()}


def restarts(samples: int, seed: int) -> dict[str, Any]:
    """A process that dies between any two samples: the decisions are to be the same."""
    rng = np.random.default_rng(seed)
    calibration, owner = rng.normal(size=200), np.arange(200) % 5
    scores = rng.normal(size=samples) + (np.arange(samples) // 300 % 2)
    classes = rng.integers(0, 6, samples)

    def fresh() -> ShiftTest:
        return ShiftTest(calibration, false_alarm_every=200, class_of=owner)

    whole, _ = fresh().update(fresh().initial_state(), scores, classes)
    state, heard = fresh().initial_state(), 0
    for k in range(samples):
        state = AlarmState.from_dict(json.loads(json.dumps(state.to_dict())))
        state, alarm = fresh().update(state, scores[k : k + 1], classes[k : k + 1])
        heard += alarm is not None
    return {"samples": samples, "alarms": whole.alarms, "same": state == whole}


def same_as_the_real_one(seed: int) -> bool:
    """Whether the side-by-side evidence alarms where `ShiftTest` does."""
    rng = np.random.default_rng(seed)
    for n in (50, 200):
        owner = rng.integers(0, 4, n)
        calibration = rng.normal(size=n)
        scores = rng.normal(size=(1, 600)) + np.repeat([0.0, 0.8], 300)
        classes = rng.integers(0, 4, (1, 600))
        test = ShiftTest(calibration, false_alarm_every=500, class_of=owner)
        _, alarm = test.update(test.initial_state(), scores[0], classes[0])
        path = evidence(Stretch(scores, classes, calibration[None], owner[None]), by_class=True)
        if first_above(path, 500)[0] != (alarm.at if alarm else np.inf):
            return False
    return True
