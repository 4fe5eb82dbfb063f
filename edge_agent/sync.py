"""The device's side of the wire: what is owed, searched, pulled, offered, explained and desired.

Every method runs on the conductor's thread; the MQTT link's own thread only decodes and posts. A
message may come twice, late or never: handlers are idempotent, and what must arrive sits in the
outbox until the catalogue has answered it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from adapter_store import wire
from adapter_store.errors import StoreError, TrustError, WireError
from adapter_store.explanation import Explanation
from adapter_store.mqtt import Link
from adapter_store.state import StateDir
from adapter_store.transfer import Sender
from adapter_store.trust import verify_statement
from edge_agent import episode_events as ev
from edge_agent.config import MqttSection
from edge_agent.pulling import Puller
from ood.errors import DriftkeelError

_OUTBOX_EVERY_S: Final = 1.0
_OUTBOX_BATCH: Final = 20
_SEQUENCE: Final = "report_boot"
_OFFERED: Final = "offered"
_EXPLAINED: Final = "explained"
# So many explanations wait for the catalogue at most; a newer one takes an older one's place.
_EXPLANATIONS_OWED: Final = 16
# A boot may send a million reports before its numbers meet the next one's.
_REPORTS_PER_BOOT: Final = 2**20

Post = Callable[[Callable[[], None]], None]
After = Callable[[float, Callable[[], None]], None]

log = logging.getLogger(__name__)


@dataclass
class _Asked:
    """A search under way."""

    id: str
    done: Callable[[ev.SearchAnswered | ev.SearchFailed], None]


class SyncClient:
    """One device's connection to its catalogue.

    Args:
        settings: The broker.
        device: This device's name.
        encoder: Digest of the encoder it runs.
        public_key: The catalogue's key, base64; empty trusts nothing.
        state: The device's durable state.
        post: Runs a function on the conductor's thread.
        after: Runs a function there some seconds later; called on that thread only.
        on_connected: Called after every connection; sends the report.
        on_desired: Takes in the operator's wish and makes it durable; may raise.
        clock: Unix time.
    """

    def __init__(
        self,
        settings: MqttSection,
        *,
        device: str,
        encoder: str,
        public_key: str,
        state: StateDir,
        post: Post,
        after: After,
        on_connected: Callable[[], None],
        on_desired: Callable[[wire.Desired], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._device = device
        self._encoder = encoder
        self._public_key = public_key
        self._state = state
        self._post = post
        self._after = after
        self._on_connected = on_connected
        self._on_desired = on_desired
        self._clock = clock
        self._up = wire.up_topic(device)
        self._presence = wire.presence_topic(device)
        self._counters: Counter[str] = Counter()
        self._asked: _Asked | None = None
        self._unregistered: wire.Register | None = None
        self._last_explained = int(state.settings.get(_EXPLAINED) or 0)
        self._sender = Sender(self._offered_bundle)
        boot = int(state.settings.get(_SEQUENCE) or 0) + 1
        state.settings.put(_SEQUENCE, boot)
        self._sequence = boot * _REPORTS_PER_BOOT
        self._puller = Puller(state.incoming, state.blobs, self._send, after)
        self._link = Link(
            host=settings.host,
            port=settings.port,
            client_id=f"driftkeel-{device}",
            username=settings.username,
            password=settings.password,
            keepalive_s=settings.keepalive_s,
            will=(self._presence, b"offline"),
            subscriptions=[wire.down_topic(device)],
            on_message=self._received,
            on_connected=lambda: post(self._connected),
        )

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""
        return bool(self._link.connected)

    def start(self) -> None:
        """Connect, and stay connected."""
        self._post(self._drain_periodically)
        self._link.start()

    def stop(self) -> None:
        """Say good-bye and disconnect."""
        if self.connected:
            self._link.publish(self._presence, b"offline", retain=True)
        self._link.stop()

    def status(self) -> dict[str, Any]:
        """Connection, debts and counters, as JSON-able values."""
        return {
            "connected": self.connected,
            "outbox": len(self._state.outbox),
            "pulling": self._puller.progress(),
            "counters": dict(self._counters),
        }

    def next_sequence(self) -> int:
        """The next report's number; it grows over restarts."""
        self._sequence += 1
        return self._sequence

    def report(self, report: wire.Report) -> None:
        """Send the reported state; only the newest matters, so it is never queued.

        The registration goes before it until the catalogue, which may have been away when this
        device connected, acknowledges that one.
        """
        if self._unregistered is not None:
            self._send(self._unregistered)
        self._send(report)

    def search(
        self,
        signature: bytes,
        *,
        exclude: Sequence[str],
        limit: int,
        timeout_s: float,
        done: Callable[[ev.SearchAnswered | ev.SearchFailed], None],
    ) -> None:
        """Ask the catalogue; ``done`` gets the answer or why there is none.

        Only candidates whose statement the catalogue signed, for this encoder, come through. While
        a search is under way its answer is this one's, too: where searches are repeated faster
        than the catalogue answers, each would make the answer to the one before worthless.
        """
        if self._asked is not None:
            self._asked = _Asked(self._asked.id, done)
            return
        message = wire.Search(
            encoder=self._encoder, signature=signature, limit=limit, exclude=list(exclude)
        )
        self._asked = _Asked(message.id, done)
        if not self._send(message):
            self._answer(message.id, ev.SearchFailed("the catalogue cannot be reached"))
            return
        reason = f"the catalogue did not answer within {timeout_s:g} s"
        self._after(timeout_s, lambda: self._answer(message.id, ev.SearchFailed(reason)))

    def pull(
        self,
        candidate: ev.CandidateRef,
        *,
        done: Callable[[ev.CandidatePulled | ev.CandidateFailed], None],
    ) -> None:
        """Fetch a bundle, carrying on with what an earlier attempt brought."""
        self._puller.pull(candidate.digest, candidate.size_bytes, done)

    def cancel(self) -> None:
        """Stop searching and pulling."""
        self._asked = None
        self._puller.cancel()

    def offer(self, digest: str) -> None:
        """Owe the catalogue a bundle; twice is once.

        Raises:
            DiskFullError: The debt could not be made durable.
        """
        self._state.settings.put(_OFFERED, sorted({*self.offered(), digest}))
        message = wire.Offer(
            id=_offer_id(digest), digest=digest, size_bytes=len(self._state.blobs.get(digest))
        )
        self._state.outbox.put(message.id, wire.encode(message), "offer", key=digest)
        self._drain()

    def offered(self) -> list[str]:
        """The bundles the catalogue may ask this device for."""
        return list(self._state.settings.get(_OFFERED) or [])

    def explain(self, explanation: Explanation) -> None:
        """Owe the catalogue an explanation; twice is once.

        Raises:
            DiskFullError: The debt could not be made durable.
        """
        number = explanation.episode
        message = wire.Explained(id=f"explanation-{number}", explanation=explanation)
        key = f"explanation-{number % _EXPLANATIONS_OWED}"
        self._state.outbox.put(message.id, wire.encode(message), "explanation", key=key)
        self.explained(number)
        self._drain()

    def explained(self, number: int) -> None:
        """Note that no episode up to this one is to be explained any more.

        Raises:
            DiskFullError: It could not be made durable.
        """
        self._state.settings.put(_EXPLAINED, number)
        self._last_explained = number

    @property
    def last_explained(self) -> int:
        """The newest episode that was explained, or could not be; 0 for none."""
        return self._last_explained

    # Receiving -----------------------------------------------------------------------------------

    def _received(self, topic: str, payload: bytes) -> None:
        """On the link's thread: validate, then hand over."""
        try:
            message = wire.decode_down(payload)
        except WireError as error:
            self._counters["malformed"] += 1
            log.warning("a message on %s was ignored: %s", topic, error)
            return
        self._post(lambda: self._handle(message))

    def _handle(self, message: wire.DownMessage) -> None:
        self._counters["received"] += 1
        match message:
            case wire.Desired():
                self._obey(message)
            case wire.SearchResult():
                self._search_answered(message)
            case wire.Chunk():
                self._puller.chunk(message)
            case wire.Missing():
                self._puller.missing(message)
            case wire.Get():
                self._give(message)
            case wire.Ack():
                self._acknowledged(message)
            case wire.OfferResult():
                self._offer_answered(message)

    def _obey(self, wanted: wire.Desired) -> None:
        try:
            self._on_desired(wanted)
        except (DriftkeelError, OSError) as error:
            # Not durable here: no acknowledgement, so the catalogue says it again.
            log.warning("the operator's wish %d cannot be kept: %s", wanted.version, error)
            return
        self._send(wire.Ack(of=wanted.id))

    def _search_answered(self, result: wire.SearchResult) -> None:
        found = []
        for candidate in result.candidates:
            try:
                statement = verify_statement(
                    candidate.statement, candidate.signature, self._public_key
                )
            except TrustError as error:
                self._counters["untrusted"] += 1
                log.warning("a candidate was ignored: %s", error)
                continue
            if statement.encoder != self._encoder:
                self._counters["unsuitable"] += 1
                continue
            found.append(
                ev.CandidateRef(
                    digest=statement.digest,
                    size_bytes=statement.size_bytes,
                    similarity=candidate.similarity,
                    statement=candidate.statement,
                    signature=candidate.signature,
                )
            )
        self._answer(result.of, ev.SearchAnswered(tuple(found)))

    def _answer(self, search: str, event: ev.SearchAnswered | ev.SearchFailed) -> None:
        if self._asked is not None and self._asked.id == search:
            asked, self._asked = self._asked, None
            asked.done(event)

    def _give(self, wanted: wire.Get) -> None:
        """Send a range of a bundle this device offered; of nothing else."""
        self._send(self._sender.answer(wanted))

    def _offered_bundle(self, digest: str) -> bytes:
        if digest not in self.offered():
            raise StoreError("this device did not offer that bundle")
        return self._state.blobs.get(digest)

    def _acknowledged(self, ack: wire.Ack) -> None:
        if not ack.ok:
            log.warning("the catalogue refused message %s: %s", ack.of, ack.reason)
        if self._unregistered is not None and ack.of == self._unregistered.id:
            self._unregistered = None
        self._state.outbox.acknowledged(ack.of)

    def _offer_answered(self, result: wire.OfferResult) -> None:
        said = "has" if result.stored else "refused"
        log.info("the catalogue %s bundle %s %s", said, result.digest[:12], result.reason)
        self._state.outbox.acknowledged(_offer_id(result.digest))
        self._send(wire.Ack(of=result.id))

    # Sending -------------------------------------------------------------------------------------

    def _connected(self) -> None:
        self._link.publish(self._presence, b"online", retain=True)
        self._unregistered = wire.Register(
            device=self._device, encoder=self._encoder, software=_software()
        )
        self._on_connected()
        self._puller.reconnected()
        self._state.outbox.retry_all()
        self._drain()

    def _send(self, message: wire.AnyMessage) -> bool:
        return self.connected and bool(self._link.publish(self._up, wire.encode(message)))

    def _drain(self) -> None:
        if not self.connected:
            return
        now = self._clock()
        for owed in self._state.outbox.due(now, _OUTBOX_BATCH):
            if not self._link.publish(self._up, owed.message):
                return
            self._state.outbox.sent(owed.id, now)

    def _drain_periodically(self) -> None:
        try:
            self._drain()
        finally:
            self._after(_OUTBOX_EVERY_S, self._drain_periodically)


def _offer_id(digest: str) -> str:
    """Offering a bundle again is the same message again."""
    return f"offer-{digest[:48]}"


def _software() -> str:
    try:
        return f"driftkeel {version('driftkeel')}"
    except PackageNotFoundError:
        return "driftkeel"
