"""The command line that benchmarks on real data share, and how they write their reports."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Final

import msgspec

SET: Final = Path("data") / "cifar100-small.npz"
_RESULTS: Final = Path(__file__).parent / "results"


def arguments(description: str, name: str, *, encoder: str) -> argparse.ArgumentParser:
    """A parser of ``--data``, ``--encoder`` and ``--out``.

    Args:
        description: What the benchmark is about.
        name: The report's file is called so.
        encoder: Which encoder it is when none is named.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("DRIFTKEEL_DATA"),
        help="the directory with data/ and encoders/ (default: $DRIFTKEEL_DATA)",
    )
    parser.add_argument("--encoder", type=Path, help=f"an encoder package; {encoder} if absent")
    parser.add_argument("--out", type=Path, default=_RESULTS / f"{name}.json")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, and end with an error where the sets are not."""
    options = parser.parse_args(argv)
    if options.data is None or not (options.data / SET).exists():
        parser.error(f"{SET} is needed: give --data DIR (see benchmarks/README.md)")
    return options


def write(report: dict[str, Any], out: Path) -> None:
    """Write a report and say where it is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    print(f"written to {out}")
