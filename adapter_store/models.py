"""The tables of a device's database."""

from __future__ import annotations

from sqlalchemy import BLOB, Boolean, Float, Index, Integer, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class DeviceBase(DeclarativeBase):
    """The root of the device's tables."""


class SampleRow(DeviceBase):
    """One answered sample; its image and features go first when room is needed."""

    __tablename__ = "samples"
    __table_args__ = (
        # The log is 50 times longer than the buffer; these keep the buffer quick to find.
        Index("ix_samples_labelled", "seq", sqlite_where=text("true_label IS NOT NULL")),
        Index("ix_samples_buffered", "seq", sqlite_where=text("features IS NOT NULL")),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    at: Mapped[float] = mapped_column(Float)
    generation: Mapped[int] = mapped_column(Integer)
    label: Mapped[str] = mapped_column(Text)
    probability: Mapped[float] = mapped_column(Float)
    adapter: Mapped[str | None] = mapped_column(String(64))
    score: Mapped[float] = mapped_column(Float)
    p_value: Mapped[float] = mapped_column(Float)
    features: Mapped[bytes | None] = mapped_column(BLOB)
    image: Mapped[bytes | None] = mapped_column(BLOB)
    true_label: Mapped[str | None] = mapped_column(Text)
    labelled_at: Mapped[float | None] = mapped_column(Float)
    frame: Mapped[bytes | None] = mapped_column(BLOB)


class EpisodeRow(DeviceBase):
    """One episode, as the JSON of its newest state; while open it protects its samples."""

    __tablename__ = "episodes"

    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    open: Mapped[bool] = mapped_column(Boolean)
    onset_seq: Mapped[int | None] = mapped_column(Integer)
    body: Mapped[str] = mapped_column(Text)


class OutboxRow(DeviceBase):
    """One message the device owes; it goes when the other side acknowledges it."""

    __tablename__ = "outbox"
    __table_args__ = ({"sqlite_autoincrement": True},)

    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str] = mapped_column(String(64))
    key: Mapped[str | None] = mapped_column(String(200), unique=True)
    message: Mapped[bytes] = mapped_column(BLOB)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[float] = mapped_column(Float, default=0.0)


class InboxRow(DeviceBase):
    """The id of a message that was acted on."""

    __tablename__ = "inbox"
    __table_args__ = ({"sqlite_autoincrement": True},)

    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)


class SettingRow(DeviceBase):
    """One small value that must survive, as JSON."""

    __tablename__ = "settings"

    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[str] = mapped_column(Text)
