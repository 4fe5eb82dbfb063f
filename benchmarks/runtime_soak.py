"""A million requests to one daemon process, and its memory on the way. Part of `runtime`.

The encoder is a toy, so that what is repeated is everything around it: HTTP, batching, routing,
adapters, shift detection, the journal. Requests come from several connections at once; every answer
is checked to be one.

    python -m benchmarks.runtime --parts soak [--requests 1000000]
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.runtime_daemon import Connection, Daemon, encoded, started, write_state
from exporter.build import build_vit
from exporter.package import EncoderPackage
from exporter.vit import VisionTransformer

CONNECTIONS: Final = 8
_BUNDLES: Final = 20
_READINGS: Final = 50
# Journal and caches fill up first: what comes after these is compared.
_WARM: Final = 0.2


def toy(folder: Path) -> EncoderPackage:
    """A transformer of three narrow blocks with random weights."""
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=16, patch=8, dim=32, depth=3, heads=2, hidden=48).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return build_vit(
        vit.state_dict(),
        image_size=16,
        suffix_blocks=1,
        heads=2,
        name="toy",
        out=folder,
        base_features="prefix",
    )


def soaked(requests: int) -> dict[str, Any]:
    """Send them, and read the process's resident memory fifty times on the way.

    Returns:
        `requests`, `seconds`, `resident_mb` (by requests answered) and `growth_mb`, the difference
        between the medians of the last and the first fifth of the readings after a warm-up.
    """
    images = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as name:
        package = toy(Path(name) / "encoder")
        config = write_state(package, images, _BUNDLES, Path(name) / "device")
        with started(config) as daemon:
            begun = time.perf_counter()
            readings = _read(daemon, [encoded(image) for image in images], requests)
            taken = time.perf_counter() - begun
    late = [megabytes for sent, megabytes in readings if sent >= _WARM * requests]
    fifth = max(len(late) // 5, 1)
    return {
        "requests": requests,
        "connections": CONNECTIONS,
        "bundles": _BUNDLES,
        "seconds": taken,
        "resident_mb": [{"requests": sent, "mb": megabytes} for sent, megabytes in readings],
        "growth_mb": float(np.median(late[-fifth:]) - np.median(late[:fifth])),
    }


def _read(daemon: Daemon, bodies: list[bytes], requests: int) -> list[tuple[int, float]]:
    readings = []
    step = requests // _READINGS
    for reading in range(_READINGS):
        _send(daemon, bodies, step)
        readings.append(((reading + 1) * step, daemon.resident_mb()))
        print(f"{readings[-1][0]:,} requests: {readings[-1][1]:.1f} MB", file=sys.stderr)
    return readings


def _send(daemon: Daemon, bodies: list[bytes], count: int) -> None:
    """Send so many, shared among the connections, and raise what any of them raises."""
    problems: list[BaseException] = []

    def work(first: int) -> None:
        try:
            connection = Connection(daemon.address)
            for number in range(first, count, CONNECTIONS):
                answer = connection.ask(bodies[number % len(bodies)], probe=False)
                assert "label" in json.loads(answer)["samples"][0], answer
            connection.close()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            problems.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
