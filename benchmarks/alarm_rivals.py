"""The detectors of river and frouros, over many streams at once, and their one parameter.

Each gives every stream a statistic after every sample, and alarms where that reaches a threshold:
the same rule as the library's, which `check` holds against the library's own objects. ADWIN's has
no such form; river's own runs, sample by sample. All see scores in units of the calibration set's
mean and deviation, and all parameters but the threshold are the library's defaults.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MIN_INSTANCES: Final = 30
_PH_ALPHA: Final = 1 - 0.0001
_DELTA: Final = 0.005
_WINDOW, _RECENT = 100, 30
BATCH: Final = 50


def page_hinkley(streams: Floats, _: Floats) -> Floats:
    """PageHinkley of river, upwards."""
    runs, samples = streams.shape
    path = np.full((runs, samples), -np.inf)
    mean, total, least = np.zeros(runs), np.zeros(runs), np.full(runs, np.inf)
    for k in range(samples):
        value = streams[:, k]
        mean += (value - mean) / (k + 1)
        total = _PH_ALPHA * total + (value - mean) - _DELTA
        least = np.minimum(least, total)
        if k + 1 >= _MIN_INSTANCES:
            path[:, k] = total - least
    return path


def cusum(streams: Floats, _: Floats) -> Floats:
    """CUSUM of frouros."""
    runs, samples = streams.shape
    path = np.full((runs, samples), -np.inf)
    mean, total = np.zeros(runs), np.zeros(runs)
    for k in range(samples):
        value = streams[:, k]
        mean += (value - mean) / (k + 1)
        total = np.maximum(0, total + value - mean - _DELTA)
        if k + 1 >= _MIN_INSTANCES:
            path[:, k] = total
    return path


def _positions(seed: int) -> Iterator[list[int]]:
    draws = random.Random(seed)
    while True:
        yield draws.sample(range(_WINDOW - _RECENT), _RECENT)


def kswin(streams: Floats, _: Floats, seed: int = 0) -> Floats:
    """KSWIN of river: the statistic of 30 recent samples and 30 of the 70 before them."""
    runs, samples = streams.shape
    path = np.full((runs, samples), -np.inf)
    sign = np.concatenate([np.full(_RECENT, 1 / _RECENT), np.full(_RECENT, -1 / _RECENT)])
    values = np.ascontiguousarray(streams.T.astype(np.float32)).T
    for k, chosen in zip(range(_WINDOW - 1, samples), _positions(seed), strict=False):
        start = k - _WINDOW + 1
        both = np.hstack(
            [values[:, [start + c for c in chosen]], values[:, k - _RECENT + 1 : k + 1]]
        )
        steps = sign[np.argsort(both, axis=1)].cumsum(axis=1)
        path[:, k] = np.abs(steps).max(axis=1)
    return path


def ks_batch(streams: Floats, calibration: Floats) -> Floats:
    """KSTest of frouros, of every 50 samples against the calibration set."""
    runs, samples = streams.shape
    path = np.full((runs, samples), -np.inf)
    size = calibration.shape[1]
    sign = np.concatenate([np.full(size, 1 / size), np.full(BATCH, -1 / BATCH)])
    for end in range(BATCH, samples + 1, BATCH):
        both = np.hstack([calibration, streams[:, end - BATCH : end]])
        steps = sign[np.argsort(both, axis=1, kind="stable")].cumsum(axis=1)
        path[:, end - 1] = np.abs(steps).max(axis=1)
    return path


def adwin(streams: Floats, delta: float) -> Floats:
    """The first alarm of river's ADWIN on each stream, from 1; inf for never."""
    from river import drift  # noqa: PLC0415 - not a dependency of the project

    found = np.full(len(streams), np.inf)
    for row, stream in enumerate(streams):
        detector = drift.ADWIN(delta=delta)
        update = detector.update
        for place, value in enumerate(stream.tolist(), start=1):
            update(value)
            if detector.drift_detected:
                found[row] = place
                break
    return found


