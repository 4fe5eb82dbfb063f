"""What the pixels of a frame say before any network sees it: is there a picture at all?

A few facts a frame, cheap enough for every answer: the agent computes and journals them,
`ood.kinds` compares those of a window with those of the known world, and training leaves out the
frames that a broken sensor gave. Pure; decodes nothing and keeps no image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError
from ood.validation import FloatArray

Images = npt.NDArray[np.uint8]

# Values of a pixel, of 255, that count as no light and as all the sensor can tell.
_DARK, _BRIGHT = 5, 250
# A frame that is this even, in grey levels, shows nothing whatever its level.
_EVEN: Final = 1.0
_BLACK_MEAN, _BLACK_SPREAD = 10.0, 6.0
_BLOWN: Final = 0.95
# A dead part of the sensor gives whole rows or columns of one value.
_DEAD: Final = 0.45
_BAND_MARGIN: Final = 0.05
# Fewer known frames say nothing about what is normal; a fault in this share of them is.
_FEW, _NORMAL = 20, 0.02
_PACKED: Final = struct.Struct("<9fI")


@dataclass(frozen=True)
class FrameFacts:
    """What is noted of one frame.

    Attributes:
        mean: The mean brightness, 0..255.
        spread: The standard deviation of the brightness over the frame.
        dark: The share of pixels that are black.
        bright: The share of pixels at the upper end of the range.
        detail: The mean absolute difference between neighbouring pixels.
        grain: The mean absolute difference between a pixel and the mean of its two neighbours in a
            row: noise gives much of it for its detail, a blurred picture little.
        colour: The mean difference between a pixel's largest and smallest channel.
        rows: The largest share of the frame in one band of whole rows of one value.
        columns: The same of whole columns.
        digest: A checksum of the pixels; two frames that agree in it are the same frame.
    """

    mean: float
    spread: float
    dark: float
    bright: float
    detail: float
    grain: float
    colour: float
    rows: float
    columns: float
    digest: int

    def to_bytes(self) -> bytes:
        """The facts as the journal keeps them, 40 bytes."""
        return _PACKED.pack(*astuple(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> FrameFacts:
        """What `to_bytes` gave.

        Raises:
            OodError: The bytes are no facts.
        """
        if len(data) != _PACKED.size:
            raise OodError(f"frame facts are {_PACKED.size} bytes; found {len(data)}")
        values = _PACKED.unpack(data)
        if not np.isfinite(values[:-1]).all():
            raise OodError("frame facts hold NaN or infinity; the journal is damaged")
        return cls(*values)


@dataclass(frozen=True)
class Limits:
    """What the known world's own frames may look like; beyond it a frame is a fault.

    Attributes:
        normal: Faults that known frames show too, by which nothing is said here.
        rows: Frames with a larger band of rows of one value are partly dead.
        columns: The same of columns.
    """

    normal: tuple[str, ...] = ()
    rows: float = _DEAD
    columns: float = _DEAD

    @classmethod
    def of(cls, known: Sequence[FrameFacts]) -> Limits:
        """The limits that frames of the known world suggest; the defaults where they are few."""
        if len(known) < _FEW:
            return cls()
        bands = np.quantile([(frame.rows, frame.columns) for frame in known], 0.99, axis=0)
        rows, columns = (max(_DEAD, float(band) + _BAND_MARGIN) for band in bands)
        found = [cls(rows=rows, columns=columns).fault(frame) for frame in known]
        found += ["frozen" for frame in repeated(known) if frame]
        normal = {what for what in found if what and found.count(what) >= _NORMAL * len(known)}
        return cls(tuple(sorted(normal)), rows, columns)

    def fault(self, frame: FrameFacts) -> str:
        """What is wrong with a frame by itself, for a person; empty when it may be a picture."""
        what = ""
        if frame.mean <= _BLACK_MEAN and frame.spread <= _BLACK_SPREAD:
            what = "black"
        elif frame.bright >= _BLOWN:
            what = "saturated"
        elif frame.spread <= _EVEN:
            what = "blank"
        elif frame.rows >= self.rows or frame.columns >= self.columns:
            what = "partly dead"
        return "" if what in self.normal else what

    def faults(self, frames: Sequence[FrameFacts]) -> list[str]:
        """What is wrong with each frame of a sequence: also that it shows what one before did."""
        again = repeated(frames) if "frozen" not in self.normal else [False] * len(frames)
        return [
            self.fault(frame) or ("frozen" if repeat else "")
            for frame, repeat in zip(frames, again, strict=True)
        ]


NUMBERS: Final = tuple(field.name for field in fields(FrameFacts) if field.name != "digest")


def frame_facts(images: Images) -> list[FrameFacts]:
    """Look at frames.

    Args:
        images: uint8 [n, h, w, 3], h and w at least 2.

    Raises:
        OodError: The array is of another type or shape.

    Example:
        >>> Limits().fault(frame_facts(np.zeros((1, 8, 8, 3), np.uint8))[0])
        'black'
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise OodError(f"frames are {images.dtype} {list(images.shape)}; expected uint8 [n,h,w,3]")
    if len(images) and min(images.shape[1:3]) < 2:
        raise OodError(f"frames of {images.shape[2]} x {images.shape[1]} pixels say nothing")
    return [_facts(image) for image in images]


def repeated(facts: Sequence[FrameFacts]) -> npt.NDArray[np.bool_]:
    """Which frames, bool [n], show exactly what one before them in the sequence showed."""
    seen: set[int] = set()
    result = []
    for frame in facts:
        result.append(frame.digest in seen)
        seen.add(frame.digest)
    return np.array(result, dtype=np.bool_)


def numbers(facts: Sequence[FrameFacts]) -> FloatArray:
    """The facts but the digest, float64 [n, 9], in the order of `NUMBERS`."""
    return np.array([[getattr(frame, name) for name in NUMBERS] for frame in facts], np.float64)


def _facts(image: Images) -> FrameFacts:
    wide = image.astype(np.int16)
    grey = wide.sum(axis=2, dtype=np.int16)
    value = grey.astype(np.float32) / 3.0
    across, down = np.abs(np.diff(value, axis=1)), np.abs(np.diff(value, axis=0))
    bend = np.abs(value[:, 1:-1] - (value[:, 2:] + value[:, :-2]) / 2.0)
    return FrameFacts(
        mean=float(value.mean()),
        spread=float(value.std()),
        dark=float((value <= _DARK).mean()),
        bright=float((value >= _BRIGHT).mean()),
        detail=float((across.mean() + down.mean()) / 2.0),
        grain=float(bend.mean()) if bend.size else 0.0,
        colour=float((wide.max(axis=2) - wide.min(axis=2)).mean()),
        rows=_band(grey),
        columns=_band(grey.T),
        digest=zlib.crc32(image.tobytes()),
    )


def _band(grey: npt.NDArray[np.int16]) -> float:
    """The share of rows in the longest run of rows that hold one value, the same in all."""
    low, high = grey.min(axis=1), grey.max(axis=1)
    run, longest, value = 0, 0, -1
    for least, most in zip(low.tolist(), high.tolist(), strict=True):
        run = 0 if least != most else run + 1 if run and least == value else 1
        value, longest = least, max(longest, run)
    return longest / len(grey)
