"""Adapter files of ONNX Runtime, and the faults it is silent about."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter.adapter_files import AttachedAdapter, write_adapter
from exporter.errors import EncoderError
from exporter.families import family_names
from exporter.package import EncoderPackage
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, adapter, moved


@pytest.fixture
def path(package: EncoderPackage, tensors: dict[str, Array], tmp_path: Path) -> Path:
    return write_adapter(package, "bottleneck", tensors, tmp_path)


@pytest.mark.parametrize("family", family_names())
def test_an_attached_adapter_computes_what_a_fed_one_does_bit_for_bit(
    encoders: dict[str, EncoderSessions], images: Array, tmp_path: Path, family: str
) -> None:
    sessions = encoders["vit"]
    hidden, tensors = sessions.prefix(images), moved(sessions.package, family, 3)
    path = write_adapter(sessions.package, family, tensors, tmp_path)
    found = AttachedAdapter(sessions, family, path).run(hidden)
    assert np.array_equal(found, sessions.suffix(hidden, tensors, family))
    assert np.abs(found - sessions.suffix(hidden, family=family)).max() > 1e-3


def test_an_adapter_that_nobody_else_holds_stays_attached(
    sessions: EncoderSessions, hidden: Array, tensors: dict[str, Array], path: Path
) -> None:
    attached = AttachedAdapter(sessions, "bottleneck", path)
    path.unlink()
    gc.collect()
    assert np.array_equal(attached.run(hidden), sessions.suffix(hidden, tensors))


def test_the_runtime_itself_forgets_an_adapter_without_an_error(
    sessions: EncoderSessions, hidden: Array, path: Path
) -> None:
    """Why `AttachedAdapter` keeps it."""
    session = sessions.suffix_session("bottleneck")
    options = onnxruntime.RunOptions()
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(path))
    options.add_active_adapter(loaded)
    del loaded
    gc.collect()
    found = session.run(None, {"hidden": hidden}, options)[0]
    assert np.array_equal(found, sessions.suffix(hidden))


def test_the_runtime_itself_lets_the_first_of_two_adapters_win_and_override_a_feed(
    package: EncoderPackage, sessions: EncoderSessions, hidden: Array, path: Path
) -> None:
    """Why `AttachedAdapter` takes one adapter, and hidden values alone."""
    session = sessions.suffix_session("bottleneck")
    other = adapter(package, 2)
    loaded = [onnxruntime.LoraAdapter() for _ in range(2)]
    loaded[0].Load(str(path))
    loaded[1].Load(str(write_adapter(package, "bottleneck", other, path.parent)))
    both, first = onnxruntime.RunOptions(), onnxruntime.RunOptions()
    for one in loaded:
        both.add_active_adapter(one)
    first.add_active_adapter(loaded[0])
    expected = AttachedAdapter(sessions, "bottleneck", path).run(hidden)
    assert np.array_equal(session.run(None, {"hidden": hidden}, both)[0], expected)
    assert np.array_equal(session.run(None, {"hidden": hidden, **other}, first)[0], expected)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.95])
def test_a_flipped_bit_is_refused_before_the_runtime_sees_it(
    sessions: EncoderSessions, path: Path, at: float
) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(EncoderError, match="is damaged: its SHA-256"):
        AttachedAdapter(sessions, "bottleneck", path)


def test_a_file_that_is_missing_or_no_adapter_is_refused(
    sessions: EncoderSessions, tmp_path: Path
) -> None:
    empty = tmp_path / (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855.onnx_adapter"
    )
    with pytest.raises(EncoderError, match="cannot read"):
        AttachedAdapter(sessions, "bottleneck", empty)
    empty.touch()
    with pytest.raises(EncoderError, match="is no adapter file"):
        AttachedAdapter(sessions, "bottleneck", empty)


def test_an_adapter_of_another_encoder_or_family_is_refused(
    encoders: dict[str, EncoderSessions], path: Path
) -> None:
    with pytest.raises(EncoderError, match="for another encoder than 'vit'"):
        AttachedAdapter(encoders["vit"], "bottleneck", path)
    sessions = encoders["vit"]
    lora = write_adapter(sessions.package, "lora", moved(sessions.package, "lora", 2), path.parent)
    with pytest.raises(EncoderError, match="none of 'bottleneck'"):
        AttachedAdapter(sessions, "bottleneck", lora)


def test_the_same_adapter_gives_the_same_file_and_a_failed_write_leaves_none(
    package: EncoderPackage, tensors: dict[str, Array], path: Path
) -> None:
    backwards = dict(reversed(tensors.items()))
    assert write_adapter(package, "bottleneck", backwards, path.parent) == path
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(EncoderError, match="cannot write an adapter file"):
        write_adapter(package, "bottleneck", tensors, path.parent / "missing")


def test_threads_with_different_adapters_share_one_session(
    package: EncoderPackage, sessions: EncoderSessions, hidden: Array, tmp_path: Path
) -> None:
    adapters = [adapter(package, rank) for rank in (1, 2, 8)]
    attached = [
        AttachedAdapter(sessions, "bottleneck", write_adapter(package, "bottleneck", a, tmp_path))
        for a in adapters
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: attached[i % 3].run(hidden), range(30)))
    for i, features in enumerate(found):
        assert np.array_equal(features, sessions.suffix(hidden, adapters[i % 3]))
