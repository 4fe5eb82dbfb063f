"""What can be wrong with what an operator asks of the catalogue."""

from ood.errors import DriftkeelError


class CatalogueError(DriftkeelError):
    """Root of this package's errors."""


class NotFoundError(CatalogueError):
    """No such device or adapter, or the name is ambiguous."""


class ConflictError(CatalogueError):
    """It exists, but what is asked of it is not possible."""
