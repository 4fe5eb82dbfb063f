"""The wire protocol: every message a device and the catalogue exchange, and the topics they use.

Both sides encode and decode through this module only. A message is one version byte and one
MessagePack map with ``id`` (unique, the key for acknowledgement and de-duplication) and
``type``; receipt validates names, types and sizes before anything acts on it.
"""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Final

import msgspec

from adapter_store.errors import WireError
from adapter_store.explanation import Explanation

PROTOCOL_VERSION: Final = 1
MAX_CHUNK_BYTES: Final = 256 * 1024
MAX_MESSAGE_BYTES: Final = MAX_CHUNK_BYTES + 4096

_UP = "driftkeel/v1/up/"
_DOWN = "driftkeel/v1/down/"
_PRESENCE = "driftkeel/v1/presence/"
_BAR: Final = 10
_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
DeviceName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


def new_id() -> str:
    """A fresh message id."""
    return uuid.uuid4().hex


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """What every message carries.

    Attributes:
        id: Unique per message; a retry carries the same id.
    """

    id: Annotated[str, msgspec.Meta(min_length=8, max_length=64)] = msgspec.field(
        default_factory=new_id
    )


class GenerationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One generation a device holds, as it reports it."""

    number: Count
    digest: Digest
    reason: Text
    created_at: float
    bundles: Annotated[list[Digest], msgspec.Meta(max_length=1000)]


class EpisodeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A device's newest episode, as it reports it.

    Attributes:
        number: Counts the device's episodes from 1.
        state: The stage it is at.
        detail: What happens now or what is missing, for a person.
        kind: What kind of shift it is, as `ood.kinds` calls it; empty before it is known.
    """

    number: Count
    state: Text
    detail: Text = ""
    kind: Annotated[str, msgspec.Meta(max_length=64)] = ""


class TrainingProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a device's training is, as it reports it.

    Attributes:
        step: Steps taken.
        steps: Steps of the whole training; it may stop early.
        epoch: Finished passes over the samples.
        epochs: Passes of the whole training.
        accuracy: Share of samples answered rightly in the last pass, 0..1.
        seconds: Time spent, over all starts.
        eta_s: Seconds to go at this pace, at most.
    """

    step: Count
    steps: Count
    epoch: Count
    epochs: Count
    accuracy: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
    seconds: Annotated[float, msgspec.Meta(ge=0.0)]
    eta_s: Annotated[float, msgspec.Meta(ge=0.0)]

    def __str__(self) -> str:
        """The progress as a bar, in words.

        Example:
            >>> print(TrainingProgress(step=5, steps=20, epoch=2, epochs=8, accuracy=0.8,
            ...                        seconds=3.0, eta_s=9.0))
            [##--------] epoch 2 of 8, accuracy 0.80, at most 9 s left
        """
        full = min(_BAR, _BAR * self.step // max(self.steps, 1))
        return (
            f"[{'#' * full}{'-' * (_BAR - full)}] epoch {self.epoch} of {self.epochs}, "
            f"accuracy {self.accuracy:.2f}, at most {self.eta_s:.0f} s left"
        )


class Register(Message, frozen=True, kw_only=True, tag="register"):
    """Device to catalogue, on every connection until acknowledged: who I am, my encoder."""

    device: DeviceName
    encoder: Digest
    software: Text


class Report(Message, frozen=True, kw_only=True, tag="report"):
    """Device to catalogue: the reported state, read from what runs."""

    device: DeviceName
    sequence: Count
    desired_version: Count
    generation: Count
    generation_digest: Digest
    pinned: bool
    generations: Annotated[list[GenerationSummary], msgspec.Meta(max_length=100)]
    episode: EpisodeSummary | None = None
    counters: Annotated[dict[str, float], msgspec.Meta(max_length=64)] = {}
    problem: Text = ""
    training: TrainingProgress | None = None


class Search(Message, frozen=True, kw_only=True, tag="search"):
    """Device to catalogue: which approved bundles fit this distribution?"""

    encoder: Digest
    signature: Annotated[bytes, msgspec.Meta(max_length=8192)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    exclude: Annotated[list[Digest], msgspec.Meta(max_length=1000)] = []


class Offer(Message, frozen=True, kw_only=True, tag="offer"):
    """Device to catalogue: I have a new bundle; pull it from me."""

    digest: Digest
    size_bytes: Count


class Explained(Message, frozen=True, kw_only=True, tag="explanation"):
    """Device to catalogue: why the alarm of an episode fired."""

    explanation: Explanation


class Get(Message, frozen=True, kw_only=True, tag="get"):
    """Receiver to sender: send this range of that bundle."""

    digest: Digest
    offset: Count
    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK_BYTES)]


class Chunk(Message, frozen=True, kw_only=True, tag="chunk"):
    """Sender to receiver: one range of a bundle."""

    digest: Digest
    offset: Count
    size_bytes: Count
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNK_BYTES)]


class Missing(Message, frozen=True, kw_only=True, tag="missing"):
    """Sender to receiver: I do not have (or may not give) that bundle; stop asking."""

    digest: Digest
    reason: Text = ""


class Ack(Message, frozen=True, kw_only=True, tag="ack"):
    """Receiver to sender: the message ``of`` is durable here, or was refused for good."""

    of: Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
    ok: bool = True
    reason: Text = ""


class Desired(Message, frozen=True, kw_only=True, tag="desired"):
    """Catalogue to device: the state the operator wants.

    Attributes:
        version: Grows with every change; a device ignores what is not newer than it applied.
        generation: The generation to run; None leaves the choice to the device.
        pinned: The device activates nothing by itself.
    """

    version: Count
    generation: Count | None = None
    pinned: bool = False


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One search hit: the signed statement about a bundle, and how near it is."""

    statement: Annotated[bytes, msgspec.Meta(max_length=16384)]
    signature: Annotated[bytes, msgspec.Meta(max_length=256)]
    similarity: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class SearchResult(Message, frozen=True, kw_only=True, tag="search_result"):
    """Catalogue to device: the nearest approved bundles, best first; empty means none fits."""

    of: Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
    candidates: Annotated[list[Candidate], msgspec.Meta(max_length=20)]


class OfferResult(Message, frozen=True, kw_only=True, tag="offer_result"):
    """Catalogue to device: the offered bundle is stored whole, or was refused and why."""

    digest: Digest
    stored: bool
    reason: Text = ""


UpMessage = Register | Report | Search | Offer | Explained | Get | Chunk | Missing | Ack
DownMessage = Desired | SearchResult | OfferResult | Get | Chunk | Missing | Ack
AnyMessage = UpMessage | DownMessage

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    "up": msgspec.msgpack.Decoder(UpMessage),
    "down": msgspec.msgpack.Decoder(DownMessage),
}


