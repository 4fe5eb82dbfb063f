"""The bare suffix and the banks: derived from a package's own graphs, and beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from torch import nn

from exporter.bank_graph import banked
from exporter.bare import bare
from exporter.build import build_encoder
from exporter.derive import derive
from exporter.derived import BARE_GRAPH, DERIVED, bank_graph, derived_names, read_derived
from exporter.errors import EncoderError
from exporter.families import family_names
from exporter.package import EncoderPackage, default_encoder_package
from exporter.sessions import EncoderSessions, open_session
from tests.exporter.conftest import CONVOLUTIONAL, Array, adapter

CASES = [("vit", name) for name in family_names()] + [("cnn", name) for name in CONVOLUTIONAL]


def graph_of(package: EncoderPackage, family: str) -> onnx.ModelProto:
    return onnx.load_model_from_string(package.read(package.family(family).graph))


def wiring(proto: onnx.ModelProto) -> list[tuple[object, ...]]:
    """Every node's kind, attributes and where its inputs come from, whatever they are called."""
    made = {node.output[0]: at for at, node in enumerate(proto.graph.node)}
    return [
        (
            node.op_type,
            sorted(str(attribute) for attribute in node.attribute),
            [made[name] for name in node.input if name in made],
        )
        for node in proto.graph.node
    ]


@pytest.fixture
def copied(package: EncoderPackage, tmp_path: Path) -> EncoderPackage:
    return EncoderPackage.load(Path(shutil.copytree(package.path, tmp_path / "copied")))


@pytest.mark.parametrize(("network", "family"), CASES)
def test_the_bare_suffix_is_the_same_from_every_family_node_for_node(
    encoders: dict[str, EncoderSessions], network: str, family: str
) -> None:
    package = encoders[network].package
    proto = graph_of(package, family)
    found = bare(proto, package.family(family).tensors)
    expected = bare(graph_of(package, "bottleneck"), package.family("bottleneck").tensors)
    assert wiring(found) == wiring(expected)
    assert len(found.graph.node) < len(proto.graph.node)
    assert [entry.name for entry in found.graph.input] == ["hidden"]


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_the_bare_suffix_computes_what_the_encoder_does(
    encoders: dict[str, EncoderSessions], images: Array, network: str
) -> None:
    sessions = encoders[network]
    graph = read_derived(sessions.package, BARE_GRAPH)
    weights = sessions.package.named_weights(graph.weights)
    session = open_session(graph.data, weights, threads=1, source="bare")
    hidden = sessions.prefix(images)
    expected = sessions.suffix(hidden)
    np.testing.assert_allclose(session.run(None, {"hidden": hidden})[0], expected, atol=1e-6)


def test_a_site_at_the_suffix_s_end_keeps_the_name_of_its_output(tmp_path: Path) -> None:
    prefix = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    suffix = nn.Sequential(nn.GELU(), nn.Linear(6, 6))
    package = build_encoder(
        prefix, suffix, sites={"1": 6}, image_size=8, name="end", out=tmp_path / "end"
    )
    assert derived_names(package) == (bank_graph("bottleneck"), BARE_GRAPH)
    proto = onnx.load_model_from_string(read_derived(package, BARE_GRAPH).data)
    assert [entry.name for entry in proto.graph.output] == ["features"]
    assert proto.graph.node[-1].output[0] == "features"


def test_an_adapter_that_is_not_neutral_at_zero_has_no_bare_suffix() -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Exp", ["a"], ["e"]), helper.make_node("Mul", ["hidden", "e"], ["out"])],
        "g",
        [info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in ("hidden", "a")],
        [info("out", onnx.TensorProto.FLOAT, ["n", 2])],
    )
    with pytest.raises(EncoderError, match="cannot be told"):
        bare(helper.make_model(graph), {"a": (2,)})


def test_a_node_that_has_no_meaning_row_by_row_is_refused_by_its_kind() -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Concat", ["hidden", "a"], ["out"], axis=0)],
        "g",
        [
            info("hidden", onnx.TensorProto.FLOAT, ["n", 2]),
            info("a", onnx.TensorProto.FLOAT, [1, 2]),
        ],
        [info("out", onnx.TensorProto.FLOAT, ["m", 2])],
    )
    with pytest.raises(EncoderError, match="'Concat' row by row"):
        banked(helper.make_model(graph), {"a": (1, 2)})


def test_a_package_without_derived_graphs_loads_says_so_and_keeps_its_digest_when_completed(
    copied: EncoderPackage,
) -> None:
    before = {name: read_derived(copied, name) for name in derived_names(copied)}
    for name in (DERIVED, *before):
        (copied.path / name).unlink()
    older = EncoderPackage.load(copied.path)
    assert derived_names(older) == ()
    with pytest.raises(EncoderError, match="driftkeel encoder derive"):
        read_derived(older, BARE_GRAPH)
    derive(older, pytest.fail)
    again = EncoderPackage.load(copied.path)
    assert again.digest == copied.digest
    assert {name: read_derived(again, name) for name in derived_names(again)} == before


def test_a_damaged_graph_is_refused(copied: EncoderPackage) -> None:
    path = copied.path / BARE_GRAPH
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EncoderError, match=r"suffix\.onnx is damaged.*encoder derive"):
        read_derived(copied, BARE_GRAPH)
    path.unlink()
    with pytest.raises(EncoderError, match="cannot read"):
        read_derived(copied, BARE_GRAPH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ('{"encoder": "%s", "graphs": {}, "files": {}}' % ("0" * 64), "is of encoder 0000"),
    ],
)
def test_a_list_of_graphs_that_is_not_this_encoder_s_is_refused(
    copied: EncoderPackage, text: str, message: str
) -> None:
    (copied.path / DERIVED).write_text(text)
    with pytest.raises(EncoderError, match=message):
        derived_names(copied)


def test_graphs_outside_the_package_are_not_read(copied: EncoderPackage) -> None:
    entry = '{"sha256": "", "size": 0}'
    (copied.path / DERIVED).write_text(
        f'{{"encoder": "{copied.digest}", "graphs": {{"../x": []}}, "files": {{"../x": {entry}}}}}'
    )
    with pytest.raises(EncoderError, match=r"'\.\./x', which it cannot hold"):
        derived_names(copied)


def test_the_shipped_encoder_has_its_derived_graphs(tmp_path: Path) -> None:
    shipped = default_encoder_package()
    assert derived_names(shipped) == (bank_graph("bottleneck"), BARE_GRAPH)
    kept = {name: read_derived(shipped, name) for name in derived_names(shipped)}
    twin = EncoderPackage.load(Path(shutil.copytree(shipped.path, tmp_path / "twin")))
    derive(twin, pytest.fail)
    assert {name: read_derived(twin, name) for name in derived_names(twin)} == kept
    tensors = adapter(shipped, 2)
    sessions = EncoderSessions(shipped)
    hidden = np.random.default_rng(0).standard_normal((2, *shipped.hidden_shape), dtype=np.float32)
    graph = read_derived(shipped, bank_graph("bottleneck"))
    weights = shipped.named_weights(graph.weights)
    session = open_session(graph.data, weights, threads=1, source="bank")
    bank = {name: value[None] for name, value in tensors.items()}
    found = session.run(None, {"hidden": hidden, "index": np.zeros(2, np.int64), **bank})[0]
    np.testing.assert_allclose(found, sessions.suffix(hidden, tensors), atol=1e-6)
