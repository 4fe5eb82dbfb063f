"""`driftkeel ood explain`: what it refuses, and whom it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from adapter_store import ood_cli
from adapter_store.explanation import Explanation
from tests.adapter_store.explained import DOCUMENT

FOUND = msgspec.convert(DOCUMENT, Explanation)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the packages above were asked; they answer with one document."""
    calls: list[tuple[Any, ...]] = []

    def ask(*arguments: Any) -> Explanation:
        calls.append(arguments)
        return FOUND

    monkeypatch.setattr(ood_cli, "_asked", ask)
    return calls


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(ood_cli.ood, ["explain", *arguments])
    return done.exit_code, done.output


def test_with_a_device_the_catalogue_is_asked_and_without_one_the_state_is_read(asked) -> None:
    status, said = run("press-7", "3", "--url", "http://x", "--token-file", "t")
    assert (status, said) == (0, FOUND.text() + "\n")
    assert run("3", "--config", "agent.toml")[0] == 0
    assert asked == [
        ("operator", "press-7", 3, None, "http://x", Path("t")),
        ("device", Path("agent.toml"), 3),
    ]


def test_json_is_the_whole_document(asked) -> None:
    assert json.loads(run("press-7", "3", "--json")[1]) == DOCUMENT


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "Missing argument"),
        (("3",), "--config"),
        (("press-7", "0"), "0 is not in the range"),
        (("press-7", "x"), "not a valid integer"),
        (("a", "b", "3"), "DEVICE and EPISODE"),
        (("press-7", "3", "--plot", "why.pdf"), ".png or .svg"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked, arguments, complaint) -> None:
    status, said = run(*arguments)
    assert status == 2
    assert complaint in said
    assert asked == []


def test_a_picture_that_cannot_be_written_is_said_so(asked, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    status, said = run("press-7", "3", "--plot", str(tmp_path / "no" / "why.svg"))
    assert status == 1
    assert "cannot write" in said
