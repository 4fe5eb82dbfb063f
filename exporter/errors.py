"""What can go wrong with encoder packages, samples and exported graphs."""

from ood.errors import DriftkeelError


class ExporterError(DriftkeelError):
    """Root of this package's errors."""


class EncoderError(ExporterError):
    """An encoder's weights, package or split are not usable."""


class ParityError(ExporterError):
    """An exported graph does not compute what the original does."""


class PreprocessError(ExporterError):
    """A sample cannot be read: wrong shape, empty, not finite, or not an image."""
