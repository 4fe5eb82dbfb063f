"""What every strategy must do, whichever it is: learn, answer, forget nothing by accident."""

import hashlib
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from edge_agent.errors import StrategyError
from edge_agent.strategies import NAMES, Task, strategy
from edge_agent.strategies.engine import Engine
from exporter.preprocess import prepare

TESTED = 12


@pytest.fixture(scope="module")
def task_of(make_images: Any, engine: Engine) -> Any:
    @cache
    def make(number: int, classes: tuple[int, ...], per_class: int) -> Task:
        images, labels = make_images(classes, per_class, seed=100 * number)
        hidden = engine.sessions.prefix(prepare(images, engine.package))
        return Task(number, hidden.astype(np.float16), labels, seed=number)

    return make


def learned(name: str, engine: Engine, tasks: list[Task]) -> Any:
    memory = None
    for task in tasks:
        memory = strategy(name).learn(engine, memory, task)
    return memory


def accuracy(name: str, engine: Engine, memory: Any, task: Task) -> float:
    predictor = strategy(name).predictor(engine, memory)
    prediction = predictor.predict(task.hidden.astype(np.float32))
    assert prediction.probabilities.shape == (len(task.labels), len(predictor.labels))
    assert np.allclose(prediction.probabilities.sum(axis=1), 1.0)
    assert (prediction.passes >= 1.0).all()
    guesses = np.array(predictor.labels)[prediction.probabilities.argmax(axis=1)]
    return float((guesses == np.array(task.labels)).mean())


def arrays(value: Any) -> list[np.ndarray]:
    """Every array inside a memory."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [found for key in sorted(value, key=str) for found in arrays(value[key])]
    if isinstance(value, list | tuple):
        return [found for item in value for found in arrays(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [found for f in fields(value) for found in arrays(getattr(value, f.name))]
    return []


def fingerprint(memory: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays(memory):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_classes_of_several_tasks_are_told_apart(name: str, engine: Engine, task_of: Any) -> None:
    memory = learned(name, engine, [task_of(0, (0, 1), 20), task_of(1, (3, 4), 20)])
    assert accuracy(name, engine, memory, task_of(2, (0, 1, 3, 4), TESTED)) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_an_old_class_may_get_more_examples(name: str, engine: Engine, task_of: Any) -> None:
    memory = learned(name, engine, [task_of(0, (0, 1), 15), task_of(1, (1, 3), 15)])
    predictor = strategy(name).predictor(engine, memory)
    assert predictor.labels == ("stripes-0", "stripes-1", "stripes-3")
    assert accuracy(name, engine, memory, task_of(2, (0, 1, 3), TESTED)) > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_one_example_a_class_is_enough_to_answer(name: str, engine: Engine, task_of: Any) -> None:
    memory = learned(name, engine, [task_of(0, (0, 3), 1), task_of(1, (1, 4), 1)])
    assert 0.0 <= accuracy(name, engine, memory, task_of(2, (0, 1, 3, 4), 4)) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_task_of_one_class_is_learned(name: str, engine: Engine, task_of: Any) -> None:
    memory = learned(name, engine, [task_of(0, (0,), 10), task_of(1, (3,), 10)])
    assert accuracy(name, engine, memory, task_of(2, (0, 3), TESTED)) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_learning_leaves_the_memory_it_was_given_alone(
    name: str, engine: Engine, task_of: Any
) -> None:
    first = strategy(name).learn(engine, None, task_of(0, (0, 1), 10))
    before = fingerprint(first)
    strategy(name).learn(engine, first, task_of(1, (3, 4), 10))
    assert fingerprint(first) == before


@pytest.mark.parametrize("name", NAMES)
def test_predicting_alters_nothing_and_repeats(name: str, engine: Engine, task_of: Any) -> None:
    memory = learned(name, engine, [task_of(0, (0, 1), 10), task_of(1, (3, 4), 10)])
    before = fingerprint(memory)
    probe = task_of(2, (0, 1, 3, 4), 4).hidden.astype(np.float32)
    once, again = (
        strategy(name).predictor(engine, memory).predict(probe).probabilities for _ in range(2)
    )
    assert np.array_equal(once, again)
    assert fingerprint(memory) == before


@pytest.mark.parametrize("name", [name for name in NAMES if name != "joint"])
def test_no_raw_sample_is_kept(name: str, engine: Engine, task_of: Any) -> None:
    task = task_of(0, (0, 1), 10)
    memory = strategy(name).learn(engine, None, task)
    samples, width = len(task.labels), task.hidden[0].size
    for array in arrays(memory):
        assert array.shape[:1] != (samples,)
        assert array.size < samples * width or array.ndim <= 2
    assert strategy(name).stored_bytes(memory) > 0


def test_an_unknown_strategy_is_refused_by_name() -> None:
    with pytest.raises(StrategyError, match=r"no strategy 'mso'; there is .*driftkeel"):
        strategy("mso")
