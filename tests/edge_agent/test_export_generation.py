"""One model of a generation answers what the device answers with one round of routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from adapter_store.bundle import Bundle, pack
from adapter_store.errors import GenerationError
from adapter_store.state import StateReader
from edge_agent import export_generation as module
from edge_agent.agent import Agent
from edge_agent.alignment import Alignment
from edge_agent.config import AgentSection, Config
from edge_agent.errors import ExportError, NoGenerationError
from edge_agent.export_generation import export_generation, load
from edge_agent.fit import encode
from edge_agent.snapshot import scale_images
from exporter.build import build_vit
from exporter.errors import EncoderError, ParityError
from exporter.families import adapter_family, initial_tensors
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.quantise import quantise
from exporter.routing_graph import Group
from exporter.sessions import EncoderSessions, session_options
from exporter.standalone_parity import PROBABILITY_TOLERANCE, SCORE_TOLERANCE
from exporter.vit import VisionTransformer
from ood import mixture
from ood.statistics import ClassStatistics, l2_normalise
from tests.edge_agent.conftest import fitted_stripes, striped

Images = NDArray[np.uint8]
Install = Callable[..., int]


def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="session")
def calibration(sessions: EncoderSessions) -> NDArray[np.float32]:
    """Enough held-out samples for the combined score."""
    return encode(sessions, striped((0, 1, 2), 40, seed=77)[0])


@contextmanager
def reading(agent: Agent) -> Iterator[StateReader]:
    """The agent's state as another process sees it."""
    state = StateReader(agent.state.path)
    try:
        yield state
    finally:
        state.close()


def exported(agent: Agent, out: Path, number: int | None = None, **options: Any) -> list[str]:
    """Exports beside the agent, which holds the lock all the while; returns what was said."""
    said: list[str] = []
    with reading(agent) as state:
        sessions = EncoderSessions(agent.package)
        size = export_generation(state, sessions, number, out, progress=said.append, **options)
    assert size == out.stat().st_size
    return said


