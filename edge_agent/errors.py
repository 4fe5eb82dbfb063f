"""What can go wrong in the daemon itself; a person can act on every message."""

from ood.errors import DriftkeelError


class AgentError(DriftkeelError):
    """Root of this package's errors."""


class NoGenerationError(AgentError):
    """Nothing to serve yet: the state directory holds no active generation."""


class InstallError(AgentError):
    """A candidate generation failed its checks; the running one still serves."""


class ExportError(AgentError):
    """A generation cannot be written as one model."""


class TrainingDataError(AgentError):
    """The labelled samples given to ``agent fit`` cannot be used."""


class StrategyError(AgentError):
    """A strategy cannot be found, or cannot learn what it was given."""


class BenchmarkError(AgentError):
    """A benchmark's data, encoder or settings cannot be used, or a run of it failed."""


class TrainingMemoryError(AgentError):
    """A training does not fit into ``learner.max_memory``."""
