"""Making a generation: from bundles to something that may serve, checked before it is written.

The agent calls it to load the current generation at start, to build a new one beside it and to
try a candidate in memory. It never activates anything and never changes what serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter_store.generation import Generation, GenerationManifest
from adapter_store.state import StateDir
from edge_agent.adapters import StoredBundles
from edge_agent.alignment import Alignment
from edge_agent.errors import InstallError
from edge_agent.prepared import Prepared
from edge_agent.serving import ADAPTERS_IN_MEMORY, Serving
from exporter.sessions import EncoderSessions
from ood.errors import OodError

Features = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Settings:
    """What a generation needs from the configuration.

    Attributes:
        false_alarm_every: The false-alarm budget, in samples.
        max_rounds: Most adapters run for one sample.
        block: Samples that one scene of the stream lasts.
        prior_changes: Whether a change of the classes' proportions alone is a shift.
        adapters_in_memory: Most adapters kept in memory; the others are read when needed.
    """

    false_alarm_every: float
    max_rounds: int
    block: int = 1
    prior_changes: bool = False
    adapters_in_memory: int = ADAPTERS_IN_MEMORY


def load_serving(
    read_bundle: Callable[[str], bytes],
    sessions: EncoderSessions,
    bundle_digests: Sequence[str],
    calibration_features: Features,
    *,
    number: int,
    digest: str = "",
    settings: Settings,
    alignment: Alignment | None = None,
    prepared: Prepared | None = None,
) -> Serving:
    """Load bundles and put a serving whole together; nothing is written.

    Args:
        read_bundle: Gives a bundle's bytes by digest.
        sessions: The encoder's sessions.
        bundle_digests: Which bundles, in any order; each counts once.
        calibration_features: Base features [m, d] of held-out, unshifted samples.
        number: The generation's number; 0 for a candidate.
        digest: The generation's digest; empty for a candidate.
        settings: From the configuration.
        alignment: What it does to the features of a shifted domain; None for nothing.
        prepared: The sums over the bundles, where they were kept.

    Raises:
        BundleError: A bundle is damaged or for another encoder; the message says which.
        InstallError: The statistics and the calibration features do not fit together.
    """
    try:
        return Serving(
            sessions,
            StoredBundles(read_bundle, bundle_digests, sessions.package.interface()),
            # On disk they are float16: a candidate must be exactly what will be installed.
            calibration_features.astype(np.float16),
            number=number,
            digest=digest,
            false_alarm_every=settings.false_alarm_every,
            max_rounds=settings.max_rounds,
            block=settings.block,
            prior_changes=settings.prior_changes,
            alignment=alignment,
            adapters_in_memory=settings.adapters_in_memory,
            prepared=prepared,
        )
    except OodError as error:
        raise InstallError(f"the bundles do not make a generation: {error}") from error


def load_generation(
    generation: Generation, sessions: EncoderSessions, *, settings: Settings
) -> Serving:
    """Load and check a generation from disk.

    Every adapter was run before it was written; where the sums over its bundles were kept with it,
    none is read or run again until a sample needs it.

    Routing is part of the generation, so that going back to it gives its answers back; the
    false-alarm budget is the operator's and comes from the configuration.

    Raises:
        GenerationError: It is damaged.
        BundleError: One of its bundles is damaged.
        InstallError: It is for another encoder, or gives unusable outputs.
    """
    manifest = generation.manifest
    if manifest.encoder != sessions.package.digest:
        raise InstallError(
            f"generation {generation.number} is for encoder {manifest.encoder[:12]}, this device "
            f"runs {sessions.package.digest[:12]}; set agent.encoder back, or use a fresh "
            "agent.state_dir"
        )
    try:
        arrays = generation.alignment()
        alignment = Alignment.from_arrays(arrays) if arrays else None
    except OodError as error:
        raise InstallError(f"generation {generation.number}: {error}") from error
    kept = generation.prepared()
    prepared = None if kept is None else Prepared.from_bytes(kept, encoder=manifest.encoder)
    if prepared is not None and sorted(prepared.summaries) != manifest.bundles:
        prepared = None
    serving = load_serving(
        generation.bundle_bytes,
        sessions,
        manifest.bundles,
        generation.calibration_features(),
        number=generation.number,
        digest=generation.digest,
        settings=replace(
            settings,
            max_rounds=int(manifest.router.get("max_rounds", settings.max_rounds)),
        ),
        alignment=alignment,
        prepared=prepared,
    )
    serving.check(adapters=prepared is None)
    return serving


def build_generation(
    state: StateDir,
    sessions: EncoderSessions,
    bundle_digests: Sequence[str],
    calibration_features: Features,
    *,
    parent: int | None,
    reason: str,
    metrics: Mapping[str, float],
    settings: Settings,
    now: float,
    alignment: Alignment | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Generation:
    """Check a candidate and write it as a generation that does not run yet.

    Args:
        state: Where to.
        sessions: The encoder's sessions.
        bundle_digests: Which bundles, in any order; each counts once.
        calibration_features: Base features [m, d] of held-out, unshifted samples.
        parent: The generation this one is made from.
        reason: Why, for the operator.
        metrics: What was measured about it.
        settings: From the configuration.
        now: Seconds since the epoch.
        alignment: What it does to the features of a shifted domain; None for nothing.
        runtime: How its sessions are made, where that was tuned; None where it was not.

    Raises:
        BundleError: A bundle is damaged or for another encoder.
        InstallError: The candidate gives unusable outputs; nothing was written.
        DiskFullError: It could not be written; nothing is left of it.
    """
    stored = StoredBundles(state.blobs.get, bundle_digests, sessions.package.interface())
    try:
        prepared = Prepared.of(stored)
    except OodError as error:
        raise InstallError(f"the bundles do not make a generation: {error}") from error
    candidate = load_serving(
        state.blobs.get,
        sessions,
        bundle_digests,
        calibration_features,
        number=0,
        settings=settings,
        alignment=alignment,
        prepared=prepared,
    )
    candidate.check()
    manifest = GenerationManifest(
        number=0,
        encoder=sessions.package.digest,
        bundles=sorted(candidate.bundles),
        parent=parent,
        reason=reason,
        created_at=now,
        router={"max_rounds": settings.max_rounds},
        alarm={
            "false_alarm_every": settings.false_alarm_every,
            "block": settings.block,
            "prior_changes": settings.prior_changes,
        },
        metrics=dict(metrics),
        runtime=dict(runtime or {}),
    )
    return state.generations.create(
        manifest,
        calibration_features.astype(np.float16),
        None if alignment is None else alignment.to_arrays(),
        prepared.to_bytes(encoder=sessions.package.digest),
    )


def with_runtime(
    state: StateDir, generation: Generation, runtime: Mapping[str, Any], *, reason: str, now: float
) -> Generation:
    """Write a generation that is another one but for how its sessions are made; it does not run.

    Raises:
        GenerationError: The other one is damaged.
        DiskFullError: It could not be written; nothing is left of it.
    """
    manifest = msgspec.structs.replace(
        generation.manifest,
        parent=generation.number,
        reason=reason,
        created_at=now,
        runtime=dict(runtime),
    )
    return state.generations.create(
        manifest,
        generation.calibration_features(),
        generation.alignment(),
        generation.prepared() or b"",
    )