PATHS: Final[dict[str, Callable[[Floats, Floats], Floats]]] = {
    "river PageHinkley": page_hinkley,
    "river KSWIN": kswin,
    "frouros CUSUM": cusum,
    "frouros KSTest": ks_batch,
}
NAMES: Final = ("river ADWIN", *PATHS)


def threshold_for(
    path: Floats, wanted: float, measure: Callable[[float], float], *, at_least: bool
) -> float:
    """The threshold whose run length is nearest to the wanted one, from one side.

    Args:
        path: The statistics without shift.
        wanted: The run length.
        measure: The run length at a threshold.
        at_least: Whether to stay above the wanted run length, or else below.
    """
    peaks = np.maximum.accumulate(path, axis=1)
    levels = np.unique(peaks[np.isfinite(peaks)])
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2 if at_least else (low + high + 1) // 2
        reached = measure(float(levels[middle])) >= wanted
        if at_least:
            low, high = (low, middle) if reached else (middle + 1, high)
        else:
            low, high = (low, middle - 1) if reached else (middle, high)
    return float(levels[low])


def delta_for(streams: Floats, wanted: float, measure: Callable[[Floats], float]) -> float:
    """ADWIN's parameter with a run length just below the wanted one."""
    # A run length falls as delta grows.
    low, high = -12.0, -1e-4
    for _ in range(10):
        middle = (low + high) / 2
        if measure(adwin(streams, 10.0**middle)) >= wanted:
            low = middle
        else:
            high = middle
    return float(10.0**high)


def check(streams: Floats, calibration: Floats) -> dict[str, bool]:
    """Whether the statistics alarm where the libraries' own objects do."""
    from frouros.detectors.concept_drift import CUSUM, CUSUMConfig  # noqa: PLC0415
    from frouros.detectors.data_drift import KSTest  # noqa: PLC0415
    from river import drift  # noqa: PLC0415
    from scipy import stats  # noqa: PLC0415

    def first(update: Callable[[float], bool], stream: Floats) -> float:
        return next((k for k, v in enumerate(stream.tolist(), 1) if update(v)), np.inf)

    def ours(path: Floats, threshold: float) -> float:
        reached = path[0] > threshold
        return float(reached.argmax() + 1) if reached.any() else np.inf

    same = dict.fromkeys(PATHS, True)
    for row, stream in enumerate(streams):
        one, known = streams[row : row + 1], calibration[row]
        hinkley: Any = drift.PageHinkley(mode="up", threshold=20.0)
        summed: Any = CUSUM(config=CUSUMConfig(lambda_=20.0))
        window: Any = drift.KSWIN(alpha=0.001, seed=row)
        level = next(
            d / _RECENT - 1e-6
            for d in range(1, _RECENT + 1)
            if stats.ks_2samp(np.arange(_RECENT), np.arange(_RECENT) + d - 0.5).pvalue <= 0.001
        )

        def hinkley_alarms(value: float, detector: Any = hinkley) -> bool:
            detector.update(value)
            return bool(detector.drift_detected)

        def cusum_alarms(value: float, detector: Any = summed) -> bool:
            detector.update(value=value)
            return bool(detector.drift)

        def window_alarms(value: float, detector: Any = window) -> bool:
            detector.update(value)
            return bool(detector.drift_detected)

        batch = KSTest()
        batch.fit(X=known)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statistic = batch.compare(X=stream[:BATCH])[0].statistic
        short = one[:, :600]
        pairs = {
            "river PageHinkley": (
                ours(page_hinkley(one, known), 20.0),
                first(hinkley_alarms, stream),
            ),
            "frouros CUSUM": (ours(cusum(one, known), 20.0), first(cusum_alarms, stream)),
            "river KSWIN": (ours(kswin(short, known, row), level), first(window_alarms, short[0])),
            "frouros KSTest": (
                round(float(ks_batch(one, calibration[row : row + 1])[0, BATCH - 1]), 9),
                round(float(statistic), 9),
            ),
        }
        for name, (mine, theirs) in pairs.items():
            same[name] &= mine == theirs
    return same
