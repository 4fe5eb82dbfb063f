"""Tuning one device: its generation and samples, every candidate's sessions, and what is kept.

`driftkeel tune` calls it with an agent that serves nothing else meanwhile; `edge_agent.tuning`
decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.bundle import FROZEN
from adapter_store.generation import Generation
from edge_agent import installer
from edge_agent.agent import Agent
from edge_agent.errors import NoGenerationError
from edge_agent.runtime_settings import Machine, Tuned, configured, cores, this_machine
from edge_agent.serving import Serving
from edge_agent.snapshot import unpack_snapshots
from edge_agent.tuning import (
    ALONE,
    Decided,
    Measured,
    Runs,
    candidates,
    choose,
    measure,
    refusal,
)
from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from exporter.preprocess import prepare
from exporter.probing import tolerance
from exporter.providers import RuntimeSettings, available
from exporter.providers import chosen as chosen_providers
from exporter.sessions import EncoderSessions

TOGETHER: Final = 8

_SAMPLES: Final = 64
# These are answered once more, each alone: an answer must not depend on its batch.
_ALONE: Final = 4
_SEED: Final = 20_240_229

Images = NDArray[np.uint8]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        measured: Every candidate, the simplest first.
        chosen: The one to take.
        default: How sessions are made without tuning; None where the configuration rules it out.
        running: How they are made now.
        machine: Where it was measured.
        samples: How many samples every candidate answered like the defaults.
        own_samples: Whether those are the device's own, not noise.
    """

    measured: tuple[Measured, ...]
    chosen: Measured
    default: Measured | None
    running: RuntimeSettings
    machine: Machine
    samples: int
    own_samples: bool

    @property
    def changes(self) -> bool:
        """Whether sessions are to be made otherwise than now."""
        return self.chosen.settings != self.running


def tune(
    device: Agent,
    *,
    seconds: float,
    clock: Callable[[], float],
    say: Say = lambda _: None,
    tell: Callable[[int, int], None] = lambda _, __: None,
) -> Tuning:
    """Measures every way to make this device's sessions; nothing is changed.

    Args:
        device: The agent.
        seconds: About how long to measure.
        clock: Seconds from any moment.
        say: Told in words what is being done.
        tell: Told how many turns of measuring are done, and of how many.

    Raises:
        NoGenerationError: Nothing is installed whose answers could be compared.
        EncoderError: No way to make sessions gives the answers of the defaults.
    """
    serving = device.serving
    if serving is None:
        raise NoGenerationError(
            "no generation is installed, whose answers must not change; install one first with "
            "`driftkeel agent fit --config FILE --data FILE.npz`"
        )
    images, own = _samples(device)
    say(f"comparing answers to {len(images)} {'samples' if own else 'images of noise'}")
    answered = partial(_decided, serving, device.package, images)
    expected, bound = answered(RuntimeSettings()), tolerance(device.package)
    able, refused = [], {}
    for each in candidates(available(), cores(), configured(device.config.agent)):
        reason = _refused(each, answered, expected, bound)
        if reason:
            refused[each] = reason
        else:
            able.append(each)
    if not able:
        raise EncoderError(
            f"nothing answers as the defaults do; {next(iter(refused.values()))}; change what "
            "[agent] names itself"
        )
    say(f"measuring {len(able)} settings")
    prepared = prepare(np.resize(images, (TOGETHER, *images.shape[1:])), device.package)
    family, tensors = _an_adapter(serving, device.package)

    def opened(settings: RuntimeSettings) -> Runs:
        sessions = EncoderSessions(device.package, settings=settings)
        sessions.suffix_session(family)

        def run(rows: int) -> Callable[[], object]:
            batch = prepared[:rows]
            return lambda: sessions.suffix(sessions.prefix(batch), tensors, family)

        return {rows: run(rows) for rows in (ALONE, TOGETHER)}

    found = measure(opened, able, seconds=seconds, clock=clock, tell=tell)
    best = choose(found)
    assert best is not None
    running = device.sessions.settings
    known = {each.settings: each for each in found}
    measured = [*found, *(Measured(each, refused=why) for each, why in refused.items())]
    return Tuning(
        measured=tuple(measured),
        chosen=best,
        default=known.get(RuntimeSettings()),
        running=replace(running, providers=chosen_providers(running.providers, available())[:1]),
        machine=this_machine(),
        samples=len(images),
        own_samples=own,
    )


def keep(device: Agent, tuning: Tuning, *, now: float) -> Generation:
    """Makes a generation that runs as tuned, of the same bundles, and activates it.

    Raises:
        DiskFullError: It could not be written; the running one stays.
        InstallError: It gives unusable outputs; the running one stays.
    """
    before = device.state.generations.current()
    assert before is not None
    default = tuning.chosen if tuning.default is None else tuning.default
    kept = Tuned(
        settings=tuning.chosen.settings,
        machine=tuning.machine,
        median_ms=round(tuning.chosen.median_ms(), 3),
        default_ms=round(default.median_ms(), 3),
    )
    made = installer.with_runtime(
        device.state,
        before,
        msgspec.to_builtins(kept),
        reason=f"tuned: {described(tuning.chosen.settings)}",
        now=now,
    )
    device.activate(made.number)
    return made


def described(settings: RuntimeSettings) -> str:
    """Settings in words."""
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    return f"{settings.providers[0]}, {threads}, optimisation {settings.graph_optimisation}"


def _samples(device: Agent) -> tuple[Images, bool]:
    """What the device saw last; noise where it keeps no images."""
    rows = device.state.journal.recent(_SAMPLES)
    kept = [row.image for row in rows if row.image is not None]
    if kept:
        return unpack_snapshots(kept, device.package.image_size), True
    size = device.package.image_size
    rng = np.random.default_rng(_SEED)
    return rng.integers(0, 256, (_SAMPLES, size, size, 3), dtype=np.uint8), False


def _an_adapter(serving: Serving, package: EncoderPackage) -> tuple[str, Any]:
    """The family and tensors of the first installed adapter; of the bare encoder without one."""
    for digest, summary in serving.summaries.items():
        if summary.family != FROZEN:
            return summary.family, serving.bundles[digest].tensors
    return package.families[0], None


def _refused(
    settings: RuntimeSettings,
    answered: Callable[[RuntimeSettings], Decided],
    expected: Decided,
    bound: float,
) -> str:
    try:
        found = answered(settings)
    except Exception as error:  # noqa: BLE001 - a provider raises what it likes
        return str(error).partition("\n")[0]
    return refusal(found, expected, tolerance=bound)


def _decided(
    serving: Serving, package: EncoderPackage, images: Images, settings: RuntimeSettings
) -> Decided:
    """What a way to make sessions answers, all samples together and some of them alone."""
    sessions = EncoderSessions(package, settings=settings)
    other = serving.on(sessions)
    parts = [other.infer(images), *(other.infer(image[None]) for image in images[:_ALONE])]
    for graph, name in sessions.running().items():
        if name != settings.providers[0]:
            raise EncoderError(f"{settings.providers[0]} does not run {graph}")
    return Decided(
        features=np.concatenate([part.features for part in parts]),
        decisions=tuple((a.label, a.adapter) for part in parts for a in part.answers),
    )
