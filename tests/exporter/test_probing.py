"""Comparing a provider with the CPU before it is trusted."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.package import PREFIX_GRAPH, EncoderPackage
from exporter.probing import TOLERANCE, difference, neutral, problem, tolerance
from exporter.quantise import quantise
from exporter.sessions import EncoderSessions, open_session

ONE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "found", [ONE[:1], ONE[:0], np.full((2, 3), np.nan), np.full((2, 3), np.inf)]
)
def test_another_shape_and_what_is_not_finite_differ_without_bound(found) -> None:
    assert difference(found, ONE) == float("inf")


def test_a_difference_is_relative_to_the_size() -> None:
    assert difference(ONE * 101, ONE * 100) == pytest.approx(0.01)
    assert difference(ONE, ONE) == 0.0
    assert difference(ONE * 0, ONE * 0) == 0.0


def test_the_same_graph_has_no_problem(package: EncoderPackage, sessions: EncoderSessions) -> None:
    session = sessions.suffix_session("bottleneck")
    assert problem(session, session, tolerance=TOLERANCE, at_once=8) is None


def test_weights_that_changed_are_noticed(package: EncoderPackage) -> None:
    graph, weights = package.read(PREFIX_GRAPH), package.graph_weights(PREFIX_GRAPH)
    other = {name: value * np.float32(1.01) for name, value in weights.items()}
    session, reference = (open_session(graph, w, source="g") for w in (other, weights))
    found = problem(session, reference, tolerance=TOLERANCE, at_once=8)
    assert found is not None
    assert "differs from the CPU" in found


def test_nothing_is_fed_to_a_session_with_defaults(sessions: EncoderSessions) -> None:
    assert neutral(sessions.suffix_session("bottleneck")) == {}


def test_a_quantised_encoder_may_differ_by_what_quantising_changed(
    package: EncoderPackage, tmp_path
) -> None:
    quantised = quantise(package, tmp_path / "int8")
    assert tolerance(package) == TOLERANCE
    assert tolerance(quantised) == quantised.manifest.quantised.difference > TOLERANCE


def test_a_graph_whose_rows_depend_on_each_other_is_run_row_by_row(
    package: EncoderPackage, tmp_path
) -> None:
    quantised = quantise(package, tmp_path / "int8")
    graph, weights = quantised.read(PREFIX_GRAPH), quantised.graph_weights(PREFIX_GRAPH)
    session = open_session(graph, weights, source="int8")
    assert problem(session, session, tolerance=1e-6, at_once=1) is None
    assert problem(session, session, tolerance=1e-6, at_once=8) is not None
