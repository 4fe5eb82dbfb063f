"""`mos` on whole tasks: its lazy answers are the published ones, and old labels may come again."""

from typing import Any

import numpy as np
import pytest

from edge_agent.strategies.base import Task
from edge_agent.strategies.engine import Engine
from edge_agent.strategies.heads import label_scores, softmax
from edge_agent.strategies.mos import Mos, MosMemory
from edge_agent.strategies.refinement import refine_exhaustive
from edge_agent.trainer_loop import Recipe
from exporter.package import EncoderPackage
from exporter.preprocess import prepare

CLASSES = (0, 1, 3)


@pytest.fixture(scope="module")
def engine(package: EncoderPackage) -> Engine:
    recipe = Recipe(epochs=1, batch_size=16, learning_rate=3e-3, seed=0)
    return Engine(package, recipe=recipe, rank=4)


def task(
    engine: Engine, make_images: Any, number: int, classes: tuple[int, ...], *, inverted: bool
) -> Task:
    images, labels = make_images(classes, 12, seed=100 * number)
    shown = 255 - images if inverted else images
    hidden = engine.sessions.prefix(prepare(shown, engine.package))
    return Task(number, hidden.astype(np.float16), labels, number)


@pytest.fixture(scope="module")
def domains(engine: Engine, make_images: Any) -> MosMemory:
    """The same classes three times: as they are, inverted, and as they are again."""
    memory = None
    for number, inverted in enumerate((False, True, False)):
        learned = task(engine, make_images, number, CLASSES, inverted=inverted)
        memory = Mos(epochs=2).learn(engine, memory, learned)
    assert memory is not None
    return memory


def test_a_task_whose_labels_are_all_old_adds_no_label(
    engine: Engine, make_images: Any, domains: MosMemory
) -> None:
    predictor = Mos().predictor(engine, domains)
    assert predictor.labels == tuple(f"stripes-{k}" for k in CLASSES)
    for inverted in (False, True):
        test = task(engine, make_images, 7, CLASSES, inverted=inverted)
        scores = predictor.predict(test.hidden.astype(np.float32)).probabilities
        assert scores.shape == (len(test.labels), len(CLASSES))
        found = np.array(predictor.labels)[scores.argmax(axis=1)]
        assert np.mean(found == np.array(test.labels)) > 0.8


def test_whole_answers_are_those_of_the_published_procedure(
    engine: Engine, make_images: Any, domains: MosMemory
) -> None:
    hidden = task(engine, make_images, 8, CLASSES, inverted=True).hidden.astype(np.float32)
    spaces = [engine.network(hidden, each.tensors) for each in domains.tasks]
    first = spaces[0] @ np.concatenate([each.prototypes for each in domains.tasks]).T
    every = np.stack([domains.head.logits(features) for features in spaces])
    owner = np.repeat(np.arange(3), len(CLASSES))
    refined = refine_exhaustive(first, every, owner)
    scores = softmax(refined.logits) + softmax(first.astype(np.float64) * 3)
    expected = label_scores(scores, np.tile(np.arange(len(CLASSES)), 3))
    told = Mos().predictor(engine, domains).predict(hidden)
    assert told.probabilities == pytest.approx(expected, abs=1e-5)
    extra = refined.visited[:, 1:].sum(axis=1)
    assert told.passes == pytest.approx(1.0 + engine.suffix_share * extra)
