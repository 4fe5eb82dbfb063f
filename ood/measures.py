"""The numbers by which new classes and a new look of known ones are told apart.

Called by `ood.kinds`, which weighs them. None has a unit, so that they mean the same in every world
and encoder. Pure; decides nothing.

Known classes that look new keep their arrangement: once the window is moved to where known samples
lie, each answered class's samples lie towards that class's mean, and the best class wins clearly.
A worn, dirty or mistuned sensor also leaves marks that no scene has: noise, blur, veil. Pictures of
other things are as clean as the known ones, whatever they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ood.frames import FrameFacts
from ood.known import Known
from ood.validation import FloatArray

# Samples less likely than this to be of the known world are foreign, as for the episode.
FOREIGN_P: Final = 0.1
# Fewer known frames say nothing about the look.
MIN_FRAMES: Final = 20
FEATURE_MEASURES: Final = (
    "foreign",
    "displacement",
    "covariance",
    "margin",
    "alignment",
    "far_alignment",
)
LOOK_MEASURES: Final = ("look_scale", "look_floor", "floor", "look_noise", "look_chroma")
_FLOOR: Final = 1e-9
# Grey levels.
_FLOOR_UNIT: Final = 40.0


def measures(rows: FloatArray, known: Known, frames: Sequence[FrameFacts] = ()) -> dict[str, float]:
    """Measure a window.

    Args:
        rows: l2-normalised base features [n, d], n ≥ 8.
        known: The known world.
        frames: Facts of the same frames, n or none.

    Returns:
        `FEATURE_MEASURES`; also `LOOK_MEASURES` where all facts were noted of all frames and of 20
        known ones or more.
    """
    distances = known.mixture.head.distances(rows)
    scores = distances.min(axis=1)
    far = np.argsort(-scores, kind="stable")[: max(len(rows) // 2, 8)]
    moved = known.moved_back(rows)
    found = {
        "foreign": float((known.calibration.p_values(scores) <= FOREIGN_P).mean()),
        "displacement": _displacement(rows, known.features),
        "covariance": _cosine(np.cov(rows.T), np.cov(known.features.T)),
        "margin": _log(_margin(moved, known) / max(_margin(known.features, known), _FLOOR)),
        "alignment": _alignment(rows, known),
        "far_alignment": _alignment(known.moved_back(rows[far]), known),
    }
    former = [frame for frame in known.frames if frame.complete]
    if frames and len(former) >= MIN_FRAMES and all(frame.complete for frame in frames):
        found |= _look(frames, former)
    return found


def _displacement(rows: FloatArray, known: FloatArray) -> float:
    """The energy of the common displacement, its noise taken off, of the known variance."""
    shift = rows.mean(axis=0) - known.mean(axis=0)
    noise = rows.var(axis=0, ddof=1).sum() / len(rows)
    return _log((shift @ shift - noise) / max(known.var(axis=0).sum(), _FLOOR), floor=0.01)


def _margin(rows: FloatArray, known: Known) -> float:
    """By how much the nearest class is nearer than the next, on average; 0 of one class."""
    distances = known.mixture.head.distances(rows)
    if distances.shape[1] < 2:
        return 0.0
    nearest = np.partition(distances, 1, axis=1)
    return float((nearest[:, 1] - nearest[:, 0]).mean())


def _alignment(rows: FloatArray, known: Known) -> float:
    """The mean cosine between where an answered class's samples lie and where its mean does.

    Both seen from the middle of the window and of the known classes; classes weigh by their
    samples, those of one sample not at all.
    """
    means = known.mixture.head.means
    answered = known.mixture.head.distances(rows).argmin(axis=1)
    sizes = np.bincount(answered, minlength=len(means))
    classes = np.flatnonzero(sizes >= 2)
    if not classes.size:
        return 0.0
    middle, known_middle = rows.mean(axis=0), means.mean(axis=0)
    cosines = [
        _cosine(rows[answered == k].mean(axis=0) - middle, means[k] - known_middle) for k in classes
    ]
    return float(np.average(cosines, weights=sizes[classes]))


def _look(frames: Sequence[FrameFacts], known: Sequence[FrameFacts]) -> dict[str, float]:
    """Where the median frame lies, and by how many known standard deviations it looks different."""
    found, former = _looks(frames), _looks(known)
    now = np.median(found, axis=0)
    unit = np.sqrt(former.var(axis=0) + 0.02)
    _, floor, noise, chroma = (now - np.median(former, axis=0)) / unit
    return {
        # Scenes look much the same at every scale (Ruderman and Bialek, 1994), so that their
        # differences over one and two pixels have a usual ratio; noise and blur have not.
        "look_scale": float(now[0]),
        "look_floor": float(np.sign(floor) * np.log1p(abs(floor))),
        "floor": float(now[1]) * _FLOOR_UNIT,
        "look_noise": float(np.log(0.2 + abs(noise))),
        "look_chroma": float(np.log(0.2 + abs(chroma))),
    }


def _looks(frames: Sequence[FrameFacts]) -> FloatArray:
    """Scale, floor, noise and chroma of each frame, [n, 4]."""
    detail, coarse, floor, noise, chroma = np.array(
        [(f.detail, f.coarse, f.floor, f.noise, f.chroma) for f in frames], np.float64
    ).T
    return np.stack(
        [
            np.log((detail + 0.5) / (coarse + 0.5)),
            floor / _FLOOR_UNIT,
            np.log(noise + 1.0),
            np.log((chroma + 1.0) / (detail + 1.0)),
        ],
        axis=1,
    )


def _cosine(first: FloatArray, second: FloatArray) -> float:
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / size if size > _FLOOR else 0.0


def _log(value: float, *, floor: float = 0.001) -> float:
    return float(np.log(max(float(value), floor)))
