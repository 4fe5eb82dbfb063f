"""What the runtime costs next to the bare encoder in ONNX Runtime, and what other ways cost.

Five parts, each run by itself or all in one: the daemon's path with 1 to 1,000 adapters
(`runtime_path`), other ways of keeping many adapters (`runtime_rivals`), one adapter in every form
(`exports`), the daemon as a process (`runtime_daemon`), and a million requests to it
(`runtime_soak`). A part that is run replaces its part of the report; the page is written from it.

    python -m benchmarks.runtime --data DIR [--parts path,rivals,forms,daemon,soak] [--rounds 100]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import (
    command,
    exports,
    runtime_daemon,
    runtime_page,
    runtime_path,
    runtime_rivals,
    runtime_soak,
    worlds,
)
from benchmarks.tasks import circumstances
from edge_agent.bench.suite import suite_encoder
from exporter.package import EncoderPackage, default_encoder_package

Make = Callable[[Path, Path], EncoderPackage]


def _default(data: Path, cache: Path) -> EncoderPackage:
    del data, cache
    return default_encoder_package()


# "prefix" says that base features are the prefix's alone, as a transformer is built unless told
# otherwise; the first is the same network built otherwise.
ENCODERS: Final[dict[str, Make]] = {
    "ViT-Tiny, 96 px": suite_encoder,
    "ViT-Tiny, 96 px, prefix": partial(suite_encoder, base_features="prefix"),
    "ViT-Tiny, 224 px, prefix": partial(suite_encoder, image_size=224, base_features="prefix"),
    "MobileNetV2, 128 px": partial(worlds.encoder, "mobilenet"),
    "default, 64 px": _default,
}
_RIVALS_ON: Final = "ViT-Tiny, 96 px, prefix"
_THREADS: Final = (1, 2)
_FORMS_PX: Final = 96
_PARTS: Final = "path,rivals,forms,daemon,soak"


def main(argv: list[str] | None = None) -> int:
    """Run it and write the report."""
    parser = command.arguments(__doc__ or "", "runtime", encoder="several")
    parser.add_argument("--parts", default=_PARTS)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--encoders", nargs="*", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    options = command.parsed(parser, argv)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    package = ENCODERS[_RIVALS_ON](options.data, options.cache)
    report["circumstances"] = circumstances(package)
    for part in options.parts.split(","):
        if part == "path":
            measured = _path(options.data, options.cache, options.rounds, options.encoders)
            report[part] = {**report.get(part, {}), **measured}
        elif part == "rivals":
            report[part] = runtime_rivals.rivals(package, options.data, rounds=options.rounds)
        elif part == "daemon":
            report[part] = runtime_daemon.measured(package, options.data)
        elif part == "forms":
            report[part] = exports.measure(_FORMS_PX)
        elif part == "soak":
            report[part] = runtime_soak.soaked(options.requests)
        else:
            parser.error(f"there is no part {part!r}; choose among {_PARTS}")
        command.write(report, options.out)
    if options.out == parser.get_default("out"):
        runtime_page.write(report)
    return 0


def _path(data: Path, cache: Path, rounds: int, encoders: Sequence[str]) -> dict[str, Any]:
    return {
        f"{name}, {threads} thread{'s' * (threads > 1)}": runtime_path.measured(
            make(data, cache), data, threads=threads, rounds=rounds
        )
        for name, make in ENCODERS.items()
        if name in encoders
        for threads in _THREADS
    }


if __name__ == "__main__":
    raise SystemExit(main())
