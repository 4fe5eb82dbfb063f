"""What `lae` keeps of the paper, on each family it is for and on both kinds of encoder."""

from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.strategies.base import Task
from edge_agent.strategies.engine import Engine
from edge_agent.strategies.lae import Lae, LaeMemory
from edge_agent.trainer_loop import Recipe
from exporter.architectures import build_mobilenet
from exporter.build import build_vit
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.vit import VisionTransformer
from tests.exporter.test_mobilenet import SIZE, random_state

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=3e-3, seed=0)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> EncoderPackage:
    """A small transformer of random weights, built for three families."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_vit(
        VisionTransformer(image_size=32, patch=8, dim=32, depth=3, heads=2, hidden=48).state_dict(),
        image_size=32,
        suffix_blocks=2,
        heads=2,
        name="small",
        out=tmp_path_factory.mktemp("vit") / "small",
        families=("bottleneck", "lora", "prefix"),
    )


@pytest.fixture(scope="module")
def engine(vit: EncoderPackage) -> Engine:
    return Engine(vit, recipe=RECIPE, rank=4)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> EncoderPackage:
    """A narrow MobileNetV2 of random weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cnn") / "narrow"
    return build_mobilenet(
        random_state(), image_size=SIZE, suffix_blocks=4, name="narrow", out=folder
    )


@pytest.fixture(scope="module")
def task_of(make_images: Any) -> Any:
    """Striped images as an encoder's activations."""

    def make(engine: Engine, number: int, classes: tuple[int, ...], per_class: int = 12) -> Task:
        images, labels = make_images(classes, per_class, seed=100 * number)
        hidden = engine.sessions.prefix(prepare(images, engine.package))
        return Task(number, hidden.astype(np.float16), labels, number)

    return make


def learned(engine: Engine, lae: Lae, *tasks: Task) -> LaeMemory:
    memory = None
    for each in tasks:
        memory = lae.learn(engine, memory, each)
    assert memory is not None
    return memory


def accuracy(engine: Engine, memory: LaeMemory, test: Task) -> float:
    predictor = Lae().predictor(engine, memory)
    prediction = predictor.predict(test.hidden.astype(np.float32))
    assert prediction.passes == pytest.approx(1.0 + engine.suffix_share)
    found = np.array(predictor.labels)[prediction.probabilities.argmax(axis=1)]
    return float(np.mean(found == np.array(test.labels)))


def distance(one: Any, other: Any) -> float:
    """Between two adapters."""
    return float(np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one)))


@pytest.mark.parametrize(
    ("network", "family"),
    [("vit", "bottleneck"), ("vit", "lora"), ("vit", "prefix"), ("cnn", "bottleneck")],
)
def test_any_family_learns_on_any_encoder(
    network: str, family: str, request: pytest.FixtureRequest, task_of: Any
) -> None:
    engine = Engine(request.getfixturevalue(network), recipe=RECIPE, family=family, rank=4)
    tasks = task_of(engine, 0, (0, 1)), task_of(engine, 1, (3, 4))
    memory = learned(engine, Lae(epochs=5), *tasks)
    assert distance(memory.online.tensors, memory.offline.tensors) > 0
    # Guessing is right one time in four.
    assert accuracy(engine, memory, task_of(engine, 2, (0, 1, 3, 4))) > 0.6


def test_the_offline_adapter_starts_as_the_first_tasks_and_follows_slowly(
    engine: Engine, task_of: Any
) -> None:
    lae = Lae(epochs=5)
    first = learned(engine, lae, task_of(engine, 0, (0, 1)))
    assert distance(first.online.tensors, first.offline.tensors) == 0
    second = lae.learn(engine, first, task_of(engine, 1, (3, 4)))
    followed = distance(second.offline.tensors, first.offline.tensors)
    assert 0 < followed < 0.01 * distance(second.online.tensors, first.online.tensors)


def test_the_adapters_rest_in_the_first_epochs_of_a_later_task(
    engine: Engine, task_of: Any
) -> None:
    first = learned(engine, Lae(epochs=3), task_of(engine, 0, (0, 1)))
    assert distance(first.online.tensors, engine.fresh(0)) > 0
    second = Lae(epochs=3).learn(engine, first, task_of(engine, 1, (3, 4)))
    assert distance(second.online.tensors, first.online.tensors) == 0
    assert accuracy(engine, second, task_of(engine, 2, (0, 1, 3, 4))) > 0.8


def test_old_classes_are_known_in_the_space_the_adapter_has_moved_to(
    engine: Engine, task_of: Any
) -> None:
    lae = Lae(epochs=8, learning_rate=2e-2)
    old = task_of(engine, 0, (0, 1, 3, 4))
    first = learned(engine, lae, old)
    second = lae.learn(engine, first, task_of(engine, 1, (5, 6, 7, 8)))
    now = engine.network(old.hidden, second.online.tensors)
    truth = np.stack(
        [now[np.array(old.labels) == f"stripes-{k}"].mean(axis=0) for k in (0, 1, 3, 4)]
    )
    carried, before = second.online.statistics.means[:4], first.online.statistics.means
    assert np.linalg.norm(carried - truth) < np.linalg.norm(before - truth)


def test_a_task_adds_to_what_is_stored_no_more_than_its_classes(
    engine: Engine, task_of: Any
) -> None:
    lae = Lae(epochs=1)
    tasks = [task_of(engine, t, (2 * t, 2 * t + 1)) for t in range(3)]
    sizes = [lae.stored_bytes(learned(engine, lae, *tasks[:count])) for count in (1, 2, 3)]
    mean_and_count = 4 * engine.package.network_dim + 8
    assert np.diff(sizes).tolist() == [2 * 2 * mean_and_count] * 2
