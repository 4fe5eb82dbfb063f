"""What can go wrong with bundles, generations, messages and the places they are kept."""

from ood.errors import DriftkeelError


class StoreError(DriftkeelError):
    """Root of this package's errors."""


class ConfigError(StoreError):
    """A configuration file has an unknown key, a wrong type, or is missing something."""


class WireError(StoreError):
    """A message is malformed, too large, of another version, or on a foreign topic."""


class TransferError(StoreError):
    """A chunked transfer cannot be completed."""


class TrustError(StoreError):
    """A signature, digest or size is not what the catalogue vouched for."""


class BundleError(StoreError):
    """A bundle cannot be used; subclasses say why."""


class TruncatedBundleError(BundleError):
    """The bundle ends before its header says it does."""


class CorruptBundleError(BundleError):
    """The bundle's bytes are not what its digest or its header says."""


class ForeignBundleError(BundleError):
    """The file is not a Driftkeel bundle, or of an unknown format version."""


class InvalidManifestError(BundleError):
    """A bundle's manifest is missing something, or says what cannot be."""


class WrongEncoderError(BundleError):
    """The bundle belongs to another encoder, or its tensors do not fit this one's sites."""


class NonFiniteBundleError(BundleError):
    """A tensor or statistic holds NaN or infinity."""


class BundleTooLargeError(BundleError):
    """A declared size is over the limit; nothing was allocated."""


class GenerationError(StoreError):
    """A generation is missing, incomplete or may not be removed."""


class UnknownSampleError(StoreError):
    """Feedback names a sample that is not in the journal."""


class LabelError(StoreError):
    """A label is empty, too long, or holds characters that cannot be shown."""


class DatabaseTooNewError(StoreError):
    """The database was written by a newer version."""


class StateLockedError(StoreError):
    """Another process uses this state directory."""


class DiskFullError(StoreError):
    """The disk is full or failed; what was there before is untouched."""
