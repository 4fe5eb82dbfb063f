"""How sessions are made: the configuration, then the tuning, then the defaults."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import runtime_settings
from edge_agent.config import AgentSection
from edge_agent.runtime_settings import Machine, Tuned, cores, resolved, this_machine
from exporter.providers import RuntimeSettings

HERE = Machine(cpu="a chip", cores=4, architecture="arm64", onnxruntime="1.32.0")
FOUND = RuntimeSettings(("openvino",), 2, "extended")
BOTH = ("openvino", "cpu")


def section(**keys: Any) -> AgentSection:
    return AgentSection(device="d", state_dir="s", **keys)


def kept(settings: RuntimeSettings = FOUND, machine: Machine = HERE) -> dict[str, Any]:
    return msgspec.to_builtins(
        Tuned(settings=settings, machine=machine, median_ms=1.0, default_ms=2.0)
    )


def test_without_a_word_the_cpu_runs_on_one_thread() -> None:
    found = resolved(section(), {}, HERE, BOTH)
    assert (found.settings, found.source, found.problem) == (RuntimeSettings(), "defaults", "")


def test_what_was_tuned_is_taken() -> None:
    found = resolved(section(), kept(), HERE, BOTH)
    assert (found.settings, found.source, found.problem) == (FOUND, "tuning", "")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"threads": 3}, RuntimeSettings(("openvino",), 3, "extended")),
        ({"graph_optimisation": "basic"}, RuntimeSettings(("openvino",), 2, "basic")),
        ({"providers": BOTH}, RuntimeSettings(BOTH, 2, "extended")),
    ],
)
def test_a_configured_key_wins_and_the_others_stay_tuned(keys, expected) -> None:
    found = resolved(section(**keys), kept(), HERE, BOTH)
    assert (found.settings, found.source) == (expected, "tuning")


def test_with_every_key_configured_nothing_comes_from_the_tuning() -> None:
    keys = {"threads": 3, "graph_optimisation": "basic", "providers": BOTH}
    found = resolved(section(**keys), kept(), HERE, BOTH)
    assert found.settings == RuntimeSettings(BOTH, 3, "basic")
    assert found.source == "configuration"


def test_threads_that_were_tuned_for_another_provider_are_not_taken() -> None:
    found = resolved(section(providers=("cpu",)), kept(), HERE, BOTH)
    assert found.settings == RuntimeSettings()
    assert found.source == "configuration"
    assert "agent.providers takes cpu, the tuning is of openvino" in found.problem


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu", "another"), ("cores", 2), ("architecture", "x86"), ("onnxruntime", "1.22.0")],
)
def test_a_tuning_of_another_machine_does_not_count_and_says_why(field: str, value: Any) -> None:
    other = msgspec.structs.replace(HERE, **{field: value})
    found = resolved(section(), kept(machine=other), HERE, BOTH)
    assert (found.settings, found.source) == (RuntimeSettings(), "defaults")
    assert f"tuned with {field} {value}" in found.problem
    assert "driftkeel tune" in found.problem


def test_a_tuning_for_a_provider_that_is_gone_does_not_count() -> None:
    found = resolved(section(threads=2), kept(), HERE, ("cpu",))
    assert found.settings == RuntimeSettings(threads=2)
    assert "tuned for openvino, which is not here" in found.problem


@pytest.mark.parametrize("damaged", [{"settings": 3}, {"unknown": 1}])
def test_a_tuning_that_cannot_be_read_does_not_count(damaged: dict[str, Any]) -> None:
    found = resolved(section(), damaged, HERE, BOTH)
    assert found.settings == RuntimeSettings()
    assert "cannot be read" in found.problem


def test_this_machine_names_itself() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores == cores() >= 1
    assert this_machine() == machine


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: Chip 9\n\nprocessor\t: 1\nmodel name\t: Chip 9\n",
            "Chip 9",
        ),
        ("processor\t: 0\nCPU part\t: 0xd08\n\nModel\t\t: Board 4\n", "Board 4"),
    ],
)
def test_a_processor_is_known_by_what_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str
) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(runtime_settings, "_CPUINFO", tmp_path / "cpuinfo")
    assert this_machine().cpu == name
