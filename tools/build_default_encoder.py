"""Builds the encoder package that ships with Driftkeel from the weights pre-training wrote.

Run it after `tools/pretrain_encoder.py`; it replaces `exporter/data/default_encoder/`, and the
weights it read are not needed afterwards:

    python tools/build_default_encoder.py WEIGHTS.safetensors
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from exporter.build import build_vit

PACKAGE = Path(__file__).resolve().parent.parent / "exporter" / "data" / "default_encoder"
SUFFIX_BLOCKS = 3
LIMIT_BYTES = 8 << 20


def main() -> None:
    """Builds, checks the size and replaces the old package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="a safetensors file of pretrain_encoder.py")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="the package's directory")
    options = parser.parse_args()
    with safe_open(options.weights, framework="numpy") as archive:
        about = archive.metadata()
    draft = options.out.with_name(options.out.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    package = build_vit(
        load_file(options.weights),
        image_size=int(about["image_size"]),
        suffix_blocks=SUFFIX_BLOCKS,
        heads=int(about["heads"]),
        mean=[float(about["mean"])] * 3,
        std=[float(about["std"])] * 3,
        name=about["name"],
        dtype="float16",
        out=draft,
        progress=print,
    )
    size = sum(path.stat().st_size for path in draft.iterdir())
    if size > LIMIT_BYTES:
        raise SystemExit(f"the package has {size} bytes, the limit is {LIMIT_BYTES}")
    shutil.rmtree(options.out, ignore_errors=True)
    draft.replace(options.out)
    print(f"{options.out}: {size} bytes, digest {package.digest}")


if __name__ == "__main__":
    main()
