"""Random projections that every device draws alike.

What is compared between devices must be projected alike, so the numbers come from SHAKE-256 and
basic arithmetic, not from a generator whose stream a library may change.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ood.errors import OodError
from ood.validation import FloatArray


def gaussian_matrix(rows: int, columns: int, *, seed: str, purpose: str) -> FloatArray:
    """Return a matrix of independent standard normal numbers, float64 [rows, columns].

    Args:
        rows: ≥ 1.
        columns: ≥ 1.
        seed: usually the encoder's digest.
        purpose: keeps matrices of different uses independent.

    Raises:
        OodError: the seed is empty.
    """
    if not seed:
        raise OodError("the seed is empty; give the encoder's digest")
    pairs = (rows * columns + 1) // 2
    stream = hashlib.shake_256(f"driftkeel\0{purpose}\0{seed}".encode()).digest(pairs * 8)
    words = np.frombuffer(stream, dtype="<u4").reshape(2, pairs)
    # Box–Muller on the open interval.
    uniform = (words.astype(np.float64) + 0.5) / 2**32
    radius = np.sqrt(-2 * np.log(uniform[0]))
    angle = 2 * np.pi * uniform[1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normal[: rows * columns].reshape(rows, columns)
