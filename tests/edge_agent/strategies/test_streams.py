"""Every strategy on every kind of stream, without being told which task a sample is of."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from edge_agent.bench.datasets import Column
from edge_agent.bench.streams import StreamSettings, build
from edge_agent.strategies import NAMES, Task, strategy
from edge_agent.strategies.engine import Engine
from exporter.preprocess import prepare

CLASSES = (0, 1, 3, 4)
PER_CELL = 30
# Guessing among the classes is right one time in four.
LEAST = 0.6
STREAMS = {
    "classes": StreamSettings(kind="class", init=2, increment=2),
    "domains": StreamSettings(kind="domain"),
    "both at once": StreamSettings(kind="mixed", init=2, increment=2),
    "5 shots": StreamSettings(kind="class", init=2, increment=2, shots=5),
    "10 shots in each domain": StreamSettings(kind="domain", shots=10),
    "blurry boundaries": StreamSettings(kind="class", init=2, increment=2, blurry=0.2),
    "old classes again": StreamSettings(kind="class", init=2, increment=2, revisit=0.3),
    "imbalance": StreamSettings(kind="class", init=2, increment=2, imbalance=5.0),
}


@pytest.fixture(scope="module")
def stream_of(make_images: Any, engine: Engine) -> Any:
    """Tasks and tests of a stream over four classes in two domains: as they are, and inverted."""
    images, names = make_images(CLASSES, 2 * PER_CELL, seed=5)
    labels, truth = np.unique(np.array(names), return_inverse=True)
    domain = np.arange(len(names)) % 2
    shown = np.where(domain[:, None, None, None] == 1, 255 - images, images)
    hidden = engine.sessions.prefix(prepare(shown, engine.package))
    classes = Column(truth.astype(np.int64), tuple(map(str, labels)))
    domains = Column(domain, ("plain", "inverted"))

    @cache
    def make(settings: StreamSettings) -> Any:
        seen = np.ones(len(names), bool) if settings.kind != "class" else domain == 0
        rows = np.flatnonzero(seen)
        tasks = build(
            Column(classes.index[rows], classes.names),
            None,
            Column(domains.index[rows], domains.names),
            settings,
        )
        learned = [
            Task(t, hidden[rows[task.train]], tuple(labels[task.labels]), seed=t)
            for t, task in enumerate(tasks)
        ]
        tests = rows[np.concatenate([task.test for task in tasks])]
        return learned, hidden[tests].astype(np.float32), labels[truth[tests]]

    return make


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_stream_is_learned(
    name: str, kind: str, engine: Engine, stream_of: Any
) -> None:
    tasks, hidden, truth = stream_of(STREAMS[kind])
    memory = None
    for task in tasks:
        memory = strategy(name).learn(engine, memory, task)
    predictor = strategy(name).predictor(engine, memory)
    found = np.array(predictor.labels)[predictor.predict(hidden).probabilities.argmax(axis=1)]
    assert np.mean(found == truth) > LEAST
