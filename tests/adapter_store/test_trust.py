"""Only what the configured catalogue signed and approves of is believed, byte for byte."""

import base64
import stat

import msgspec
import pytest

from adapter_store.bundle import bundle_digest
from adapter_store.errors import TrustError
from adapter_store.trust import CatalogueKey, Statement, verify_bundle, verify_statement

DATA = b"a bundle"


@pytest.fixture
def key(tmp_path) -> CatalogueKey:
    return CatalogueKey.load_or_create(tmp_path / "keys" / "catalogue.key")


@pytest.fixture
def statement() -> Statement:
    return Statement(
        digest=bundle_digest(DATA),
        size_bytes=len(DATA),
        encoder="e" * 64,
        family="bottleneck",
        labels=("cat", "dög"),
        status="approved",
        issued_at=12.5,
    )


def test_a_signed_statement_is_believed(key, statement) -> None:
    blob, signature = key.sign(statement)
    assert verify_statement(blob, signature, key.public_key) == statement
    verify_bundle(statement, DATA)


def test_the_same_statement_gives_the_same_bytes(key, statement) -> None:
    assert key.sign(statement) == key.sign(msgspec.structs.replace(statement))


def test_the_key_survives_a_restart_and_only_its_owner_reads_it(tmp_path, key) -> None:
    path = tmp_path / "keys" / "catalogue.key"
    assert CatalogueKey.load_or_create(path).public_key == key.public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(base64.b64decode(key.public_key)) == 32


def test_a_damaged_key_is_not_replaced(tmp_path, key) -> None:
    path = tmp_path / "keys" / "catalogue.key"
    path.write_bytes(b"short")
    with pytest.raises(TrustError, match="restore it from a backup"):
        CatalogueKey.load_or_create(path)
    assert path.read_bytes() == b"short"


def test_a_changed_statement_is_refused(key, statement) -> None:
    blob, signature = key.sign(statement)
    for position in range(len(blob)):
        broken = bytearray(blob)
        broken[position] ^= 1
        with pytest.raises(TrustError, match="not signed by the configured catalogue"):
            verify_statement(bytes(broken), signature, key.public_key)


def test_a_changed_or_missing_signature_is_refused(key, statement) -> None:
    blob, signature = key.sign(statement)
    for broken in (b"", signature[:-1], bytes(64), signature + b"\0"):
        with pytest.raises(TrustError, match="not signed"):
            verify_statement(blob, broken, key.public_key)


def test_another_catalogues_statement_is_refused(tmp_path, key, statement) -> None:
    other = CatalogueKey.load_or_create(tmp_path / "other.key")
    blob, signature = other.sign(statement)
    with pytest.raises(TrustError, match="not signed"):
        verify_statement(blob, signature, key.public_key)


@pytest.mark.parametrize("public_key", ["", "not base64!", "AAAA", "ключ"])
def test_a_key_that_is_none_is_named(key, statement, public_key) -> None:
    with pytest.raises(TrustError, match=r"catalogue\.public_key is not"):
        verify_statement(*key.sign(statement), public_key)


@pytest.mark.parametrize("status", ["candidate", "quarantined", "retired", ""])
def test_what_is_not_approved_is_refused(key, statement, status) -> None:
    signed = key.sign(msgspec.structs.replace(statement, status=status))
    with pytest.raises(TrustError, match="not approved"):
        verify_statement(*signed, key.public_key)


def test_bytes_of_another_bundle_are_refused(statement) -> None:
    with pytest.raises(TrustError, match="vouches for 8"):
        verify_bundle(statement, DATA + b"\0")
    with pytest.raises(TrustError, match="vouches for"):
        verify_bundle(statement, b"a bundlE")
