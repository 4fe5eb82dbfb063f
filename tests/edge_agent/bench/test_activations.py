"""Activations are computed once, survive being cut off, and are what the encoder gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.bench import activations as subject
from edge_agent.bench.activations import Activations, cached
from edge_agent.bench.datasets import LabelledSet
from edge_agent.errors import BenchmarkError
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.sessions import EncoderSessions


def test_rows_are_what_the_prefix_gives_in_the_order_asked(
    activations: Activations, striped: LabelledSet, sessions: EncoderSessions
) -> None:
    rows = np.array([41, 3, 17])
    images = striped.read(rows, sessions.package.image_size)
    exact = sessions.prefix(prepare(images, sessions.package))
    found = activations.rows(rows)
    assert found.dtype == np.float16
    assert np.allclose(found, exact, rtol=2e-3, atol=2e-2)
    assert activations.prefix_ms > 0


def test_nothing_is_read_again_when_all_is_there(
    activations: Activations, striped: LabelledSet, package: EncoderPackage, cache: Path
) -> None:
    def never(rows: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
        raise AssertionError("read again")

    assert cached(replace(striped, read=never), package, cache) == activations


def test_an_encoding_that_was_cut_off_is_carried_on(
    activations: Activations,
    striped: LabelledSet,
    package: EncoderPackage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "_CHUNK", 20)
    read: list[int] = []

    def failing(rows: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
        read.extend(rows.tolist())
        if len(read) > 40 and failing.armed:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return striped.read(rows, side)

    failing.armed = True  # type: ignore[attr-defined]
    cut = replace(striped, read=failing)
    with pytest.raises(KeyboardInterrupt):
        cached(cut, package, tmp_path)
    failing.armed = False  # type: ignore[attr-defined]
    read.clear()
    whole = cached(cut, package, tmp_path)
    assert read[:20] == list(range(40, 60))
    rows = np.arange(len(striped))
    assert np.allclose(whole.rows(rows), activations.rows(rows), rtol=2e-3, atol=2e-2)
    assert json.loads((whole.path.parent / "about.json").read_text())["done"] == len(striped)


def test_a_cache_that_cannot_be_written_is_told(
    striped: LabelledSet, package: EncoderPackage, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="--cache"):
        cached(striped, package, tmp_path / "file")
