"""An explanation as a device sends it, for tests on both sides of the wire."""

from __future__ import annotations

from typing import Any

import msgspec

GROUP = {"size": 12, "sample_ids": ["s1", "s2"], "nearest": "cat", "distance": 2.5}
DOCUMENT: dict[str, Any] = {
    "episode": 3,
    "kind": "new classes",
    "words": ["The alarm fired at sample 20.", "It is called new classes."],
    "bins": [0.0, 1.0, 2.0],
    "known": [0.75, 0.25],
    "shifted": [0.0, 1.0],
    "seqs": [18, 19, 20],
    "evidence": [0.5, 40.0, 2000.0],
    "alarm_at": 1000.0,
    "onset_seq": 10,
    "alarm_seq": 20,
    "nearest": [["cat", 0.9], ["dog", 0.1]],
    "examples": ["s1", "s7"],
    "groups": [GROUP],
}


def sent(**changes: Any) -> bytes:
    """The document with changes, as a device without manners would send it."""
    document = DOCUMENT | changes
    message = {"type": "explanation", "id": "0" * 32, "explanation": document}
    return b"\x01" + msgspec.msgpack.encode(message)
