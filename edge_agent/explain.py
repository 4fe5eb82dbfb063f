"""Why an alarm fired, in words and numbers, read back from a device's state.

Called by `driftkeel ood explain EPISODE` on the device, by the conductor for the catalogue, and by
whoever holds a state directory, opened or only read. The sequential test is run once more over the
journalled scores, so what is shown is what it saw. Writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np

from adapter_store.bundle import unpack
from adapter_store.episodes_store import EpisodeStore
from adapter_store.explanation import (
    MAX_GROUPS,
    MAX_NAMES,
    MAX_NUMBER,
    MAX_POINTS,
    MAX_SENTENCE,
    Explanation,
)
from adapter_store.generations import GenerationStore
from adapter_store.journal import Journal, ScoredSample
from adapter_store.state import StateReader
from edge_agent.agent import open_encoder
from edge_agent.config import AlarmSection, load_agent_config
from edge_agent.episode import Episode
from edge_agent.errors import AgentError
from edge_agent.report import describe_episode
from ood.detector import Detector

BINS: Final = 12
EXAMPLES: Final = 5
_REPLAYED: Final = 5000
_AFTER: Final = 256


class State(Protocol):
    """What is read: a `StateDir` or a `StateReader`."""

    journal: Journal
    episodes: EpisodeStore
    generations: GenerationStore


def from_config(config_path: Path, episode: int) -> Explanation:
    """Say why an episode of the device that a configuration file describes began.

    Args:
        config_path: The agent's TOML file; its state directory is only read.
        episode: The episode's number, from 1.

    Raises:
        DriftkeelError: As `explain`, or the configuration, the state or the encoder is unusable.
    """
    config = load_agent_config(config_path)
    state = StateReader(Path(config.agent.state_dir))
    try:
        parts = open_encoder(config).manifest.feature_parts
        return explain(state, episode, parts=parts, alarm=config.alarm)
    finally:
        state.close()


def explain(
    state: State, number: int, *, parts: Sequence[int], alarm: AlarmSection | None = None
) -> Explanation:
    """Say why an episode began.

    Args:
        state: The device's state; it is only read.
        number: The episode's number, from 1.
        parts: The widths of the encoder's feature parts.
        alarm: The operator's alarm; the one the generation was built under when absent.

    Raises:
        AgentError: There is no such episode, or its samples are gone from the journal.
        StoreError: Its generation is gone or damaged.
    """
    saved = {values["number"]: values for values in state.episodes.list()}
    if number not in saved:
        have = ", ".join(map(str, saved)) or "none"
        raise AgentError(f"this device has no episode {number}; it has {have}")
    episode = Episode.from_dict(saved[number])
    generation = state.generations.get(episode.generation)
    alarm = alarm or msgspec.convert(generation.manifest.alarm, AlarmSection)
    detector = Detector.fit(
        [unpack(generation.bundle_bytes(digest)).base for digest in generation.manifest.bundles],
        generation.calibration_features().astype(np.float32),
        false_alarm_every=alarm.false_alarm_every,
        block=alarm.block,
        prior_changes=alarm.prior_changes,
        parts=parts,
    )
    rows = state.journal.scores(
        episode.generation, until_seq=episode.alarm_seq + _AFTER, newest=_REPLAYED
    )
    since = [row for row in rows if row.seq >= episode.onset_seq]
    if not since:
        raise AgentError(
            f"the journal no longer holds samples of episode {number}; it can be explained while "
            "they are there (buffer.max_samples)"
        )
    replayed = [row for row in rows if row.seq <= episode.alarm_seq]
    evidence = _replayed(detector, replayed)
    peak = max(evidence, default=0.0)
    shown = _thinned(evidence)
    seqs, evidence = [replayed[k].seq for k in shown], [evidence[k] for k in shown]
    bins, known, shifted = _histogram(detector.calibration.scores, [row.score for row in since])
    counts = Counter(row.label for row in since)
    nearest = tuple((label, count / len(since)) for label, count in counts.most_common(EXAMPLES))
    ordered = sorted(since, key=lambda row: -row.score)
    groups = [asdict(group) for group in episode.groups[:MAX_GROUPS]]
    for group in groups:
        group["sample_ids"] = group["sample_ids"][:MAX_NAMES]
    return msgspec.convert(
        {
            "episode": number,
            "kind": episode.kind,
            "words": [_clipped(said) for said in _words(episode, detector, since, nearest, peak)],
            "bins": bins,
            "known": known,
            "shifted": shifted,
            "seqs": seqs,
            "evidence": evidence,
            "alarm_at": detector.test.alarm_at,
            "onset_seq": episode.onset_seq,
            "alarm_seq": episode.alarm_seq,
            "nearest": nearest,
            "examples": [row.id for row in ordered[:EXAMPLES]],
            "groups": groups,
        },
        Explanation,
    )


def _replayed(detector: Detector, rows: Sequence[ScoredSample]) -> list[float]:
    """The test's evidence after each sample; at an alarm what it reached, though it starts anew.

    The features are gone, so what a sample was answered as stands for the class it was nearest to.
    """
    state, levels = detector.initial_state(), []
    nearest = {label: k for k, (_, label) in enumerate(detector.mixture.head.components)}
    for row in rows:
        state, alarm = detector.update(state, [row.score], [nearest.get(row.label, 0)])
        level = detector.test.evidence(state) if alarm is None else alarm.evidence
        levels.append(min(level, MAX_NUMBER))
    return levels


def _thinned(levels: Sequence[float]) -> list[int]:
    """The places of at most `MAX_POINTS` levels: the peak of each stretch, and the last."""
    if not levels:
        return []
    places = np.arange(len(levels) - 1)
    stretches = np.array_split(places, min(MAX_POINTS - 1, max(1, len(places))))
    peaks = [int(max(stretch, key=lambda k: levels[k])) for stretch in stretches if len(stretch)]
    return [*peaks, len(levels) - 1]


def _clipped(sentence: str) -> str:
    return sentence if len(sentence) <= MAX_SENTENCE else sentence[: MAX_SENTENCE - 1] + "…"


def _histogram(
    known: np.ndarray, shifted: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Both on one scale; what lies far beyond all known scores is in the last bin."""
    top = max(float(known.max()), min(max(shifted), 3.0 * float(known.max())))
    low = min(float(known.min()), *shifted)
    edges = np.linspace(low, top if top > low else low + 1.0, BINS + 1)
    shares = [
        np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0] / len(scores)
        for scores in (known, np.asarray(shifted))
    ]
    return (
        tuple(edges.tolist()),
        tuple(shares[0].tolist()),
        tuple(shares[1].tolist()),
    )


