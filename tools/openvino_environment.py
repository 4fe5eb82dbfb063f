"""Makes the environment that OpenVINO's tests run in: `make openvino`.

What a device needs, with ONNX Runtime's OpenVINO build in place of the plain one. Does nothing when
`pyproject.toml` is as it was then.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = ".installed"


def main(where: Path) -> None:
    """Makes the environment in a directory, or brings it up to date."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = [
        need
        for need in tomllib.loads(text)["project"]["dependencies"]
        if not need.startswith("onnxruntime")
    ]
    wanted, mark = hashlib.sha256(text.encode()).hexdigest(), where / MARK
    if mark.is_file() and mark.read_text(encoding="ascii") == wanted:
        return
    if not mark.is_file():
        print(f"installing OpenVINO into {where}, about 550 MB")
        venv.create(where, with_pip=True, clear=True)
    install = [str(where / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    install.append("--disable-pip-version-check")
    subprocess.run([*install, "onnxruntime-openvino>=1.22", *needed], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    mark.write_text(wanted, encoding="ascii")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}")
