"""What the pixels of a frame say before any network sees it: is there a picture at all?

A few facts a frame, cheap enough for every answer: the agent computes and journals them,
`ood.kinds` compares those of a window with those of the known world, and training leaves out the
frames that a broken sensor gave. Pure; decodes nothing and keeps no image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ood.errors import OodError

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
# One edge of the frame shows one value in so many more frames than among known ones: also a part
# that is often empty, as the end of a short sound is in its spectrogram, is dead then.
_EXCESS: Final = 0.35
_LEAST: Final = 16
# The first version noted no more than the first ten facts.
_FIRST_PACKED: Final = struct.Struct("<9fI")
_PACKED: Final = struct.Struct("<9fI4fB")


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
        coarse: The mean absolute difference between pixels two apart; NaN, as the next three are,
            where the facts were noted by a version that did not look.
        floor: The brightness below which 2% of the pixels lie.
        noise: The lower quartile of the absolute response to Immerkaer's noise mask ("Fast noise
            variance estimation", 1996): what is left in the smooth parts of the frame.
        chroma: The mean absolute difference of red less green between neighbours in a row.
        edges: Which of the top, bottom, left and right 45% of the frame hold one value, as bits.
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
    coarse: float = float("nan")
    floor: float = float("nan")
    noise: float = float("nan")
    chroma: float = float("nan")
    edges: int = 0

    @property
    def complete(self) -> bool:
        """Whether all facts were noted."""
        return bool(np.isfinite((self.coarse, self.floor, self.noise, self.chroma)).all())

    def to_bytes(self) -> bytes:
        """The facts as the journal keeps them, 57 bytes."""
        return _PACKED.pack(*astuple(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> FrameFacts:
        """What `to_bytes` gave, also that of the first version, 40 bytes.

        Raises:
            OodError: The bytes are no facts.
        """
        layouts = {layout.size: layout for layout in (_PACKED, _FIRST_PACKED)}
        if len(data) not in layouts:
            sizes = " or ".join(map(str, layouts))
            raise OodError(f"frame facts are {sizes} bytes; found {len(data)}")
        values = layouts[len(data)].unpack(data)
        if not np.isfinite(values[:9]).all():
            raise OodError("frame facts hold NaN or infinity; the journal is damaged")
        return cls(*values)


@dataclass(frozen=True)
class Limits:
    """What the known world's own frames may look like; beyond it a frame is a fault.

    Attributes:
        normal: Faults that known frames show too, by which nothing is said here.
        rows: Frames with a larger band of rows of one value are partly dead.
        columns: The same of columns.
        edges: The share of known frames that hold one value at the top, bottom, left and right.
    """

    normal: tuple[str, ...] = ()
    rows: float = _DEAD
    columns: float = _DEAD
    edges: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, known: Sequence[FrameFacts]) -> Limits:
        """The limits that frames of the known world suggest; the defaults where they are few."""
        if len(known) < _FEW:
            return cls()
        bands = np.quantile([(frame.rows, frame.columns) for frame in known], 0.99, axis=0)
        rows, columns = (max(_DEAD, float(band) + _BAND_MARGIN) for band in bands)
        whole = [frame for frame in known if frame.complete]
        # Of frames that an earlier version noted it is not known whether an edge was empty.
        edges = (
            tuple(_dead_edges(whole).mean(axis=0).tolist()) if len(whole) >= _FEW else (1.0,) * 4
        )
        found = [cls(rows=rows, columns=columns, edges=edges).fault(frame) for frame in known]
        found += ["frozen" for frame in repeated(known) if frame]
        normal = {what for what in found if what and found.count(what) >= _NORMAL * len(known)}
        return cls(tuple(sorted(normal)), rows, columns, edges)

    def fault(self, frame: FrameFacts) -> str:
        """What is wrong with a frame by itself, for a person; empty when it may be a picture."""
        what = ""
        if frame.mean <= _BLACK_MEAN and frame.spread <= _BLACK_SPREAD:
            what = "black"
        elif frame.bright >= _BLOWN:
            what = "saturated"
        elif frame.spread <= _EVEN:
            what = "blank"
        elif frame.rows >= self.rows or frame.columns >= self.columns or self._unusual(frame):
            what = "partly dead"
        return "" if what in self.normal else what

    def _unusual(self, frame: FrameFacts) -> bool:
        """Whether an edge holds one value that does so in next to no known frame."""
        return any(frame.edges >> k & 1 and share < _NORMAL for k, share in enumerate(self.edges))

    def faults(self, frames: Sequence[FrameFacts]) -> list[str]:
        """What is wrong with each frame of a sequence: also that it shows what one before did.

        An edge that is often empty among known frames, and empty in many more of these, counts as
        dead wherever it is empty here: which of those frames are sound cannot be told.
        """
        if not frames:
            return []
        again = repeated(frames) if "frozen" not in self.normal else [False] * len(frames)
        dead = _dead_edges(frames)
        known = np.array(self.edges)
        excess = (dead.mean(axis=0) - known) / np.maximum(1.0 - known, _NORMAL)
        suspect = (dead & (excess >= _EXCESS)).any(axis=1) & (len(frames) >= _LEAST)
        return [
            self.fault(frame) or ("partly dead" if part else "frozen" if repeat else "")
            for frame, part, repeat in zip(frames, suspect, again, strict=True)
        ]


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


def _facts(image: Images) -> FrameFacts:
    red, green, blue = image.transpose(2, 0, 1).astype(np.int16)
    grey = red + green + blue
    least = np.minimum(np.minimum(red, green), blue)
    value = grey.astype(np.float32) / 3.0
    across, down = np.abs(np.diff(value, axis=1)), np.abs(np.diff(value, axis=0))
    bend = np.abs(value[:, 1:-1] - (value[:, 2:] + value[:, :-2]) / 2.0)
    further = (value[:, 2:] - value[:, :-2], value[2:] - value[:-2])
    lines = value[:, 2:] - 2.0 * value[:, 1:-1] + value[:, :-2]
    left = np.abs(lines[2:] - 2.0 * lines[1:-1] + lines[:-2])
    return FrameFacts(
        mean=float(value.mean()),
        spread=float(value.std()),
        dark=float((value <= _DARK).mean()),
        bright=float((value >= _BRIGHT).mean()),
        detail=float((across.mean() + down.mean()) / 2.0),
        grain=float(bend.mean()) if bend.size else 0.0,
        colour=float((np.maximum(np.maximum(red, green), blue) - least).mean()),
        rows=_band(grey),
        columns=_band(grey.T),
        digest=zlib.crc32(image.tobytes()),
        coarse=sum(float(np.abs(part).mean()) if part.size else 0.0 for part in further) / 2.0,
        floor=float(np.quantile(value, 0.02)),
        noise=float(np.quantile(left, 0.25)) if left.size else 0.0,
        chroma=float(np.abs(np.diff(red - green, axis=1)).mean()),
        edges=_edges(grey),
    )


def _edges(grey: npt.NDArray[np.int16]) -> int:
    rows, columns = (max(1, round(_DEAD * side)) for side in grey.shape)
    parts = (grey[:rows], grey[-rows:], grey[:, :columns], grey[:, -columns:])
    return sum(1 << place for place, part in enumerate(parts) if part.min() == part.max())


def _dead_edges(frames: Sequence[FrameFacts]) -> npt.NDArray[np.bool_]:
    """Which edges hold one value, bool [n, 4]."""
    found = np.array([frame.edges for frame in frames], np.int64)
    return np.asarray((found[:, None] >> np.arange(4)) & 1, np.bool_)


def _band(grey: npt.NDArray[np.int16]) -> float:
    """The share of rows in the longest run of rows that hold one value, the same in all."""
    low, high = grey.min(axis=1), grey.max(axis=1)
    run, longest, value = 0, 0, -1
    for least, most in zip(low.tolist(), high.tolist(), strict=True):
        run = 0 if least != most else run + 1 if run and least == value else 1
        value, longest = least, max(longest, run)
    return longest / len(grey)