def _words(
    episode: Episode,
    detector: Detector,
    since: Sequence[ScoredSample],
    nearest: Sequence[tuple[str, float]],
    peak: float,
) -> list[str]:
    known = detector.calibration.scores
    scores = np.array([row.score for row in since])
    beyond = int((scores > known[-1]).sum())
    tenth = float(np.mean([row.p_value <= 0.1 for row in since]))
    words = [
        f"Episode {episode.number}, {episode.stage}: {describe_episode(episode)}",
        (
            f"The alarm fired at sample {episode.alarm_seq}; the shift is believed to have "
            f"begun {episode.alarm_seq - episode.onset_seq} samples before, at {episode.onset_seq}."
        ),
        (
            f"Run again over the journal, the evidence reaches {peak:.3g}; an alarm needs "
            f"{detector.test.alarm_at:.3g}."
        ),
        (
            f"Of {len(since)} samples since then {tenth:.0%} score as 10% of known samples do, "
            f"and {beyond} lie beyond all {len(known)} known ones; their median score is "
            f"{np.median(scores):.4g}, that of known samples {np.median(known):.4g}."
        ),
        "They are answered as "
        + ", ".join(f"{label} ({share:.0%})" for label, share in nearest)
        + ".",
    ]
    if episode.kind:
        words.append(f"It is called {episode.kind}: {'; '.join(episode.evidence)}.")
    return words
