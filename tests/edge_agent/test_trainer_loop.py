"""The training loop: stopped at any step it resumes to the same weights; what it keeps."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_agent.objectives import CosineHead
from edge_agent.trainer_loop import Progress, Recipe, Validation, saved_bytes, train

DIM, CLASSES, SAMPLES = 6, 3, 40
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.05, seed=3)
STEPS = 15


def program(hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return hidden + torch.relu(hidden @ tensors["down"]) @ tensors["up"]


def world(seed: int = 0, count: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % CLASSES
    centres = np.random.default_rng(99).normal(0, 1, (CLASSES, DIM))
    hidden = centres[targets] + rng.normal(0, 0.7, (count, DIM))
    return hidden.astype(np.float32), targets.astype(np.int64)


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "down": rng.normal(0, 0.3, (DIM, 2)).astype(np.float32),
        "up": np.zeros((2, DIM), np.float32),
    }


class Killed(Exception):  # noqa: N818 - not an error of the program
    pass


def run(
    recipe: Recipe = RECIPE,
    *,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    validation: Validation | None = None,
) -> dict[str, np.ndarray]:
    hidden, targets = world()
    head = np.stack([hidden[targets == k].mean(axis=0) for k in range(CLASSES)])
    return train(
        program,
        hidden,
        targets,
        initial(),
        CosineHead(head),
        recipe=recipe,
        checkpoint=checkpoint,
        report=report,
        validation=validation,
        checkpoint_every_s=0.0,
    )


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("validated", [False, True])
def test_stopped_after_any_step_it_resumes_to_the_same_bits(
    tmp_path: Path, optimiser: str, validated: bool
) -> None:
    recipe = replace(RECIPE, optimiser=optimiser, patience=2 * validated)
    validation = Validation(*world(5)) if validated else None
    told: list[Progress] = []
    straight = run(recipe, report=told.append, validation=validation)
    path = tmp_path / "checkpoint"

    def kill(progress: Progress) -> None:
        raise Killed

    # Killed at its first checkpoint again and again: every step is a resumption.
    kills = 0
    while True:
        try:
            resumed = run(recipe, checkpoint=path, report=kill, validation=validation)
        except Killed:
            kills += 1
            continue
        break
    assert kills == len(told)
    assert kills == STEPS or validated
    for name, tensor in straight.items():
        np.testing.assert_array_equal(resumed[name], tensor)


def test_progress_counts_steps_and_never_goes_back() -> None:
    told: list[Progress] = []
    run(report=told.append)
    assert [p.step for p in told] == list(range(1, STEPS + 1))
    assert {p.steps for p in told} == {STEPS}
    assert told[-1].epoch == 3
    assert all(0.0 <= p.accuracy <= 1.0 for p in told)


def test_small_parts_of_a_batch_give_the_whole_batchs_result() -> None:
    whole, parts = run(), run(replace(RECIPE, micro_batch=3))
    for name, tensor in whole.items():
        np.testing.assert_allclose(parts[name], tensor, rtol=1e-3, atol=1e-5)


def test_training_stops_when_the_validation_part_says_so_and_keeps_the_best() -> None:
    hidden, targets = world(5)
    # Every label wrong: the more is learned, the worse it gets.
    wrong = Validation(hidden, (targets + 1) % CLASSES)
    told: list[Progress] = []
    recipe = replace(RECIPE, epochs=30, patience=2)
    stopped = run(recipe, report=told.append, validation=wrong)
    best = told[-1].epoch - 2
    assert 1 <= best < 6
    # The learning rate falls over all 30 epochs in both, so the epochs are the same.
    kept: dict[str, np.ndarray] = {}

    def keep(progress: Progress, tensors: Mapping[str, Tensor]) -> bool:
        kept.update({k: t.detach().numpy().copy() for k, t in tensors.items()})
        return progress.epoch == best

    samples, classes = world()
    head = np.stack([samples[classes == k].mean(axis=0) for k in range(CLASSES)])
    train(
        program,
        samples,
        classes,
        initial(),
        CosineHead(head),
        recipe=recipe,
        checkpoint=None,
        report=lambda _: None,
        should_stop=keep,
    )
    for name, tensor in kept.items():
        np.testing.assert_array_equal(stopped[name], tensor)


def test_half_precision_activations_are_as_good_as_any() -> None:
    hidden, targets = world()
    head = np.zeros((CLASSES, DIM), np.float32)
    head[:, :CLASSES] = np.eye(CLASSES)

    def trained(samples: np.ndarray) -> dict[str, np.ndarray]:
        return train(
            program,
            samples,
            targets,
            initial(),
            CosineHead(head),
            recipe=RECIPE,
            checkpoint=None,
            report=lambda _: None,
        )

    exact, halved = trained(hidden), trained(hidden.astype(np.float16))
    for name, tensor in exact.items():
        np.testing.assert_allclose(halved[name], tensor, atol=0.02)


def test_what_a_sample_keeps_for_its_gradient_is_counted() -> None:
    hidden, _ = world()
    kept = saved_bytes(program, hidden, initial())
    assert DIM * 4 <= kept <= 100 * DIM * 4
    assert kept == saved_bytes(program, hidden[5:], initial())
