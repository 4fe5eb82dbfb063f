"""The tables of the catalogue."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Float, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class CatalogueBase(DeclarativeBase):
    """The root of the catalogue's tables."""


class DeviceRow(CatalogueBase):
    """One device: what the operator wants of it, and the newest it reported."""

    __tablename__ = "devices"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    encoder: Mapped[str] = mapped_column(String(64), default="")
    software: Mapped[str] = mapped_column(Text, default="")
    online: Mapped[bool] = mapped_column(Boolean, default=False)
    first_seen: Mapped[float] = mapped_column(Float)
    last_seen: Mapped[float] = mapped_column(Float)
    desired_version: Mapped[int] = mapped_column(BigInteger, default=0)
    desired_generation: Mapped[int | None] = mapped_column(BigInteger)
    desired_pinned: Mapped[bool] = mapped_column(Boolean, default=False)
    report_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    reported_at: Mapped[float] = mapped_column(Float, default=0.0)
    report: Mapped[str | None] = mapped_column(Text)


class BundleRow(CatalogueBase):
    """One bundle the catalogue holds."""

    __tablename__ = "bundles"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(Integer)
    encoder: Mapped[str] = mapped_column(String(64), index=True)
    family: Mapped[str] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(16), index=True)
    uploaded_by: Mapped[str] = mapped_column(String(64))
    uploaded_at: Mapped[float] = mapped_column(Float)
    manifest: Mapped[str] = mapped_column(Text)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    statement: Mapped[bytes | None] = mapped_column(LargeBinary)
    statement_signature: Mapped[bytes | None] = mapped_column(LargeBinary)


class UploadRow(CatalogueBase):
    """One bundle that a device offered and that is not here whole yet."""

    __tablename__ = "uploads"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(Integer)
    offered_at: Mapped[float] = mapped_column(Float)


class ExplanationRow(CatalogueBase):
    """Why an episode of a device began, as JSON."""

    __tablename__ = "explanations"

    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    episode: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    received_at: Mapped[float] = mapped_column(Float)
    body: Mapped[str] = mapped_column(Text)


class AuditRow(CatalogueBase):
    """One thing somebody did, or tried to do."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    who: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(200))
    outcome: Mapped[str] = mapped_column(String(16))
    detail: Mapped[str] = mapped_column(Text, default="")
