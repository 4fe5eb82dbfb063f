"""`make bench`: every benchmark, those that need data only where it is."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from benchmarks import alarm, alignment, brokers, default_encoder, label_noise

# Beside the published file, which also holds a broker that is not installed with the project.
OWN_RUN = Path("benchmarks/results/brokers-here.json")


def main() -> int:
    """Run the benchmarks one after another and say what was left out.

    Returns:
        0 when every claim held.
    """
    status = brokers.main(["--out", str(OWN_RUN)])
    status |= alignment.main([]) | label_noise.main([])
    data = os.environ.get("DRIFTKEEL_DATA")
    if data and (Path(data) / "data" / "cifar100-small.npz").exists():
        status |= default_encoder.main([])
        if find_spec("river") and find_spec("frouros"):
            status |= alarm.main([])
        else:
            print("left out: alarm (needs river and frouros, see its head)")
    else:
        print("left out: default_encoder, alarm (set DRIFTKEEL_DATA, see benchmarks/README.md)")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
