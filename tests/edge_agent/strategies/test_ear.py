"""The strategy `ear` learns task after task on the shipped encoder, and forgets none."""

from collections.abc import Sequence

import numpy as np
import pytest

from edge_agent.search.candidates import active
from edge_agent.strategies.base import Task
from edge_agent.strategies.ear import Ear, Memory
from edge_agent.strategies.engine import Engine
from edge_agent.trainer_loop import Recipe
from exporter.package import default_encoder_package

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=5e-3, seed=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(default_encoder_package(), recipe=RECIPE, rank=4)


def _task(
    engine: Engine,
    number: int,
    classes: Sequence[int],
    per_class: int = 6,
    *,
    domain: float = 0.0,
    seed: int = 0,
) -> Task:
    """Activations around a centre for each class; a domain moves them all."""
    rng = np.random.default_rng((seed, number))
    shape = engine.package.hidden_shape
    targets = np.repeat(classes, per_class)
    centres = {k: np.random.default_rng(k).normal(size=shape) for k in classes}
    away = domain * np.random.default_rng(999).normal(size=shape)
    rows = np.stack([centres[k] + away + 0.3 * rng.normal(size=shape) for k in targets])
    return Task(number, rows.astype(np.float16), tuple(f"class-{k}" for k in targets), seed)


def _accuracy(engine: Engine, memory: Memory, task: Task) -> float:
    predictor = Ear().predictor(engine, memory)
    found = predictor.predict(task.hidden.astype(np.float32)).probabilities.argmax(axis=1)
    return float(
        np.mean([predictor.labels[k] == t for k, t in zip(found, task.labels, strict=True)])
    )


def test_classes_of_every_task_are_told_apart_without_knowing_the_task(engine: Engine) -> None:
    ear, memory = Ear(), None
    tasks = [_task(engine, 0, (0, 1, 2)), _task(engine, 1, (3, 4, 5))]
    for task in tasks:
        memory = ear.learn(engine, memory, task)
    assert memory is not None
    fresh = [_task(engine, 10, (0, 1, 2)), _task(engine, 11, (3, 4, 5))]
    assert min(_accuracy(engine, memory, task) for task in fresh) > 0.9
    prediction = ear.predictor(engine, memory).predict(fresh[0].hidden.astype(np.float32))
    assert prediction.probabilities.shape == (18, 6)
    assert np.allclose(prediction.probabilities.sum(axis=1), 1)
    assert (prediction.passes >= 1).all()
    assert (prediction.passes <= 1 + engine.suffix_share).all()


def test_more_samples_of_the_same_classes_reuse_the_adapter(engine: Engine) -> None:
    ear = Ear()
    first = ear.learn(engine, None, _task(engine, 0, (0, 1, 2), 20))
    second = ear.learn(engine, first, _task(engine, 1, (0, 1, 2), 20))
    assert len(second.groups) == 1
    assert second.groups[0].adapter is first.groups[0].adapter
    assert second.groups[0].base.counts.tolist() == [40, 40, 40]
    assert second.groups[0].own.counts.tolist() == [40, 40, 40]
    assert first.groups[0].base.counts.tolist() == [20, 20, 20]


def test_classes_in_a_new_domain_keep_their_names(engine: Engine) -> None:
    ear = Ear()
    memory = ear.learn(engine, None, _task(engine, 0, (0, 1, 2)))
    memory = ear.learn(engine, memory, _task(engine, 1, (0, 1, 2), domain=2.0))
    assert len(memory.groups) == 2
    assert ear.predictor(engine, memory).labels == ("class-0", "class-1", "class-2")
    for domain in (0.0, 2.0):
        assert _accuracy(engine, memory, _task(engine, 9, (0, 1, 2), domain=domain)) > 0.9


@pytest.mark.parametrize(("classes", "per_class"), [((0, 1, 2), 1), ((0,), 6)])
def test_too_little_to_train_on_is_kept_as_classes_alone(
    engine: Engine, classes: tuple[int, ...], per_class: int
) -> None:
    ear = Ear()
    memory = ear.learn(engine, None, _task(engine, 0, classes, per_class))
    assert memory.groups[0].adapter is None
    prediction = ear.predictor(engine, memory).predict(
        _task(engine, 5, classes).hidden.astype(np.float32)
    )
    assert (prediction.passes == 1).all()
    assert _accuracy(engine, memory, _task(engine, 5, classes)) > 0.9


def test_learning_is_repeatable_and_leaves_the_memory_given_as_it_was(engine: Engine) -> None:
    ear = Ear()
    first = ear.learn(engine, None, _task(engine, 0, (0, 1)))
    adapter = first.groups[0].adapter
    assert adapter is not None
    kept = {name: value.copy() for name, value in adapter.tensors.items()}
    one, two = (ear.learn(engine, first, _task(engine, 1, (2, 3))) for _ in range(2))
    for a, b in zip(one.groups, two.groups, strict=True):
        assert a.adapter is not None
        assert b.adapter is not None
        for name, value in a.adapter.tensors.items():
            assert np.array_equal(value, b.adapter.tensors[name])
    for name, value in kept.items():
        assert np.array_equal(value, adapter.tensors[name])


def test_only_the_sites_that_were_chosen_are_trained_and_stored(engine: Engine) -> None:
    ear = Ear()
    memory = ear.learn(engine, None, _task(engine, 0, (0, 1, 2)))
    group = memory.groups[0]
    assert group.adapter is not None
    own = 0
    for name, value in group.adapter.tensors.items():
        if active(group.adapter.candidate, name):
            own += value.nbytes
        else:
            assert not value.any()
    rest = group.base.size_bytes + group.own.size_bytes + len(group.signature.to_bytes())
    assert ear.stored_bytes(memory) == own + rest
