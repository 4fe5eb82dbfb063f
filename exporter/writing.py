"""Writing a package's directory so that it appears whole or not at all.

Whatever makes packages calls this; it knows nothing of what is in them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from exporter.errors import EncoderError


def check_absent(out: Path) -> None:
    """Checks that a directory can be made here: there is none, or an empty one.

    Raises:
        EncoderError: Something is there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EncoderError(f"{out} exists; give a directory that does not, or remove it")


def write_directory(out: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files by name into a directory that appears whole or not at all.

    Raises:
        EncoderError: It cannot be written; nothing is left behind.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, data in contents.items():
            with (draft / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        draft.chmod(0o755)
        draft.replace(out)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise EncoderError(f"cannot write {out}: {error.strerror}") from error
