"""Everything wrong that a live agent can be given: named, counted, and of no consequence."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapter_store import wire
from adapter_store.bundle import bundle_digest
from adapter_store.trust import CatalogueKey
from cloud.broker import Kind
from tests.e2e.accounts import Account, candidate, chunk_of
from tests.e2e.conftest import Learned
from tests.e2e.harness import KNOWN, SHIFTED_B, Edge, Plant
from tests.e2e.waiting import until

pytestmark = pytest.mark.e2e

MAX_BODY = 300_000


@dataclass
class Live:
    """A device in the middle of an episode: it searches every second, and would install a hit.

    Attributes:
        device: The device.
        catalogue: The tests' own connection in the catalogue's place.
        key: The key the device trusts.
        before: Its predictions while nothing was wrong yet.
    """

    device: Edge
    catalogue: Account
    key: CatalogueKey
    before: list[tuple[str, float, int]]

    @property
    def encoder(self) -> str:
        """Digest of the encoder it runs."""
        digest: str = self.device.status()["encoder"]["digest"]
        return digest

    def refused(self) -> list[str]:
        """The bundles that its episode will not try again."""
        episodes = self.device.get("/v1/episodes")["episodes"]
        digests: list[str] = episodes[-1]["refused"]
        return digests

    def until_refused(self, data: bytes, answer: bytes | None = None) -> None:
        """Wait until a bundle was refused; it is sent on request (or other bytes are)."""
        sent = data if answer is None else answer

        def refused() -> bool:
            for message in list(self.catalogue.heard):
                self.catalogue.heard.remove(message)
                if isinstance(message, wire.Get):
                    self.catalogue.say(chunk_of(sent, message), to=self.device.name)
            return bundle_digest(data) in self.refused()

        until(refused, "the bundle to be refused", self.device.child)


@pytest.fixture(scope="module")
def plant_of_all(tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Iterator[Plant]:
    with Plant(tmp_path_factory.mktemp("bad-input"), kind) as plant:
        plant.start_broker()
        yield plant


@pytest.fixture(scope="module")
def running(plant_of_all: Plant, fitted: Path) -> Live:
    plant = plant_of_all
    search = {"repeat_s": 0.5, "timeout_s": 5.0}
    plant.place("device-b", fitted, {"search": search, "http": {"max_body_bytes": MAX_BODY}})
    catalogue = plant.account("catalogue")
    catalogue.hits = []
    device = plant.start("device-b")
    device.until_connected()
    device.shift(SHIFTED_B)
    device.until_stage("waiting_for_labels")
    return Live(device, catalogue, plant.key, device.predictions())


@pytest.fixture
def live(running: Live) -> Iterator[Live]:
    """The device; after each test it must be as it was."""
    pid = running.device.child.process.pid
    yield running
    running.catalogue.hits = []
    running.device.until_stage("waiting_for_labels")
    assert running.device.predictions() == running.before
    assert running.device.child.process.poll() is None
    assert running.device.child.process.pid == pid


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 60000 × 60000 pixels."""

    def part(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    head = b"\x89PNG\r\n\x1a\n"
    return head + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b"")


GOOD = KNOWN.images[0]
NOT_FINITE = np.where(np.eye(32) > 0, np.nan, 0.5).astype(np.float32)
SAMPLES: dict[str, tuple[bytes, str, int, str]] = {
    "nothing": (b"", "image/png", 400, "empty"),
    "an array of no samples": (npy(np.empty((0, 32, 32, 3), np.uint8)), "npy", 422, "empty"),
    "a row of numbers": (npy(np.zeros(7, np.uint8)), "npy", 422, "[7]"),
    "five channels": (npy(np.zeros((4, 8, 8, 5), np.uint8)), "npy", 422, "[4, 8, 8, 5]"),
    "NaN": (npy(NOT_FINITE), "npy", 422, "finite"),
    "infinity": (npy(np.full((8, 8), np.inf, np.float32)), "npy", 422, "finite"),
    "values beyond one": (npy(np.full((8, 8), 7.0, np.float32)), "npy", 422, "0"),
    "text": (b"this is not an image", "image/png", 422, "image"),
    "half a PNG": (png(GOOD)[:60], "image/png", 422, "image"),
    "a decompression bomb": (bomb(), "image/png", 422, "pixels"),
    "an array cut short": (npy(GOOD)[:-100], "npy", 422, ".npy"),
    "too many bytes": (bytes(MAX_BODY + 1), "npy", 413, "limit"),
    "JSON without samples": (b'{"sample": [1]}', "application/json", 400, "samples"),
    "JSON of unequal rows": (b'{"samples": [[1, 2], [3]]}', "application/json", 422, "shape"),
    "another type": (b"<xml/>", "text/xml", 415, "text/xml"),
}


@pytest.mark.parametrize("what", SAMPLES)
def test_a_bad_sample_is_refused_by_name(live: Live, what: str) -> None:
    body, kind, status, named = SAMPLES[what]
    kind = "application/x-npy" if kind == "npy" else kind
    counted = live.device.status()["counters"]["samples"]
    answer = live.device.predict_raw(body, kind)
    assert answer.status_code == status, answer.text
    said: dict[str, Any] = answer.json()
    assert named in said["error"]
    assert said["hint"]
    assert live.device.status()["counters"]["samples"] == counted


