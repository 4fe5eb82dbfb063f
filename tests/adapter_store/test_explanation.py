"""An explanation that exists is bounded, whole and finite, whoever sent it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from adapter_store import wire
from adapter_store.errors import WireError
from adapter_store.explanation import (
    MAX_BINS,
    MAX_GROUPS,
    MAX_NAMES,
    MAX_NUMBER,
    MAX_POINTS,
    MAX_SENTENCE,
    MAX_WORDS,
    Explanation,
)
from adapter_store.labels import MAX_LABEL
from tests.adapter_store.explained import DOCUMENT, GROUP, sent


def test_what_was_sent_is_what_arrives() -> None:
    message = wire.decode_up(sent())
    assert isinstance(message, wire.Explained)
    assert msgspec.to_builtins(message.explanation, str_keys=True) == {
        **DOCUMENT,
        **{
            name: tuple(DOCUMENT[name])
            for name in ("words", "bins", "known", "shifted", "seqs", "evidence", "examples")
        },
        "nearest": (("cat", 0.9), ("dog", 0.1)),
        "groups": ({**GROUP, "sample_ids": ("s1", "s2")},),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"words": []},
        {"words": ["x"] * (MAX_WORDS + 1)},
        {"words": ["x" * (MAX_SENTENCE + 1)]},
        {"words": [b"bytes"]},
        {"kind": "x" * 65},
        {"episode": -1},
        {"episode": 2**60},
        {"bins": [0.0]},
        {"bins": [0.0, 1.0]},
        {"bins": [0.0, 2.0, 1.0]},
        {"bins": [0.0, 0.0, 1.0]},
        {"bins": [0.0, 1.0, math.nan]},
        {"bins": [0.0, 1.0, math.inf]},
        {"bins": [0.0, 1.0, 2 * MAX_NUMBER]},
        {"known": [0.75]},
        {"known": [0.75, math.nan]},
        {"known": [0.75, -0.1]},
        {"shifted": [0.0, 1.5]},
        {
            "bins": [float(k) for k in range(MAX_BINS + 2)],
            "known": [0.0] * (MAX_BINS + 1),
            "shifted": [0.0] * (MAX_BINS + 1),
        },
        {"seqs": [18, 19]},
        {"seqs": [18, 18, 20]},
        {"evidence": [0.5, 40.0, math.inf]},
        {"evidence": [0.5, math.nan, 2.0]},
        {"evidence": [0.5, -1.0, 2.0]},
        {
            "seqs": list(range(MAX_POINTS + 1)),
            "evidence": [1.0] * (MAX_POINTS + 1),
        },
        {"alarm_at": math.nan},
        {"alarm_at": math.inf},
        {"nearest": [["cat", math.nan]]},
        {"nearest": [["x" * (MAX_LABEL + 1), 0.5]]},
        {"nearest": [["cat"]]},
        {"nearest": [["cat", 0.1]] * (MAX_NAMES + 1)},
        {"examples": ["s"] * (MAX_NAMES + 1)},
        {"examples": ["\x1b[2J"]},
        {"examples": ["x\n"]},
        {"examples": ["x" * 65]},
        {"groups": [GROUP] * (MAX_GROUPS + 1)},
        {"groups": [GROUP | {"distance": math.nan}]},
        {"groups": [GROUP | {"size": -1}]},
        {"groups": [GROUP | {"sample_ids": ["a/b"]}]},
        {"groups": [[]]},
    ],
    ids=" ".join,
)
def test_a_hostile_document_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="does not fit the protocol"):
        wire.decode_up(sent(**changes))


def test_the_largest_document_is_a_small_message() -> None:
    names = ["\U0001f600" * MAX_LABEL] * MAX_NAMES
    ids = ["x" * 64] * MAX_NAMES
    group = GROUP | {"size": 2**53, "sample_ids": ids, "nearest": names[0]}
    largest = sent(
        kind="\U0001f600" * 64,
        words=["\U0001f600" * MAX_SENTENCE] * MAX_WORDS,
        bins=[MAX_NUMBER * (k / MAX_BINS - 0.5) for k in range(MAX_BINS + 1)],
        known=[0.5] * MAX_BINS,
        shifted=[0.5] * MAX_BINS,
        seqs=[2**52 + k for k in range(MAX_POINTS)],
        evidence=[MAX_NUMBER] * MAX_POINTS,
        nearest=[[name, 0.5] for name in names],
        examples=ids,
        groups=[group] * MAX_GROUPS,
    )
    assert isinstance(wire.decode_up(largest), wire.Explained)
    assert len(largest) < 48 * 1024


def test_newer_fields_are_passed_over() -> None:
    assert isinstance(wire.decode_up(sent(colour="blue")), wire.Explained)


def test_the_text_holds_the_words_and_a_bar_for_every_bin() -> None:
    lines = msgspec.convert(DOCUMENT, Explanation).text().splitlines()
    assert lines[:2] == DOCUMENT["words"]
    assert [line.count("#") for line in lines[-2:]] == [22, 38]
    assert max(map(len, lines[3:])) <= 76
