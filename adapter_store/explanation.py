"""Why an alarm fired, as a document: words, and the numbers of one picture.

A device makes it, the catalogue keeps it, both show it. It names samples by their ids and carries
nothing of them. Every field is bounded, so that the largest document has about 40 KB and what a
stranger sends can be decoded, kept and drawn without harm. Drawing is `adapter_store.plot`'s.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Final

import msgspec

from adapter_store.labels import MAX_LABEL

MAX_BINS: Final = 64
MAX_POINTS: Final = 256
MAX_WORDS: Final = 8
MAX_SENTENCE: Final = 500
MAX_NAMES: Final = 8
MAX_GROUPS: Final = 8
# Larger numbers than any score or evidence, and small enough to be subtracted and drawn.
MAX_NUMBER: Final = 1e100
_ROUNDING: Final = 1e-6
_WIDTH: Final = 30

Label = Annotated[str, msgspec.Meta(max_length=MAX_LABEL)]
SampleId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]
Sentence = Annotated[str, msgspec.Meta(max_length=MAX_SENTENCE)]
Number = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0 + _ROUNDING)]
Level = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_NUMBER)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
SampleIds = Annotated[tuple[SampleId, ...], msgspec.Meta(max_length=MAX_NAMES)]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Samples that fit no class and lie together; a person is asked to name them.

    Attributes:
        size: How many they are.
        sample_ids: Those nearest to their centre.
        nearest: The known class they lie nearest to.
        distance: How far from it, in spreads of a class.
    """

    size: Count
    sample_ids: SampleIds
    nearest: Label
    distance: Level


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why an episode began.

    Make it with `msgspec.convert`, which checks the limits of its fields.

    Attributes:
        episode: The episode's number.
        kind: What kind of shift it is; empty when that is not known.
        words: Sentences, the most important first.
        bins: Edges of the score histogram, one more than it has bins, rising.
        known: The share of calibration scores in each bin.
        shifted: The share of scores since the onset in each bin.
        seqs: Journal numbers of the samples whose evidence is given, rising.
        evidence: The sequential test's evidence after each.
        alarm_at: The evidence that raises an alarm.
        onset_seq: The first sample believed to be shifted.
        alarm_seq: The sample that raised the alarm.
        nearest: Known classes that samples since the onset are answered as, with their shares.
        examples: Ids of the samples since the onset that look most foreign.
        groups: Groups of samples that a person is asked to name, as the diagnosis found them.

    Raises:
        ValueError: Parts that belong together do not fit, or a number is not finite.
    """

    episode: Count
    kind: Annotated[str, msgspec.Meta(max_length=64)] = ""
    words: Annotated[tuple[Sentence, ...], msgspec.Meta(min_length=1, max_length=MAX_WORDS)]
    bins: Annotated[tuple[Number, ...], msgspec.Meta(min_length=2, max_length=MAX_BINS + 1)]
    known: Annotated[tuple[Share, ...], msgspec.Meta(max_length=MAX_BINS)]
    shifted: Annotated[tuple[Share, ...], msgspec.Meta(max_length=MAX_BINS)]
    seqs: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_POINTS)]
    evidence: Annotated[tuple[Level, ...], msgspec.Meta(max_length=MAX_POINTS)]
    alarm_at: Level
    onset_seq: Count
    alarm_seq: Count
    nearest: Annotated[tuple[tuple[Label, Share], ...], msgspec.Meta(max_length=MAX_NAMES)] = ()
    examples: SampleIds = ()
    groups: Annotated[tuple[Group, ...], msgspec.Meta(max_length=MAX_GROUPS)] = ()

    def __post_init__(self) -> None:
        """Check what a field alone cannot say."""
        if not len(self.known) == len(self.shifted) == len(self.bins) - 1:
            raise ValueError(
                f"{len(self.bins)} edges have {len(self.bins) - 1} bins; `known` has "
                f"{len(self.known)}, `shifted` {len(self.shifted)}"
            )
        if len(self.seqs) != len(self.evidence):
            raise ValueError(f"{len(self.seqs)} samples have {len(self.evidence)} evidences")
        for name, values in (("bins", self.bins), ("seqs", self.seqs)):
            if not all(low < high for low, high in pairwise(values)):
                raise ValueError(f"`{name}` do not rise")
        numbers = (
            *self.bins,
            *self.known,
            *self.shifted,
            *self.evidence,
            self.alarm_at,
            *(share for _, share in self.nearest),
            *(group.distance for group in self.groups),
        )
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number is NaN or infinite")

    def text(self) -> str:
        """Words and a histogram that any terminal shows, 76 columns wide."""
        lines = [*self.words, "", f"{'score':>12}  {'known':<{_WIDTH}}  since the onset"]
        peak = max(*self.known, *self.shifted, 1e-9)
        for low, before, now in zip(self.bins[:-1], self.known, self.shifted, strict=True):
            known, shifted = ("#" * round(_WIDTH * share / peak) for share in (before, now))
            lines.append(f"{low:12.4g}  {known:<{_WIDTH}}  {shifted}")
        return "\n".join(line.rstrip() for line in lines)