def test_pickled_objects_are_not_loaded(live: Live, tmp_path: Path) -> None:
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "sprung")
    answer = live.device.predict_raw(npy(trap, allow_pickle=True), "application/x-npy")
    assert answer.status_code == 422, answer.text
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def test_feedback_that_cannot_be_kept_is_refused(live: Live) -> None:
    device = live.device
    (known,) = device.predict_raw(npy(GOOD), "application/x-npy").json()["samples"]
    cases: list[tuple[Any, int, str]] = [
        ({"sample_id": "0" * 32, "label": "3"}, 404, "0" * 32),
        ({"sample_id": known["sample_id"]}, 400, "label"),
        ({"sample_id": known["sample_id"], "label": ""}, 422, "label"),
        ({"sample_id": known["sample_id"], "label": 3}, 400, "label"),
        ({"sample": known["sample_id"], "label": "3"}, 400, "sample"),
        ([], 400, "label"),
    ]
    for body, status, named in cases:
        answer = device.raw("POST", "/v1/feedback", json=body)
        assert answer.status_code == status, (body, answer.text)
        assert named in answer.json()["error"]
    mixed = [{"sample_id": i, "label": "3"} for i in ("0" * 32, known["sample_id"])]
    answer = device.raw("POST", "/v1/feedback", json={"feedback": mixed})
    assert answer.json() == {"accepted": 1, "unknown": ["0" * 32]}


def test_messages_that_are_none_are_counted_and_ignored(live: Live) -> None:
    desired = wire.encode(wire.Desired(version=99, generation=7, pinned=True))
    payloads = {
        "empty": b"",
        "noise": bytes(range(1, 200)),
        "another version": b"\x02" + desired[1:],
        "cut short": desired[:-3],
        "an up message": wire.encode(wire.Offer(digest="0" * 64, size_bytes=1)),
        "a negative version": desired.replace(b"\x63", b"\xff"),
        "deep": b"\x01" + b"\x91" * 100_000,
        "large": b"\x01" + bytes(wire.MAX_MESSAGE_BYTES - 2),
    }
    counted = live.device.counted("malformed")
    for payload in payloads.values():
        live.catalogue.say_bytes(payload, to=live.device.name)
    wanted = counted + len(payloads)
    until(lambda: live.device.counted("malformed") == wanted, "all to be counted")
    assert live.device.status()["desired_version"] == 0


def test_a_message_over_the_limit_does_no_harm(live: Live) -> None:
    """The brokers for trying carry none; should one, the device counts it as malformed."""
    counted = live.device.counted("malformed")
    live.catalogue.say_oversized(bytes(2 * wire.MAX_MESSAGE_BYTES), to=live.device.name)

    def heard() -> bool:
        # The broker may throw out whom it takes the large one from, and lose what comes after it.
        live.catalogue.say_bytes(b"", to=live.device.name)
        return live.device.counted("malformed") > counted

    until(heard, "the device to listen on")


def test_what_the_catalogue_did_not_sign_is_not_pulled(live: Live, learned: Learned) -> None:
    data, encoder = learned.bundle, live.encoder
    right = candidate(live.key, data, encoder)
    other = CatalogueKey.load_or_create(learned.state.parent / "another.key")
    changed = right.statement.replace(b'"size_bytes":', b'"size_bytes":9')
    assert changed != right.statement
    live.catalogue.hits = [
        candidate(other, data, encoder),
        wire.Candidate(statement=changed, signature=right.signature, similarity=1.0),
        wire.Candidate(statement=right.statement, signature=bytes(64), similarity=1.0),
        wire.Candidate(statement=b"{}", signature=b"", similarity=1.0),
    ]
    counted = live.device.counted("untrusted")
    until(lambda: live.device.counted("untrusted") >= counted + 4, "all four to be counted")
    until(lambda: live.device.counted("untrusted") >= counted + 8, "another search")
    assert not any(isinstance(message, wire.Get) for message in live.catalogue.heard)
    assert live.device.sync()["pulling"] is None


def test_a_signed_bundle_for_another_encoder_is_not_pulled(live: Live, learned: Learned) -> None:
    live.catalogue.hits = [candidate(live.key, learned.bundle, "0" * 64)]
    until(lambda: live.device.counted("unsuitable") >= 2, "two searches")
    assert live.device.sync()["pulling"] is None


def test_a_bundle_with_a_bit_flipped_on_its_way_is_refused(live: Live, learned: Learned) -> None:
    data = learned.bundle[:-1] + bytes([learned.bundle[-1] ^ 1])
    live.catalogue.hits = [candidate(live.key, learned.bundle, live.encoder)]
    live.until_refused(learned.bundle, answer=data)
    stored = Path(live.device.child.log.parent, live.device.name, "state", "blobs")
    digest = bundle_digest(learned.bundle)
    assert not (stored / digest[:2] / digest).exists()


@pytest.mark.parametrize("what", ["truncated", "flipped before it was signed", "no bundle"])
def test_a_signed_bundle_that_is_none_is_refused(live: Live, learned: Learned, what: str) -> None:
    middle = len(learned.bundle) // 2
    data = {
        "truncated": learned.bundle[:middle],
        "flipped before it was signed": learned.bundle[:middle]
        + bytes([learned.bundle[middle] ^ 0x40])
        + learned.bundle[middle + 1 :],
        "no bundle": b"\x00" * 1000,
    }[what]
    live.catalogue.hits = [candidate(live.key, data, live.encoder)]
    live.until_refused(data)


def test_a_bundle_of_another_size_than_was_signed_is_refused(live: Live, learned: Learned) -> None:
    data = learned.bundle + b"more"
    live.catalogue.hits = [candidate(live.key, data, live.encoder, size_bytes=len(data) - 4)]
    live.until_refused(data, answer=learned.bundle)
