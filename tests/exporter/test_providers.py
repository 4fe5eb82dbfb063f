"""Choosing what runs a graph, and what happens when a provider is not there, fails or lies.

OpenVINO itself is in `test_openvino.py`. Here the CPU stands in for it, so that the path of a
provider which compiles is taken everywhere.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.adapter_files import AttachedAdapter, write_adapter
from exporter.errors import EncoderError
from exporter.package import PREFIX_GRAPH, EncoderPackage
from exporter.providers import (
    PROVIDERS,
    Provider,
    RuntimeSettings,
    available,
    chosen,
    nodes_taken,
    running,
)
from exporter.sessions import EncoderSessions, FedAdapter, open_session, session_options
from tests.exporter.conftest import Array, adapter, fresh, moved
from tests.exporter.stand_in import StandIn, stand_in

NAMES = st.sampled_from(sorted(PROVIDERS))


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> RuntimeSettings:
    """Settings that ask for OpenVINO, where the CPU stands in for it."""
    stand_in(monkeypatch)
    return RuntimeSettings(providers=("openvino",))


def opened(package: EncoderPackage) -> onnxruntime.InferenceSession:
    """The prefix, made with a wish for OpenVINO."""
    weights = package.graph_weights(PREFIX_GRAPH)
    wish = RuntimeSettings(providers=("openvino",))
    return open_session(package.read(PREFIX_GRAPH), weights, source="prefix", settings=wish)


@given(st.lists(NAMES), st.sets(NAMES))
def test_the_cpu_is_always_last_and_what_is_not_there_is_never_tried(wanted, there) -> None:
    found = chosen(wanted, there)
    assert found[-1] == "cpu"
    assert len(set(found)) == len(found)
    assert set(found) <= {*there, "cpu"}


@given(st.lists(NAMES, unique=True))
def test_the_first_of_the_list_that_is_there_is_taken(wanted) -> None:
    there = {*wanted[1::2], "cpu"}
    first = next((name for name in wanted if name in there), "cpu")
    assert chosen(wanted, there)[0] == first


def test_this_machine_has_the_cpu() -> None:
    assert available()[-1] == "cpu"


def test_settings_survive_their_encoding() -> None:
    settings = RuntimeSettings(("openvino", "cpu"), 2, "extended")
    assert msgspec.json.decode(msgspec.json.encode(settings), type=RuntimeSettings) == settings


def test_settings_that_name_no_provider_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"providers": ["abacus"]}, RuntimeSettings)


@pytest.mark.parametrize(
    ("name", "level"),
    [("basic", "ORT_ENABLE_BASIC"), ("extended", "ORT_ENABLE_EXTENDED"), ("all", "ORT_ENABLE_ALL")],
)
def test_threads_and_graph_optimisation_reach_the_session(name, level) -> None:
    options = session_options(settings=RuntimeSettings(threads=3, graph_optimisation=name))
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level.name == level


def test_how_the_cpu_is_set_up_changes_no_answer(
    package: EncoderPackage, sessions: EncoderSessions, images: Array, tensors: dict[str, Array]
) -> None:
    basic = RuntimeSettings(threads=2, graph_optimisation="basic")
    other = EncoderSessions(package, settings=basic)
    expected = sessions.suffix(sessions.prefix(images), tensors)
    np.testing.assert_allclose(other.suffix(other.prefix(images), tensors), expected, atol=1e-5)


def test_a_provider_that_this_machine_lacks_is_passed_over(
    package: EncoderPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.sessions.available", lambda: ("cpu",))
    wanted = RuntimeSettings(providers=("tensorrt", "cuda", "openvino", "qnn", "xnnpack"))
    assert EncoderSessions(package, settings=wanted).running() == {"prefix": "cpu"}


def test_a_provider_that_fails_gives_way_to_the_next_and_what_runs_is_reported(
    package: EncoderPackage,
    sessions: EncoderSessions,
    images: Array,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("exporter.sessions.available", lambda: ("tensorrt", "qnn", "cpu"))
    wanted = RuntimeSettings(providers=("tensorrt", "qnn"))
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="not in available"):
        found = EncoderSessions(package, settings=wanted)
    assert found.running() == {"prefix": "cpu"}
    assert np.array_equal(found.prefix(images), sessions.prefix(images))
    for name in ("tensorrt", "qnn"):
        assert f"{name} does not run" in caplog.text


def test_a_provider_that_compiles_runs_adapters_of_any_rank_and_none(
    package: EncoderPackage,
    sessions: EncoderSessions,
    hidden: Array,
    openvino: RuntimeSettings,
) -> None:
    found = EncoderSessions(package, settings=openvino)
    session = found.suffix_session("bottleneck")
    assert not session.get_overridable_initializers()
    for tensors in (None, adapter(package, 1), adapter(package, 8), None):
        assert np.array_equal(found.suffix(hidden, tensors), sessions.suffix(hidden, tensors))
    fed = FedAdapter(found, "bottleneck", adapter(package, 4))
    assert np.array_equal(fed.run(hidden), sessions.suffix(hidden, adapter(package, 4)))


def test_without_defaults_every_family_computes_the_bare_encoder_when_nothing_is_fed(
    encoders: dict[str, EncoderSessions], openvino: RuntimeSettings
) -> None:
    for sessions in encoders.values():
        package = sessions.package
        found = EncoderSessions(package, settings=openvino)
        size = package.image_size
        hidden = found.prefix(np.random.default_rng(1).random((2, 3, size, size), np.float32))
        for family in package.families:
            bare = sessions.suffix(hidden, None, family)
            assert np.array_equal(found.suffix(hidden, None, family), bare), family
            assert found.running()[f"suffix-{family}"] == "openvino", family
            for tensors in (fresh(package, family, 2), moved(package, family, 3)):
                expected = sessions.suffix(hidden, tensors, family)
                assert np.array_equal(found.suffix(hidden, tensors, family), expected), family


class OtherAnswers(StandIn):
    def run(self, *arguments: Any, **more: Any) -> list[Array]:
        off = 1.001 if running(self) == "openvino" else 1.0
        return [rows * np.float32(off) for rows in super().run(*arguments, **more)]


class NoRows(StandIn):
    def run(self, *arguments: Any, **more: Any) -> list[Array]:
        kept = 0 if running(self) == "openvino" else None
        return [rows[:kept] for rows in super().run(*arguments, **more)]


class NoNodes(StandIn):
    def get_provider_graph_assignment_info(self) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherAnswers, "it differs from the CPU by 0.001 of the result"),
        (NoRows, "it gives [0, 6, 32], the CPU [3, 6, 32]"),
        (NoNodes, "it takes none of the graph's nodes"),
    ],
)
def test_a_provider_that_does_not_do_its_work_is_not_used(
    package: EncoderPackage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[StandIn],
    reason: str,
) -> None:
    stand_in(monkeypatch, kind)
    with caplog.at_level(logging.WARNING):
        assert running(opened(package)) == "cpu"
    assert reason in caplog.text


def test_how_many_nodes_a_provider_takes_is_asked_of_the_session(
    package: EncoderPackage, openvino: RuntimeSettings
) -> None:
    session = EncoderSessions(package, settings=openvino).suffix_session("bottleneck")
    assert nodes_taken(session, "openvino") == 1
    assert nodes_taken(session, "cpu") == 0
    assert nodes_taken(SimpleNamespace(), "openvino") is None  # before ONNX Runtime 1.24


def test_an_adapter_file_is_refused_where_it_would_be_ignored(
    package: EncoderPackage, openvino: RuntimeSettings, tmp_path: Path
) -> None:
    path = write_adapter(package, "bottleneck", adapter(package, 4), tmp_path)
    with pytest.raises(EncoderError, match="on openvino an adapter cannot be attached"):
        AttachedAdapter(EncoderSessions(package, settings=openvino), "bottleneck", path)


def test_openvino_is_told_to_compute_in_float32_with_as_many_threads_as_were_set() -> None:
    options = PROVIDERS["openvino"].options(3)
    settings = msgspec.json.decode(options["load_config"])["CPU"]
    assert settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert settings["INFERENCE_NUM_THREADS"] == "3"


def test_every_provider_has_text_options(tmp_path: Path) -> None:
    for provider in PROVIDERS.values():
        assert isinstance(provider, Provider)
        assert all(isinstance(value, str) for value in provider.options(2).values())