def up_topic(device: str) -> str:
    """The topic a device publishes on and only the catalogue reads."""
    return _UP + _checked(device)


def down_topic(device: str) -> str:
    """The topic the catalogue publishes on and only that device reads."""
    return _DOWN + _checked(device)


def presence_topic(device: str) -> str:
    """The retained topic that holds ``online`` or ``offline`` (the device's last will)."""
    return _PRESENCE + _checked(device)


ALL_UP: Final = _UP + "+"
ALL_PRESENCE: Final = _PRESENCE + "+"


def device_of(topic: str) -> str:
    """The device a topic belongs to.

    Raises:
        WireError: The topic is not one of this protocol's.
    """
    prefix, _, device = topic.rpartition("/")
    if prefix + "/" not in (_UP, _DOWN, _PRESENCE) or not _DEVICE_NAME.fullmatch(device):
        raise WireError(f"topic {topic[:120]!r} is not a Driftkeel v1 device topic")
    return device


def encode(message: AnyMessage) -> bytes:
    """One message as bytes."""
    return b"\x01" + _encoder.encode(message)


def decode_up(payload: bytes) -> UpMessage:
    """Decode and validate what a device sent.

    Raises:
        WireError: Too large, another protocol version, not MessagePack, or not this schema.
    """
    return _decode(payload, "up")  # type: ignore[return-value]


def decode_down(payload: bytes) -> DownMessage:
    """Decode and validate what the catalogue sent.

    Raises:
        WireError: Too large, another protocol version, not MessagePack, or not this schema.
    """
    return _decode(payload, "down")  # type: ignore[return-value]


def _decode(payload: bytes, direction: str) -> object:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise WireError(
            f"message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}; "
            "send bundles in chunks"
        )
    if not payload:
        raise WireError("message is empty")
    if payload[0] != PROTOCOL_VERSION:
        raise WireError(
            f"message has protocol version {payload[0]}, this side speaks {PROTOCOL_VERSION}; "
            "update the older side"
        )
    try:
        return _decoders[direction].decode(payload[1:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"message does not fit the protocol: {error}") from error


def _checked(device: str) -> str:
    if not _DEVICE_NAME.fullmatch(device):
        raise WireError(
            f"device name {device[:80]!r} is not valid; use 1-64 letters, digits, '.', '_' or '-'"
        )
    return device
