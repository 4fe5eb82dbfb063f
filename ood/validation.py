"""What every public function of this package demands of the arrays and labels it is given.

Each check returns the value in the form the mathematics wants (float64, contiguous) or raises
`OodError` naming what was found and what was expected. Nothing is repaired silently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ood.errors import OodError

FloatArray = npt.NDArray[np.float64]


def check_features(features: npt.ArrayLike, *, dim: int | None = None) -> FloatArray:
    """Return features as float64 [n, d], n ≥ 1, d ≥ 1, all finite.

    Args:
        features: real numbers [n, d].
        dim: the d that is expected, if it is known.

    Raises:
        OodError: the array is not real, not two-dimensional, empty, of another dimension, or holds
            NaN or infinity.
    """
    array = _real(features, "features")
    if array.ndim != 2:
        raise OodError(f"features must have shape [n, d]; found shape {array.shape}")
    if 0 in array.shape:
        raise OodError(f"features are empty: shape {array.shape}; give at least one sample")
    if dim is not None and array.shape[1] != dim:
        raise OodError(f"features have dimension {array.shape[1]}; expected {dim}")
    return _finite(array, "features")


def check_scores(scores: npt.ArrayLike, *, what: str = "scores") -> FloatArray:
    """Return scores as float64 [n], n ≥ 1, all finite.

    Raises:
        OodError: the array is not real, not one-dimensional, empty, or holds NaN or infinity.
    """
    array = _real(scores, what)
    if array.ndim != 1:
        raise OodError(f"{what} must have shape [n]; found shape {array.shape}")
    if array.size == 0:
        raise OodError(f"{what} are empty; give at least one")
    return _finite(array, what)


def check_labels(labels: Sequence[str], *, samples: int) -> list[str]:
    """Return the labels as a list of non-empty strings, one for each sample.

    Raises:
        OodError: a label is empty or no string, or their number is not the number of samples.
    """
    if isinstance(labels, str):
        raise OodError(f"labels must be a sequence of strings; found the one string {labels!r}")
    names = [str(label) if isinstance(label, np.str_) else label for label in labels]
    if len(names) != samples:
        raise OodError(f"found {len(names)} labels for {samples} samples; give one for each")
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise OodError(f"label {row} is {name!r} of type {type(name).__name__}; expected str")
        if not name:
            raise OodError(f"label {row} has zero length; every class needs a name")
    return names


def _real(values: npt.ArrayLike, what: str) -> npt.NDArray[np.generic]:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise OodError(f"{what} must be real numbers; found dtype {array.dtype}")
    return array


def _finite(array: npt.NDArray[np.generic], what: str) -> FloatArray:
    result = np.ascontiguousarray(array, dtype=np.float64)
    if not np.isfinite(result).all():
        bad = np.flatnonzero(~np.isfinite(result).reshape(len(result), -1).all(axis=1))
        raise OodError(f"{what} hold NaN or infinity in {len(bad)} rows, the first is row {bad[0]}")
    return result
