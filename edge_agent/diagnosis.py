"""What kind of shift an episode is about, read from the journal, and which frames are faults.

The conductor calls `diagnosed` on its worker thread when an episode is confirmed; training leaves
out the samples that `healthy` does not give. Reads the journal; writes nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from adapter_store.errors import GenerationError
from adapter_store.journal import Journal, SampleRecord
from edge_agent.agent import Agent
from edge_agent.episode import Episode
from edge_agent.episode_events import Diagnosed, GroupFound
from ood.frames import FrameFacts, Limits
from ood.kinds import diagnose
from ood.known import Known
from ood.statistics import l2_normalise

MAX_WINDOW: Final = 256
_KNOWN_FRAMES: Final = 512
_GROUPS: Final = 8


def diagnosed(agent: Agent, episode: Episode) -> Diagnosed:
    """Say what the samples since the onset show.

    Raises:
        GenerationError: No generation runs.
        OodError: The samples or the statistics cannot be used.
    """
    serving, generation = agent.serving, agent.state.generations.current()
    if serving is None or generation is None:
        raise GenerationError("no generation runs; there is nothing known to compare with")
    journal = agent.state.journal
    rows = journal.recent(MAX_WINDOW, since_seq=episode.onset_seq - 1)
    if not rows:
        raise GenerationError("no samples since the onset are left in the journal")
    known = Known(
        [bundle.base for bundle in serving.bundles.values()],
        generation.calibration_features().astype(np.float32),
        known_frames(journal, episode.onset_seq),
    )
    frames = [FrameFacts.from_bytes(row.frame) for row in rows if row.frame is not None]
    features = l2_normalise(np.stack([np.asarray(row.features, np.float32) for row in rows]))
    found = diagnose(
        features,
        known,
        frames if len(frames) == len(rows) else (),
        refused=agent.refusals.since(rows[0].at),
    )
    groups = tuple(
        GroupFound(
            group.size,
            tuple(rows[place].id for place in group.representatives),
            group.nearest,
            group.distance,
        )
        for group in found.clusters[:_GROUPS]
    )
    return Diagnosed(str(found.kind), found.confidence, found.evidence, groups)


def known_frames(journal: Journal, onset_seq: int) -> list[FrameFacts]:
    """Facts of the newest frames from before a shift's first sample."""
    first = max(0, onset_seq - 1 - _KNOWN_FRAMES)
    after = len(journal.frames(since_seq=onset_seq - 1))
    packed = journal.frames(since_seq=first)
    return [FrameFacts.from_bytes(data) for data in packed[: len(packed) - after]]


def healthy(journal: Journal, rows: Sequence[SampleRecord], onset_seq: int) -> list[SampleRecord]:
    """The samples whose frames are no faults; those nothing was noted of are kept.

    Args:
        journal: What knows the frames from before the shift.
        rows: Samples since the onset, oldest first.
        onset_seq: The first sample believed to be shifted.
    """
    limits = Limits.of(known_frames(journal, onset_seq))
    noted = [row for row in rows if row.frame is not None]
    facts = [FrameFacts.from_bytes(row.frame) for row in noted if row.frame is not None]
    faulty = {row.id for row, what in zip(noted, limits.faults(facts), strict=True) if what}
    return [row for row in rows if row.id not in faulty]


def healthy_in_a_row(journal: Journal, onset_seq: int, most: int) -> int:
    """How many frames up to the newest are healthy, one after the other, at most so many."""
    limits = Limits.of(known_frames(journal, onset_seq))
    newest = [
        FrameFacts.from_bytes(data)
        for data in journal.frames(since_seq=onset_seq - 1, newest=4 * most)
    ]
    count = 0
    for what in reversed(limits.faults(newest)):
        if what or count == most:
            break
        count += 1
    return count
