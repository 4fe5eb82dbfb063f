"""The root of every error Driftkeel raises on purpose, and the family of this package."""


class DriftkeelError(Exception):
    """Something is wrong that a person can act on; the message says what and how."""


class OodError(DriftkeelError):
    """Features, labels or a state given to the shift detector do not fit."""