def run(path: Path, images: Images) -> dict[str, NDArray[Any]]:
    """What ONNX Runtime alone makes of a model."""
    session = onnxruntime.InferenceSession(
        path, session_options(), providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


def samples(size: int) -> Images:
    """Known classes, classes in doubt between two, and noise."""
    stripes, _ = striped(range(6), 6, seed=3)
    other = stripes[::-1].astype(np.float64)
    doubtful = (0.5 * stripes + 0.5 * other).astype(np.uint8)
    noise = np.random.default_rng(4).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    return scale_images(np.concatenate([stripes, doubtful, noise]), size)


def assert_same_answers(agent: Agent, path: Path, images: Images, number: int = 1) -> None:
    """Every output is what the generation with one round of routing says."""
    loaded = load(agent.state.generations.get(number), agent.sessions)
    inferred, found = loaded.serving.infer(images), run(path, images)
    order = [*loaded.bundles, None]
    assert found["label_name"].tolist() == [answer.label for answer in inferred.answers]
    assert [loaded.serving.labels[k] for k in found["label"]] == found["label_name"].tolist()
    # Of bundles that know one class alike, which is named is a matter of the last bit.
    for k, answer in zip(found["adapter"], inferred.answers, strict=True):
        for digest in {order[k], answer.adapter} - {None} if order[k] != answer.adapter else ():
            assert answer.label in loaded.serving.summaries[digest].labels
    rows = np.arange(len(images))
    np.testing.assert_allclose(
        found["probabilities"][rows, found["label"]],
        [answer.probability for answer in inferred.answers],
        atol=PROBABILITY_TOLERANCE,
    )
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(
        found["ood_score"], inferred.scores, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE
    )
    np.testing.assert_allclose(found["features"], inferred.features, atol=1e-5)


def test_every_answer_is_the_devices_with_one_round(
    agent: Agent, install: Install, make_bundle, tmp_path: Path
) -> None:
    plain, first = make_bundle((0, 1, 2)), make_bundle((2, 3, 4), adapter=1)
    install(plain, first, make_bundle((4, 5), adapter=2))
    said = exported(agent, tmp_path / "model.onnx")
    images = samples(64)
    assert_same_answers(agent, tmp_path / "model.onnx", images)
    found = run(tmp_path / "model.onnx", images)
    assert len(set(found["adapter"].tolist())) == 3
    assert any("every class: " in line for line in said)


def test_probabilities_in_doubt_are_the_devices(
    agent: Agent, install: Install, make_bundle, tmp_path: Path
) -> None:
    # Classes of which each is known twice, so that bundles share what is one label.
    install(*(make_bundle((0, 1, 2), adapter=seed, seed=seed) for seed in (1, 2, 3)))
    exported(agent, tmp_path / "model.onnx")
    doubtful = []
    for weight in np.linspace(0.05, 0.95, 19):
        (one, _), (other, _) = striped((0,), 4, seed=8), striped((2,), 4, seed=9)
        doubtful.append((weight * one + (1 - weight) * other).astype(np.uint8))
    images = scale_images(np.concatenate(doubtful), 64)
    assert_same_answers(agent, tmp_path / "model.onnx", images)


def test_a_generation_without_adapters_needs_no_bank(
    agent: Agent, install: Install, make_bundle, tmp_path: Path
) -> None:
    install(make_bundle((0, 1, 2)), make_bundle((3, 4)))
    exported(agent, tmp_path / "model.onnx")
    assert_same_answers(agent, tmp_path / "model.onnx", samples(64))
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "If" not in kinds
    assert set(run(tmp_path / "model.onnx", samples(64))["adapter"].tolist()) == {-1}


def test_a_sample_is_answered_alone_as_among_others(
    agent: Agent, install: Install, make_bundle, tmp_path: Path
) -> None:
    install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))
    exported(agent, tmp_path / "model.onnx")
    images = samples(64)
    together = run(tmp_path / "model.onnx", images)
    for row in range(0, len(images), 9):
        alone = run(tmp_path / "model.onnx", images[row : row + 1])
        assert alone["label"][0] == together["label"][row]
        assert alone["adapter"][0] == together["adapter"][row]
        for name in ("probabilities", "ood_score", "features"):
            np.testing.assert_allclose(alone[name][0], together[name][row], rtol=1e-3, atol=1e-3)


def test_an_older_generation_is_exported_by_its_number(
    agent: Agent, install: Install, make_bundle, tmp_path: Path
) -> None:
    install(make_bundle((0, 1, 2)))
    install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))
    exported(agent, tmp_path / "old.onnx", 1)
    exported(agent, tmp_path / "new.onnx")
    about = {
        name: {entry.key: entry.value for entry in onnx.load(tmp_path / name).metadata_props}
        for name in ("old.onnx", "new.onnx")
    }
    assert about["old.onnx"]["driftkeel.generation"] == "1"
    assert about["new.onnx"]["driftkeel.generation"] == "2"
    assert_same_answers(agent, tmp_path / "old.onnx", samples(64), 1)


def test_journalled_images_are_compared_too_and_later_rounds_are_counted(
    agent: Agent, install: Install, make_bundle, make_images, tmp_path: Path
) -> None:
    install(make_bundle((0, 1, 2)), make_bundle((3, 4), adapter=1), make_bundle((4, 5), adapter=2))
    agent.predict(make_images(range(6), 3, seed=12)[0])
    said = exported(agent, tmp_path / "model.onnx")
    assert any(line.startswith("journalled images: probabilities") for line in said)
    assert any("rounds of routing the device labels" in line for line in said)


def tiny(out: Path, **options: Any) -> EncoderPackage:
    """A small transformer with random weights."""
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=16, patch=8, dim=32, depth=3, heads=2, hidden=48).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return build_vit(
        vit.state_dict(),
        image_size=16,
        suffix_blocks=1,
        heads=2,
        name="tiny",
        out=out,
        **options,
    )


