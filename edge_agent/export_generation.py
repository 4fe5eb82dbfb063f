"""A generation of this device as one ONNX model that runs without the device.

Gathers what the generation consists of, has `exporter.standalone` write the model, and compares it
with what the device answers with one round of routing before anything is on the disk. The state
directory is only read, also while an agent runs on it. `edge_agent.export_cli` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from adapter_store.bundle import FROZEN
from adapter_store.generation import Generation
from adapter_store.state import StateReader
from edge_agent.adapters import Adapters, StoredBundles
from edge_agent.config import AlarmSection
from edge_agent.decision import Decision, OwnHeads
from edge_agent.errors import ExportError, NoGenerationError
from edge_agent.installer import Settings, load_serving
from edge_agent.prepared import Prepared
from edge_agent.router import FloatArray, IntArray
from edge_agent.serving import Serving
from edge_agent.snapshot import unpack_snapshots
from exporter.routing_graph import Group
from exporter.sessions import EncoderSessions, rows_at_once, session_options
from exporter.standalone import (
    BASE,
    OWN,
    GenerationParts,
    answering_model,
    check_place,
    metadata,
    whole_model,
    write_model,
)
from exporter.standalone_parity import Answers, StandaloneReport, compared
from ood.combined import CombinedScore
from ood.logits import Discriminant
from ood.scores import MahalanobisScore
from ood.statistics import l2_normalise

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]
Progress = Callable[[str], None]

_NOISE: Final = 32
_JOURNALLED: Final = 128
_NOISE_SEED: Final = 20_240_229
_BATCH: Final = 32


@dataclass(frozen=True, eq=False)
class Loaded:
    """A generation in memory, as its model needs it and as the device runs it.

    Attributes:
        generation: What it is on disk.
        sessions: The encoder.
        bundles: Its bundles, read when asked for.
        prepared: The sums over them.
        serving: What answers with one round of routing.
        parts: What the model is made of.
    """

    generation: Generation
    sessions: EncoderSessions
    bundles: StoredBundles
    prepared: Prepared
    serving: Serving
    parts: GenerationParts


def export_generation(
    state: StateReader,
    sessions: EncoderSessions,
    number: int | None,
    out: Path,
    *,
    with_score: bool = True,
    progress: Progress,
) -> int:
    """Write a generation as one model.

    Args:
        state: The device's state; it is only read.
        sessions: The encoder.
        number: Which generation; the active one when None.
        out: The file to write, whole or not at all.
        with_score: Whether the model scores how foreign samples are.
        progress: Told how far the model and the device differ.

    Returns:
        The file's size in bytes.

    Raises:
        NoGenerationError: None is active.
        GenerationError: There is no generation of that number, or it is damaged.
        ExportError: A static graph cannot hold this generation; the message says why.
        EncoderError: The encoder lacks a graph that is needed, or the place is no file's.
        ParityError: The model does not say what the device says.
        DiskFullError: It cannot be written.
    """
    check_place(out)
    generation = state.generations.current() if number is None else state.generations.get(number)
    if generation is None:
        raise NoGenerationError(
            f"no generation is active in {state.path}; `driftkeel agent fit` makes the first one"
        )
    loaded = load(generation, sessions, with_score=with_score)
    progress("writing the graph")
    model = whole_model(loaded.parts)
    journalled = _journalled(state, sessions.package.image_size)
    for report in parity(loaded, model, journalled):
        for line in report.lines():
            progress(line)
    for line in _cost_of_one_round(loaded, journalled):
        progress(line)
    about = metadata(
        loaded.parts,
        number=generation.number,
        digest=generation.digest,
        bundles=list(loaded.bundles),
    )
    return write_model(model, about, out)


def load(generation: Generation, sessions: EncoderSessions, *, with_score: bool = True) -> Loaded:
    """Gather what a generation consists of.

    Raises:
        ExportError: A static graph cannot hold it, or it is for another encoder.
        DriftkeelError: It or one of its bundles is damaged.
    """
    manifest, package = generation.manifest, sessions.package
    if manifest.encoder != package.digest:
        raise ExportError(
            f"generation {generation.number} is for encoder {manifest.encoder[:12]}, the "
            f"configuration names {package.digest[:12]}; set agent.encoder to the one it was "
            "made with"
        )
    if manifest.aligned:
        raise ExportError(
            f"generation {generation.number} aligns the features of a shifted domain, which one "
            "model cannot hold; export one without an alignment, such as its parent "
            f"({manifest.parent})"
        )
    bundles = StoredBundles(generation.bundle_bytes, manifest.bundles, package.interface())
    kept = generation.prepared()
    prepared = None if kept is None else Prepared.from_bytes(kept, encoder=package.digest)
    if prepared is None or sorted(prepared.summaries) != manifest.bundles:
        prepared = Prepared.of(bundles)
    serving = _serving(generation, sessions, prepared, max_rounds=1)
    detector = serving.detector
    if with_score and not isinstance(detector.scorer, CombinedScore | MahalanobisScore):
        raise ExportError(
            f"generation {generation.number} knows so many classes that its OOD score looks at "
            "those near a sample only, which a static graph cannot; --without-score writes a model "
            "that decides and does not score"
        )
    heads = OwnHeads(prepared.own)
    groups = []
    for bundle in bundles.values():
        if bundle.manifest.family == FROZEN:
            groups.append(Group())
            continue
        head = Discriminant(heads.head(bundle.own))
        groups.append(Group(bundle.manifest.family, bundle.tensors, head))
    parts = GenerationParts(
        package=package,
        mixture=detector.mixture,
        groups=groups,
        score=detector.scorer if with_score else None,
        calibration=detector.calibration if with_score else None,
    )
    return Loaded(generation, sessions, bundles, prepared, serving, parts)


def parity(
    loaded: Loaded, model: onnx.ModelProto, journalled: Images
) -> Iterator[StandaloneReport]:
    """Compare a generation's model with what the device answers.

    Images may not lead to every adapter. So that each of them has been run and weighed, what
    follows base features is compared once more with features of every class in their place.

    Args:
        loaded: The generation.
        model: Its model.
        journalled: Images that the device has seen, uint8 [m, s, s, 3]; m may be 0.

    Raises:
        ParityError: They differ by more than the tolerances.
    """
    package = loaded.parts.package
    size = package.image_size
    rng = np.random.default_rng(_NOISE_SEED)
    noise = rng.integers(0, 256, (_NOISE, size, size, 3), dtype=np.uint8)
    calibration = loaded.parts.calibration
    session = _session(model, loaded.sessions.threads)
    for what, images in (("noise", noise), ("journalled images", journalled)):
        if len(images):
            found = _outputs(session, {"images": images}, rows_at_once(package))
            yield compared(what, _answers(loaded, images), found, calibration)
    del session
    features = _of_every_class(loaded)
    prefix = loaded.sessions.prefix(
        rng.standard_normal((len(noise), 3, size, size), dtype=np.float32)
    )
    hidden = np.resize(prefix, (len(features), *package.hidden_shape))
    session = _session(answering_model(loaded.parts), loaded.sessions.threads)
    found = _outputs(session, {"hidden": hidden, "features": features}, rows_at_once(package))
    answers = _answers_by_parts(loaded, hidden, features)
    yield compared("every class", answers, found, calibration)


def _of_every_class(loaded: Loaded) -> Floats:
    """Features as a sample of each installed class might have, float32 [entries, d]."""
    mixture = loaded.parts.mixture
    means, known = mixture.head.means, loaded.generation.calibration_features().astype(np.float64)
    # On a mean itself the distance is 0, of which float32 says nothing, and no sample lies there.
    away = known - means[mixture.evidence(known).nearest()]
    classes = means[mixture.component]
    return l2_normalise(classes + np.resize(away, classes.shape))


def _serving(
    generation: Generation, sessions: EncoderSessions, prepared: Prepared, *, max_rounds: int
) -> Serving:
    alarm = msgspec.convert(generation.manifest.alarm, AlarmSection)
    return load_serving(
        generation.bundle_bytes,
        sessions,
        generation.manifest.bundles,
        generation.calibration_features(),
        number=generation.number,
        digest=generation.digest,
        settings=Settings(
            false_alarm_every=alarm.false_alarm_every,
            max_rounds=max_rounds,
            block=alarm.block,
            prior_changes=alarm.prior_changes,
        ),
        prepared=prepared,
    )


def _answers(loaded: Loaded, images: Images) -> Answers:
    """What the device says of images."""
    inferred = loaded.serving.infer(images)
    labels = {label: index for index, label in enumerate(loaded.serving.labels)}
    places: dict[str | None, int] = {digest: n for n, digest in enumerate(loaded.bundles)}
    return Answers(
        label=np.array([labels[answer.label] for answer in inferred.answers], np.int64),
        probability=np.array([answer.probability for answer in inferred.answers]),
        adapter=np.array([places.get(a.adapter, -1) for a in inferred.answers], np.int64),
        score=inferred.scores,
    )


def _answers_by_parts(loaded: Loaded, hidden: Floats, features: Floats) -> Answers:
    """What it says of features that are not those of the hidden values beside them."""
    mixture, order = loaded.parts.mixture, list(loaded.bundles)
    adapts = np.array([group.family is not None for group in loaded.parts.groups])
    decision = Decision(mixture, adapts.tolist(), max_rounds=1)
    adapters = Adapters(loaded.sessions, loaded.bundles, OwnHeads(loaded.prepared.own), capacity=1)
    label = np.zeros(len(features), np.int64)
    probability, adapter = np.zeros(len(features)), label.copy()
    owner = np.array([group for group, _ in mixture.entries])
    own = np.full((len(features), len(owner)), np.nan)
    for start in range(0, len(features), _BATCH):
        rows = slice(start, start + _BATCH)

        def look(group: int, chosen: IntArray, start: int = start) -> FloatArray:
            held = adapters.get(order[group])
            if held is None:
                raise ExportError(f"bundle {order[group][:12]} cannot be read any more")
            found = held.log_likelihoods(hidden[start + chosen])
            own[np.ix_(start + chosen, owner == group)] = found
            return found

        routed = decision.route(mixture.evidence(features[rows]), look)
        label[rows] = routed.label
        probability[rows] = routed.probabilities[np.arange(len(routed.label)), routed.label]
        looked = adapts[routed.group] & (routed.adapter_passes > 0)
        adapter[rows] = np.where(looked, routed.group, -1)
    every = np.arange(len(features)), np.arange(len(mixture.label))
    evidence = {BASE: mixture.evidence(features).of(*every)}
    if adapts.any():
        evidence[OWN] = own
    scores = loaded.serving.detector.score(features)
    return Answers(label, probability, adapter, scores, evidence)


def _cost_of_one_round(loaded: Loaded, journalled: Images) -> Iterator[str]:
    """How often the device decides otherwise because it looks again."""
    rounds = int(loaded.generation.manifest.router.get("max_rounds", 1))
    adapted = sum(group.family is not None for group in loaded.parts.groups)
    if rounds < 2 or adapted < 2 or not len(journalled):
        return
    device = _serving(loaded.generation, loaded.sessions, loaded.prepared, max_rounds=rounds)
    pairs = zip(loaded.serving.predict(journalled), device.predict(journalled), strict=True)
    changed = sum(one.label != other.label for one, other in pairs)
    yield (
        f"with its own {rounds} rounds of routing the device labels {changed} of "
        f"{len(journalled)} journalled images otherwise"
    )


def _journalled(state: StateReader, image_size: int) -> Images:
    kept = [record.image for record in state.journal.recent(_JOURNALLED)]
    return unpack_snapshots([image for image in kept if image is not None], image_size)


def _session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )


def _outputs(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, NDArray[Any]], at_once: int
) -> dict[str, NDArray[Any]]:
    names = [entry.name for entry in session.get_outputs()]
    count = len(next(iter(feeds.values())))
    runs = [
        session.run(None, {name: rows[start : start + at_once] for name, rows in feeds.items()})
        for start in range(0, count, at_once)
    ]
    return {name: np.concatenate([run[k] for run in runs]) for k, name in enumerate(names)}
