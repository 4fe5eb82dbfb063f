"""What can be wrong with what an operator asks of the catalogue."""

from ood.errors import DriftkeelError


class CatalogueError(DriftkeelError):
    """Root of this package's errors."""


class RequestError(CatalogueError):
    """The request itself is wrong: a value of the wrong kind, or a key nobody knows."""


class NotFoundError(CatalogueError):
    """No such device or adapter, or the name is ambiguous."""


class ConflictError(CatalogueError):
    """It exists, but what is asked of it is not possible."""


class RefusedError(CatalogueError):
    """The catalogue refused an operator's command, or cannot be reached."""
