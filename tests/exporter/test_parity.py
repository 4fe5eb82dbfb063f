from __future__ import annotations

import numpy as np
import pytest

from exporter import parity as module
from exporter.errors import ParityError
from exporter.package import EncoderPackage
from exporter.parity import parity
from tests.exporter.conftest import Array


def test_every_form_agrees_with_torch(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    report = parity(package, "bottleneck", tensors, hidden)
    assert report.samples == len(hidden)
    assert set(report.forms) == {"fed", "attached"}
    assert report.largest < 1e-5
    for form in report.forms.values():
        assert form.decisions_changed == 0
        assert 0 <= form.quantiles[0] <= form.quantiles[-1] <= form.largest


def test_a_form_that_computes_something_else_is_refused_by_its_name(
    package: EncoderPackage,
    hidden: Array,
    tensors: dict[str, Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = module.attach

    def forgetful(
        package: EncoderPackage, tensors: object, *args: object, **more: object
    ) -> object:
        return honest(package, {}, *args, **more)

    monkeypatch.setattr(module, "attach", forgetful)
    with pytest.raises(ParityError, match="the attached suffix of 'tiny' differs"):
        parity(package, "bottleneck", tensors, hidden)


def test_an_adapter_that_overflows_is_refused(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    large = {name: np.full_like(value, 1e30) for name, value in tensors.items()}
    with pytest.raises(ParityError):
        parity(package, "bottleneck", large, hidden)


def test_changed_decisions_are_counted(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    calls: list[int] = []

    def fickle(features: Array) -> np.ndarray:
        calls.append(len(features))
        return np.arange(len(features)) + len(calls) % 2

    report = parity(package, "bottleneck", tensors, hidden, decide=fickle)
    assert report.forms["fed"].decisions_changed == len(hidden)


def test_one_sample_is_enough_and_none_is_not(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    assert parity(package, "bottleneck", tensors, hidden[:1]).samples == 1
    with pytest.raises(ParityError, match="at least one"):
        parity(package, "bottleneck", tensors, hidden[:0])
