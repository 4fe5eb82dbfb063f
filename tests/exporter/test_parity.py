from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from exporter import parity as module
from exporter.derived import DERIVED
from exporter.errors import EncoderError, ParityError
from exporter.package import EncoderPackage
from exporter.parity import parity
from exporter.sessions import EncoderSessions
from tests.exporter.conftest import Array, moved


def test_every_form_agrees_with_torch(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    report = parity(package, "bottleneck", tensors, hidden)
    assert report.samples == len(hidden)
    assert set(report.forms) == {"fed", "attached", "bank", "standalone"}
    assert list(report.left_out) == ["folded"]
    assert "not linear" in report.left_out["folded"]
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
    with pytest.raises(ParityError, match="the standalone suffix of 'tiny' differs"):
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


@pytest.mark.parametrize("family", ["ia3", "lora", "ssf"])
def test_a_linear_family_is_compared_in_every_form(
    encoders: dict[str, EncoderSessions], images: Array, family: str
) -> None:
    sessions = encoders["vit"]
    tensors = moved(sessions.package, family, 3)
    report = parity(sessions.package, family, tensors, sessions.prefix(images))
    assert set(report.forms) == {"fed", "attached", "bank", "folded", "standalone"}
    assert not report.left_out
    assert report.largest < 1e-5


def test_only_the_forms_asked_for_are_compared(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    report = parity(package, "bottleneck", tensors, hidden, forms=("fed",))
    assert (set(report.forms), dict(report.left_out)) == ({"fed"}, {})


def test_an_older_package_is_compared_in_the_forms_it_has(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array], tmp_path: Path
) -> None:
    older = EncoderPackage.load(Path(shutil.copytree(package.path, tmp_path / "older")))
    (older.path / DERIVED).unlink()
    report = parity(older, "bottleneck", tensors, hidden)
    assert set(report.forms) == {"fed", "attached", "standalone"}
    assert "driftkeel encoder derive" in report.left_out["bank"]


def test_tensors_of_another_encoder_are_refused(
    package: EncoderPackage, hidden: Array, tensors: dict[str, Array]
) -> None:
    with pytest.raises(EncoderError):
        parity(package, "bottleneck", dict(list(tensors.items())[1:]), hidden)
