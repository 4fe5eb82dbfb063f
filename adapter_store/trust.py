"""The seam of trust: what must hold before bytes from outside are believed.

The catalogue signs a statement about each bundle it vouches for; a device checks the signature with
the key its operator configured, and the bundle's size and digest with the statement. The broker is
trusted with nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from adapter_store.blobs import sync_directory
from adapter_store.errors import TrustError

_DOMAIN = b"driftkeel statement v1\n"


class Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the catalogue vouches for, about one bundle."""

    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]
    encoder: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    family: str
    labels: tuple[str, ...]
    status: str
    issued_at: float

    def to_bytes(self) -> bytes:
        """The canonical JSON that is signed."""
        return msgspec.json.encode(self, order="sorted")


class CatalogueKey:
    """The catalogue's Ed25519 signing key.

    Args:
        private: The key.
    """

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def load_or_create(cls, path: Path) -> CatalogueKey:
        """Read the key from a file, or make one and write it with mode 0600.

        Raises:
            TrustError: The file is there but holds no key.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return cls._create(path)
        except OSError as error:
            raise TrustError(f"cannot read the key in {path}: {error.strerror}") from error
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(raw))
        except ValueError as error:
            raise TrustError(f"{path} holds no Ed25519 key; restore it from a backup") from error

    @classmethod
    def _create(cls, path: Path) -> CatalogueKey:
        private = Ed25519PrivateKey.generate()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(private.private_bytes_raw())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
        return cls(private)

    @property
    def public_key(self) -> str:
        """The public half, base64: what devices are configured with."""
        return base64.b64encode(self._private.public_key().public_bytes_raw()).decode()

    def sign(self, statement: Statement) -> tuple[bytes, bytes]:
        """The statement's bytes and their signature."""
        blob = statement.to_bytes()
        return blob, self._private.sign(_DOMAIN + blob)


def verify_statement(blob: bytes, signature: bytes, public_key: str) -> Statement:
    """Check that the catalogue made this statement, and that it approves of the bundle.

    Args:
        blob: The statement's bytes as they came.
        signature: Their Ed25519 signature.
        public_key: The catalogue's public key, base64.

    Raises:
        TrustError: The key is not one, the signature is not the catalogue's, or the statement
            does not say that the bundle is approved.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key, validate=True))
    except ValueError as error:
        raise TrustError(
            "catalogue.public_key is not a base64 Ed25519 key; copy what "
            "`driftkeel catalogue public-key` prints"
        ) from error
    try:
        key.verify(signature, _DOMAIN + blob)
    except InvalidSignature as error:
        raise TrustError(
            "a statement is not signed by the configured catalogue; "
            "check catalogue.public_key, or who speaks for the catalogue"
        ) from error
    try:
        statement = msgspec.json.decode(blob, type=Statement)
    except msgspec.DecodeError as error:
        raise TrustError(f"a signed statement cannot be read: {error}") from error
    if statement.status != "approved":
        raise TrustError(f"bundle {statement.digest[:12]} is {statement.status}, not approved")
    return statement


def verify_bundle(statement: Statement, data: bytes) -> None:
    """Check that these bytes are the ones the statement is about.

    Raises:
        TrustError: Their size or digest differs.
    """
    if len(data) != statement.size_bytes:
        raise TrustError(
            f"bundle {statement.digest[:12]} has {len(data)} bytes, "
            f"the catalogue vouches for {statement.size_bytes}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != statement.digest:
        raise TrustError(
            f"bytes are of {digest[:12]}, the catalogue vouches for {statement.digest[:12]}"
        )