def bundle(
    sessions: EncoderSessions, classes: tuple[int, ...], family: str | None, seed: int = 1
) -> bytes:
    """Statistics of stripes, with a random adapter of a family where one is named."""
    package = sessions.package
    images, labels = striped(classes, 24, seed=seed)
    fitted = fitted_stripes(sessions, classes, seed=seed)
    if family is None:
        return pack(fitted)
    rng = np.random.default_rng(seed)
    fresh = initial_tensors(adapter_family(family), package.manifest.sites, 2, seed=seed)
    tensors = {
        name: (value + rng.normal(0, 0.3, value.shape)).astype(np.float32)
        for name, value in fresh.items()
    }
    own = sessions.suffix(sessions.prefix(prepare(images, package)), tensors, family)
    sites = tuple(sorted({name.rpartition("/")[0] for name in tensors}))
    manifest = msgspec.structs.replace(fitted.manifest, family=family, rank=2, sites=sites)
    statistics = ClassStatistics.fit(l2_normalise(own[:, : package.network_dim]), labels)
    return pack(Bundle(manifest, tensors, fitted.base, statistics, fitted.signature))


@contextmanager
def device(config: Config, package: EncoderPackage) -> Iterator[Agent]:
    """An agent with an encoder of its own."""
    section = AgentSection(
        device="device-a", state_dir=config.agent.state_dir, encoder=str(package.path)
    )
    opened = Agent.open(msgspec.structs.replace(config, agent=section))
    try:
        yield opened
    finally:
        opened.close()


def activated(agent: Agent, *bundles: bytes) -> None:
    """Builds and activates a generation."""
    digests = [agent.state.blobs.put(data) for data in bundles]
    calibration = encode(agent.sessions, striped((0, 1, 2), 30, seed=77)[0])
    made = agent.build_generation(digests, calibration, parent=None, reason="test")
    agent.activate(made.number)


def test_base_features_of_the_prefix_are_the_models_too(config: Config, tmp_path: Path) -> None:
    package = tiny(tmp_path / "encoder", base_features="prefix")
    with device(config, package) as agent:
        adapted = [bundle(agent.sessions, (3, 4, 5), "bottleneck", 2)]
        activated(agent, bundle(agent.sessions, (0, 1, 2), None), *adapted)
        exported(agent, tmp_path / "model.onnx")
        assert_same_answers(agent, tmp_path / "model.onnx", samples(16))


def test_adapters_of_several_families_are_in_one_model(config: Config, tmp_path: Path) -> None:
    families = ("bottleneck", "lora", "sparse", "ssf")
    with device(config, tiny(tmp_path / "encoder", families=families)) as agent:
        adapted = [
            bundle(agent.sessions, (k, k + 1), family, k + 1) for k, family in enumerate(families)
        ]
        activated(agent, *adapted, bundle(agent.sessions, (4, 5), None))
        exported(agent, tmp_path / "model.onnx")
        assert_same_answers(agent, tmp_path / "model.onnx", samples(16))


def test_a_quantised_encoder_goes_without_adapters_and_says_why_not_with(
    config: Config, tmp_path: Path
) -> None:
    original = tiny(tmp_path / "encoder")
    package = quantise(original, tmp_path / "small", method="int8")
    with device(config, package) as agent:
        plain = bundle(agent.sessions, (0, 1, 2), None)
        activated(agent, plain)
        exported(agent, tmp_path / "model.onnx")
        about = onnx.load(tmp_path / "model.onnx").metadata_props
        assert ("driftkeel.rows_per_run", "1") in {(entry.key, entry.value) for entry in about}
        activated(agent, plain, bundle(agent.sessions, (3, 4), "bottleneck", 2))
        with pytest.raises(EncoderError, match=r"bank-bottleneck\.onnx"):
            exported(agent, tmp_path / "other.onnx")


