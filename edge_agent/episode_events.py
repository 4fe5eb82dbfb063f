"""What an episode hears of and what it asks to be done: its events and its actions.

Plain frozen values. The conductor makes the events and carries the actions out; only
:mod:`edge_agent.episode_steps` decides what follows from what.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CandidateRef:
    """A bundle the catalogue proposed; its statement was verified before it came here."""

    digest: str
    size_bytes: int
    similarity: float
    statement: bytes
    signature: bytes


@dataclass(frozen=True)
class SamplesSeen:
    """More samples were journalled: after the alarm, of these foreign, and since the onset."""

    since_alarm: int
    foreign: int
    since_onset: int


@dataclass(frozen=True)
class GroupFound:
    """Samples that fit no class and lie together; a person may name them.

    Attributes:
        size: How many they are.
        sample_ids: Those nearest to their centre, to be shown.
        nearest: The known class they lie nearest to.
        distance: How far from it, in spreads of a class.
    """

    size: int
    sample_ids: tuple[str, ...]
    nearest: str
    distance: float


@dataclass(frozen=True)
class Diagnosed:
    """What kind of shift it is: one of `ood.kinds.Kind`, with what speaks for it."""

    kind: str
    confidence: float
    evidence: tuple[str, ...]
    groups: tuple[GroupFound, ...] = ()


@dataclass(frozen=True)
class FramesSeen:
    """So many frames in a row, up to the newest, were healthy."""

    healthy: int


@dataclass(frozen=True)
class LabelsAvailable:
    """So many samples since the onset are labelled now."""

    count: int


@dataclass(frozen=True)
class SearchDue:
    """It is time to ask the catalogue again."""


@dataclass(frozen=True)
class SearchAnswered:
    """The catalogue answered; every candidate's statement was verified."""

    candidates: tuple[CandidateRef, ...]


@dataclass(frozen=True)
class SearchFailed:
    """No answer: offline, or too late."""

    reason: str


@dataclass(frozen=True)
class CandidatePulled:
    """The candidate's bytes are whole in the blob store."""

    digest: str


@dataclass(frozen=True)
class CandidateFailed:
    """The candidate could not be had; ``for_good`` when asking again is pointless."""

    digest: str
    reason: str
    for_good: bool = True


@dataclass(frozen=True)
class TrialVerdict:
    """The pulled candidate fits this device's samples, or not."""

    digest: str
    accepted: bool
    reason: str


@dataclass(frozen=True)
class TrainingDone:
    """Training number ``training`` made this bundle; it is in the blob store."""

    training: int
    digest: str


@dataclass(frozen=True)
class TrainingFailed:
    """Training failed; ``unavailable`` when this device cannot train at all."""

    training: int
    reason: str
    unavailable: bool = False


@dataclass(frozen=True)
class TrainingCancelled:
    """A person does not want training number ``training``."""

    training: int


@dataclass(frozen=True)
class ValidationVerdict:
    """The trained candidate is better than what runs, or not."""

    digest: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class GenerationBuilt:
    """The generation with the candidate stands beside the running one."""

    digest: str
    number: int


@dataclass(frozen=True)
class InstallFailed:
    """The generation with the candidate could not be built or activated."""

    digest: str
    reason: str


@dataclass(frozen=True)
class GenerationActivated:
    """The episode's own generation runs."""

    number: int


@dataclass(frozen=True)
class AlignmentTried:
    """Aligning the features helps, and this generation does it; or it does not (None)."""

    number: int | None
    reason: str


@dataclass(frozen=True)
class PinChanged:
    """The operator pinned or unpinned the device."""

    pinned: bool


@dataclass(frozen=True)
class OperatorChose:
    """The operator switched the device to another generation."""

    number: int


Event = (
    SamplesSeen
    | Diagnosed
    | FramesSeen
    | LabelsAvailable
    | SearchDue
    | SearchAnswered
    | SearchFailed
    | CandidatePulled
    | CandidateFailed
    | TrialVerdict
    | TrainingDone
    | TrainingFailed
    | TrainingCancelled
    | ValidationVerdict
    | GenerationBuilt
    | InstallFailed
    | GenerationActivated
    | AlignmentTried
    | PinChanged
    | OperatorChose
)


@dataclass(frozen=True)
class Diagnose:
    """Say what kind of shift the samples since the onset show."""


@dataclass(frozen=True)
class Search:
    """Ask the catalogue for bundles like the samples since the onset."""


@dataclass(frozen=True)
class Pull:
    """Fetch the candidate; nothing to fetch when it is here."""

    candidate: CandidateRef


@dataclass(frozen=True)
class Try:
    """Verify the pulled candidate and try it on the samples since the onset."""

    candidate: CandidateRef


@dataclass(frozen=True)
class Train:
    """Start (or carry on with) this training."""

    training: int


@dataclass(frozen=True)
class Validate:
    """Compare the trained candidate with what runs, on samples held out from training."""

    digest: str
    training: int


@dataclass(frozen=True)
class Build:
    """Build the next generation: what runs and the candidate."""

    digest: str
    trained: bool


@dataclass(frozen=True)
class Align:
    """See whether aligning the features helps; if so, build a generation that does."""


@dataclass(frozen=True)
class Activate:
    """Switch to the generation built; offer the bundle to the catalogue when trained here.

    The digest of one that only aligns is empty: it has no bundle of its own.
    """

    number: int
    digest: str
    trained: bool


@dataclass(frozen=True)
class Cancel:
    """Stop the pull and the training, if any."""


Action = Diagnose | Search | Pull | Try | Train | Validate | Build | Align | Activate | Cancel
