"""One run with a bank is every row's run with its own adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from exporter.bank import BARE, AdapterBank, BankSuffix
from exporter.build import build_encoder
from exporter.errors import EncoderError
from exporter.families import adapter_family, family_names
from exporter.sessions import BATCH_ROWS, EncoderSessions
from tests.exporter.conftest import CONVOLUTIONAL, Array, adapter, moved

CASES = [("vit", name) for name in family_names()] + [("cnn", name) for name in CONVOLUTIONAL]


def row_by_row(
    sessions: EncoderSessions,
    family: str,
    hidden: Array,
    adapters: list[dict[str, Array]],
    index: np.ndarray,
) -> Array:
    return np.concatenate(
        [
            sessions.suffix(hidden[i : i + 1], None if k == BARE else adapters[k], family)
            for i, k in enumerate(index)
        ]
    )


@pytest.mark.parametrize(("network", "family"), CASES)
def test_every_row_gets_its_own_adapter_whatever_its_rank(
    encoders: dict[str, EncoderSessions], images: Array, network: str, family: str
) -> None:
    sessions = encoders[network]
    hidden = sessions.prefix(images)
    ranks = (1, 4, 2) if adapter_family(family).pads else (3, 3, 3)
    adapters = [moved(sessions.package, family, rank) for rank in ranks]
    adapters[1] = {name: 2 * value for name, value in adapters[1].items()}
    index = np.array([2, 0, BARE, 1, 1, 2])
    bank = AdapterBank(sessions.package, family, adapters)
    found = BankSuffix(sessions, family).run(hidden, bank, index)
    expected = row_by_row(sessions, family, hidden, adapters, index)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - sessions.suffix(hidden, family=family))[index != BARE].max() > 1e-3


def test_rows_without_positions_are_banked_too(tmp_path: Path) -> None:
    """Where hidden values are plain vectors, the captured maps are other nodes."""
    prefix = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    package = build_encoder(
        prefix,
        nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4)),
        sites={"0": 6},
        image_size=8,
        name="flat",
        out=tmp_path / "flat",
        families=("bottleneck", "hydra", "sparse", "ssf"),
    )
    sessions = EncoderSessions(package)
    hidden = np.random.default_rng(0).standard_normal((5, 6), dtype=np.float32)
    index = np.array([1, 0, BARE, 1, 0])
    for family in package.families:
        adapters = [moved(package, family, rank) for rank in (2, 3)]
        bank = AdapterBank(package, family, adapters)
        found = BankSuffix(sessions, family).run(hidden, bank, index)
        expected = row_by_row(sessions, family, hidden, adapters, index)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_long_batches_keep_rows_and_indices_together(
    sessions: EncoderSessions, hidden: Array
) -> None:
    package = sessions.package
    adapters = [adapter(package, 2), adapter(package, 3)]
    many = np.concatenate([hidden] * (BATCH_ROWS // len(hidden) + 2))
    index = np.arange(len(many)) % 2
    bank = AdapterBank(package, "bottleneck", adapters)
    suffix = BankSuffix(sessions, "bottleneck")
    found = suffix.run(many, bank, index)
    assert len(found) == len(many) > BATCH_ROWS
    for number, tensors in enumerate(adapters):
        expected = sessions.suffix(many[index == number], tensors)
        np.testing.assert_allclose(found[index == number], expected, atol=1e-5)
    assert suffix.run(many[:0], bank, index[:0]).shape == (0, package.feature_dim)


def test_ranks_that_cannot_be_padded_are_refused(encoders: dict[str, EncoderSessions]) -> None:
    package = encoders["vit"].package
    adapters = [moved(package, "prefix", rank) for rank in (2, 3)]
    with pytest.raises(
        EncoderError, match="'prefix' in one bank cannot differ in rank; found 2, 3"
    ):
        AdapterBank(package, "prefix", adapters)


def test_an_empty_bank_and_a_foreign_adapter_are_refused(
    sessions: EncoderSessions, tensors: dict[str, Array]
) -> None:
    with pytest.raises(EncoderError, match="at least one adapter"):
        AdapterBank(sessions.package, "bottleneck", [])
    with pytest.raises(EncoderError, match="is missing"):
        AdapterBank(sessions.package, "bottleneck", [tensors, {}])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.array([0, 1, 0, 0, 0, 0]), "adapters 0 to 0"),
        (np.array([0, -2, 0, 0, 0, 0]), "index has -2 to 0"),
        (np.zeros(5, np.int64), r"expected int64 \[6\]"),
        (np.zeros(6, np.int32), "index is int32"),
    ],
)
def test_an_index_that_names_no_adapter_is_refused(
    sessions: EncoderSessions,
    hidden: Array,
    tensors: dict[str, Array],
    index: np.ndarray,
    message: str,
) -> None:
    bank = AdapterBank(sessions.package, "bottleneck", [tensors])
    with pytest.raises(EncoderError, match=message):
        BankSuffix(sessions, "bottleneck").run(hidden, bank, index)


def test_a_bank_of_another_family_is_refused(encoders: dict[str, EncoderSessions]) -> None:
    sessions = encoders["vit"]
    bank = AdapterBank(sessions.package, "lora", [moved(sessions.package, "lora", 2)])
    hidden = np.zeros((1, *sessions.package.hidden_shape), np.float32)
    with pytest.raises(EncoderError, match="bank is of 'lora', the suffix of 'bottleneck'"):
        BankSuffix(sessions, "bottleneck").run(hidden, bank, np.zeros(1, np.int64))