def test_an_alignment_is_refused_by_name(
    agent: Agent, install: Install, calibration, tmp_path: Path
) -> None:
    install()
    digests = list(agent.state.generations.get(1).manifest.bundles)
    alignment = Alignment.fit(calibration * 0.9, calibration)
    agent.build_generation(digests, calibration, parent=1, reason="test", alignment=alignment)
    with pytest.raises(ExportError, match=r"generation 2 aligns .* its parent \(1\)"):
        exported(agent, tmp_path / "model.onnx", 2)


def test_an_unknown_generation_is_named_with_those_there_are(
    agent: Agent, install: Install, tmp_path: Path
) -> None:
    with pytest.raises(NoGenerationError, match="no generation is active"):
        exported(agent, tmp_path / "model.onnx")
    install()
    with pytest.raises(GenerationError, match="generation 7 is not on this device; it has 1"):
        exported(agent, tmp_path / "model.onnx", 7)


def test_another_encoder_than_the_generations_is_refused(
    agent: Agent, install: Install, tmp_path: Path
) -> None:
    install()
    other = EncoderSessions(tiny(tmp_path / "encoder"))
    with (
        reading(agent) as state,
        pytest.raises(ExportError, match=r"generation 1 is for encoder .* set agent.encoder"),
    ):
        export_generation(state, other, None, tmp_path / "model.onnx", progress=quiet)


def test_a_score_that_no_static_graph_holds_is_left_out_only_when_that_is_said(
    agent: Agent, install: Install, make_bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "LOOK_AT_ALL", 2)
    install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))
    with pytest.raises(ExportError, match="--without-score"):
        exported(agent, tmp_path / "model.onnx")
    exported(agent, tmp_path / "model.onnx", with_score=False)
    found = run(tmp_path / "model.onnx", samples(64))
    loaded = load(agent.state.generations.get(1), agent.sessions, with_score=False)
    answers = loaded.serving.predict(samples(64))
    assert found["label_name"].tolist() == [answer.label for answer in answers]
    assert not {"ood_score", "ood_p_value"} & found.keys()


@pytest.fixture
def two_bundles(install: Install, make_bundle) -> None:
    install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))


@pytest.mark.parametrize("tampered", ["head", "adapter", "share", "score"])
@pytest.mark.usefixtures("two_bundles")
def test_a_model_that_says_something_else_is_not_written(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tampered: str
) -> None:
    real = module.load

    def changed(*arguments: Any, **options: Any) -> Any:
        loaded = real(*arguments, **options)
        parts = loaded.parts
        groups = list(parts.groups)
        number = next(k for k, group in enumerate(groups) if group.head is not None)
        if tampered == "head":
            groups[number].head.biases = groups[number].head.biases[::-1] * 3.0
        elif tampered == "adapter":
            zeros = {name: 0 * value for name, value in groups[number].tensors.items()}
            groups[number] = replace(groups[number], tensors=zeros)
        elif tampered == "share":
            order = np.roll(np.arange(len(parts.mixture.labels)), 1)
            parts = replace(parts, mixture=replace(parts.mixture, label=order, component=order))
        else:
            score = copy(parts.score)
            score.view_scale = (score.view_scale[0] + 1.0, score.view_scale[1])
            parts = replace(parts, score=score)
        return replace(loaded, parts=replace(parts, groups=groups))

    monkeypatch.setattr(module, "load", changed)
    with pytest.raises(ParityError, match="nothing was written"):
        exported(agent, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_groups_that_are_not_the_heads_are_refused(
    agent: Agent, install: Install, make_bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(make_bundle((0, 1, 2)), make_bundle((3, 4, 5), adapter=1))
    parts = load(agent.state.generations.get(1), agent.sessions).parts
    with pytest.raises(EncoderError, match="1 bundles are not those"):
        module.whole_model(replace(parts, groups=[Group()]))
