"""The Fisher information of adapters, against closed forms and against what it says of changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.families import adapter_family, family_names
from exporter.fisher import diagonal_fisher
from exporter.merging import Change, aligned, changes_of, read_back, spelt_out
from exporter.programs import load_training_program
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, moved

X = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


def log_softmax(features: Tensor) -> Tensor:
    return torch.log_softmax(features, dim=1)


def shares(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = odds / odds.sum(axis=1, keepdims=True)
    return found


def test_of_a_softmax_regression_it_is_what_the_textbook_says() -> None:
    """A product that maps inputs to logits: E[x² p (1 - p)] for every entry."""
    rng = np.random.default_rng(1)
    tensors = {
        "a/up.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "a/down.weight": rng.normal(size=(2, 4)).astype(np.float32),
    }

    def program(hidden: Tensor, given: dict[str, Tensor]) -> Tensor:
        return hidden @ (given["a/up.weight"] @ given["a/down.weight"]).T

    change = changes_of("lora", tensors)
    (found,) = diagonal_fisher(program, "lora", change, X, log_softmax).values()  # type: ignore[arg-type]
    p = shares(X @ (tensors["a/up.weight"] @ tensors["a/down.weight"]).T)
    expected = np.einsum("nc,nj->cj", p * (1 - p), X**2) / len(X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_of_scales_and_shifts_of_logits_it_is_what_the_textbook_says() -> None:
    rng = np.random.default_rng(1)
    change = {f"a/{name}": rng.normal(size=4) for name in ("scale", "shift")}

    def program(hidden: Tensor, given: dict[str, Tensor]) -> Tensor:
        return hidden * (1 + given["a/scale"]) + given["a/shift"]

    found = diagonal_fisher(program, "ssf", change, X, log_softmax)  # type: ignore[arg-type]
    p = shares(X * (1 + change["a/scale"]) + change["a/shift"])
    np.testing.assert_allclose(found["a/shift"], (p * (1 - p)).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["a/scale"], (p * (1 - p) * X**2).mean(axis=0), rtol=1e-5)


def information(
    sessions: EncoderSessions, family: str, change: Change, hidden: Array
) -> tuple[Change, Tensor]:
    """Of a head on the encoder's first eight features; and its log-probabilities."""
    program = load_training_program(sessions.package, family)

    def likely(features: Tensor) -> Tensor:
        return torch.log_softmax(30 * features[:, :8], dim=1)

    found = diagonal_fisher(program, family, change, hidden, likely)
    tensors = {name: torch.from_numpy(v) for name, v in spelt_out(family, change).items()}
    with torch.no_grad():
        return found, likely(program(torch.from_numpy(hidden), tensors)).double()


@pytest.mark.parametrize("family", family_names())
def test_every_family_s_has_a_number_for_each_of_its_change(
    encoders: dict[str, EncoderSessions], images: Array, family: str
) -> None:
    sessions = encoders["vit"]
    hidden = sessions.prefix(images)
    pads = adapter_family(family).pads
    pair = [moved(sessions.package, family, rank) for rank in ((2, 3) if pads else (3, 3))]
    for change in aligned(family, pair):
        found, _ = information(sessions, family, change, hidden)
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in change.items()
        }
        for value in found.values():
            assert np.isfinite(value).all()
            assert (value >= 0).all()
            assert value.max() > 0


@pytest.mark.parametrize("family", ["bitfit", "hydra", "lora", "sparse"])
def test_it_says_how_far_predictions_move_when_an_entry_does(
    encoders: dict[str, EncoderSessions], images: Array, family: str
) -> None:
    """KL(p, p + change of one entry) is half its information times the change's square."""
    sessions = encoders["vit"]
    hidden = sessions.prefix(images)
    change = changes_of(family, moved(sessions.package, family, 2))
    found, before = information(sessions, family, change, hidden)
    name = min(found)
    entry = np.unravel_index(found[name].argmax(), found[name].shape)
    step = 0.02 / np.sqrt(found[name][entry])
    divergence = 0.0
    for sign in (-1, 1):
        near = {**change, name: change[name].copy()}
        near[name][entry] += sign * step
        _, after = information(sessions, family, near, hidden)
        divergence += float(F.kl_div(after, before, log_target=True, reduction="batchmean")) / 2
    assert divergence == pytest.approx(0.0002, rel=0.1)


def test_it_does_not_depend_on_the_order_of_the_samples(
    encoders: dict[str, EncoderSessions], images: Array
) -> None:
    sessions = encoders["vit"]
    hidden = sessions.prefix(images)
    change = changes_of("bottleneck", moved(sessions.package, "bottleneck", 2))
    one, _ = information(sessions, "bottleneck", change, hidden)
    other, _ = information(sessions, "bottleneck", change, np.ascontiguousarray(hidden[::-1]))
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-9)


@pytest.mark.parametrize("family", family_names())
def test_an_adapter_spelt_out_does_the_same(
    encoders: dict[str, EncoderSessions], images: Array, family: str
) -> None:
    sessions = encoders["vit"]
    hidden = sessions.prefix(images)
    tensors = moved(sessions.package, family, 3)
    change = changes_of(family, tensors)
    whole = spelt_out(family, change)
    np.testing.assert_allclose(
        sessions.suffix(hidden, whole, family), sessions.suffix(hidden, tensors, family), atol=1e-5
    )
    back = read_back(change, {name: value.astype(np.float64) for name, value in whole.items()})
    for name, value in change.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-6)
