"""How this device's sessions are made: what the configuration says, then what tuning found.

The agent asks when it loads a generation; `driftkeel tune` writes what is kept in a generation's
manifest. Nothing here makes a session or measures.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import onnxruntime

from adapter_store.generation import Generation
from edge_agent.config import AgentSection
from exporter.providers import ProviderName, RuntimeSettings, available, chosen

log = logging.getLogger(__name__)

Source = Literal["configuration", "tuning", "defaults"]

_CPUINFO: Final = Path("/proc/cpuinfo")
# What names a processor there: x86, some ARM, and the ARM boards that say what board they are.
_NAMES: Final = ("model name", "Processor", "Hardware", "Model")


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a measurement is true of.

    Attributes:
        cpu: The processor's name.
        cores: Cores that this process may use.
        architecture: Its instruction set.
        onnxruntime: ONNX Runtime's version.
    """

    cpu: str
    cores: int
    architecture: str
    onnxruntime: str


class Tuned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a generation's manifest holds under `runtime`.

    Attributes:
        settings: What was fastest.
        machine: Where it was measured.
        median_ms: One sample with one adapter.
        default_ms: The same as sessions are made without tuning.
    """

    settings: RuntimeSettings
    machine: Machine
    median_ms: float
    default_ms: float


@dataclass(frozen=True)
class Resolved:
    """How sessions are made, and why.

    Attributes:
        settings: How.
        source: Where that comes from; the tuning, where one key of several does.
        problem: Why a tuning that is there does not count; empty when it does, or there is none.
    """

    settings: RuntimeSettings
    source: Source
    problem: str = ""

    def describe(self, running: Mapping[str, str]) -> dict[str, Any]:
        """What runs, as JSON-able values.

        Args:
            running: What runs each graph, as `EncoderSessions.running` says.
        """
        return {
            "provider": running["prefix"],
            "threads": self.settings.threads,
            "graph_optimisation": self.settings.graph_optimisation,
            "source": self.source,
            "problem": self.problem,
            "graphs": dict(running),
        }


def resolved_for(section: AgentSection, generation: Generation | None) -> Resolved:
    """Settles how the sessions of a generation are made on this machine; a problem is logged."""
    if generation is None:
        return resolved(section, {}, this_machine(), available())
    found = resolved(section, generation.manifest.runtime, this_machine(), available())
    if found.problem:
        log.warning("generation %d: %s", generation.number, found.problem)
    return found


def resolved(
    section: AgentSection,
    kept: Mapping[str, Any],
    machine: Machine,
    available: Collection[ProviderName],
) -> Resolved:
    """Settles how sessions are made: a configured key, else the generation's tuning, else defaults.

    Args:
        section: The configuration; keys that are empty or 0 are not set.
        kept: `runtime` of the generation's manifest; empty without a tuning.
        machine: This one.
        available: The providers it has.
    """
    explicit = configured(section)
    tuned, problem = _usable(kept, machine, available)
    if tuned is not None and "providers" in explicit:
        first = chosen(section.providers, available)[0]
        if first != tuned.settings.providers[0]:
            problem = (
                f"agent.providers takes {first}, the tuning is of {tuned.settings.providers[0]}"
            )
            tuned = None
    settings = replace(RuntimeSettings() if tuned is None else tuned.settings, **explicit)
    if tuned is not None and len(explicit) < len(RuntimeSettings.__dataclass_fields__):
        return Resolved(settings, "tuning")
    return Resolved(settings, "configuration" if explicit else "defaults", problem)


def configured(section: AgentSection) -> dict[str, Any]:
    """The settings that the configuration names itself, by attribute of `RuntimeSettings`."""
    given = {
        "providers": section.providers,
        "threads": section.threads,
        "graph_optimisation": section.graph_optimisation,
    }
    return {name: value for name, value in given.items() if value}


def this_machine() -> Machine:
    """What a measurement made now would be true of."""
    return Machine(
        cpu=_processor(),
        cores=cores(),
        architecture=platform.machine(),
        onnxruntime=onnxruntime.__version__,
    )


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _usable(
    kept: Mapping[str, Any], machine: Machine, available: Collection[ProviderName]
) -> tuple[Tuned | None, str]:
    if not kept:
        return None, ""
    try:
        tuned = msgspec.convert(kept, Tuned)
    except msgspec.ValidationError as error:
        return None, f"the tuning kept with the generation cannot be read: {error}"
    for name in machine.__struct_fields__:
        then, now = getattr(tuned.machine, name), getattr(machine, name)
        if then != now:
            return None, f"tuned with {name} {then}, this is {now}; run `driftkeel tune` again"
    first = tuned.settings.providers[0]
    if first not in available:
        return None, f"tuned for {first}, which is not here; run `driftkeel tune` again"
    return tuned, ""


def _processor() -> str:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown"
    said: dict[str, str] = {}
    for line in text.splitlines():
        key, found, value = line.partition(":")
        if found:
            said.setdefault(key.strip(), value.strip())
    return next(
        (said[name] for name in _NAMES if said.get(name)), platform.processor() or "unknown"
    )
