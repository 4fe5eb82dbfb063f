"""Adapters as ONNX Runtime's own adapter files: mapped from disk, switched by choosing one.

The runtime takes an adapter file beside a run and is silent when that goes wrong: it keeps no
reference to a loaded adapter and computes the base model once it is collected, loads files with
flipped bits, lets the first of two adapters with the same tensors win, lets an adapter override a
tensor that is fed, and ignores adapters with I/O binding. So a file is named by its SHA-256 and
checked before it is loaded, and `AttachedAdapter` holds exactly one adapter, keeps it alive, and
takes hidden values and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.errors import EncoderError
from exporter.package import EncoderPackage
from exporter.providers import running
from exporter.sessions import EncoderSessions, check_rows, check_tensors, in_batches, rows_at_once

Array = npt.NDArray[np.float32]

SUFFIX = ".onnx_adapter"
_VERSION = 1


def write_adapter(
    package: EncoderPackage, family: str, tensors: Mapping[str, Array], folder: Path
) -> Path:
    """Writes an adapter for ONNX Runtime, whole or not at all.

    Args:
        package: The encoder.
        family: The adapter's family.
        tensors: The adapter's tensors.
        folder: Where to put the file; its name is the SHA-256 of its content.

    Returns:
        The file. The same adapter gives the same one.

    Raises:
        EncoderError: The tensors are not this encoder's, or the file cannot be written.
    """
    check_tensors(package, family, tensors)
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(_VERSION)
    form.set_model_version(_model_version(package))
    form.set_parameters(
        {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensors[name]))
            for name in sorted(tensors)
        }
    )
    draft = None
    try:
        handle, draft = tempfile.mkstemp(prefix=".adapter-", dir=folder)
        os.close(handle)
        form.export_adapter(draft)
        with Path(draft).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return Path(draft).replace(folder / f"{digest}{SUFFIX}")
    except (OSError, RuntimeError) as error:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        raise EncoderError(f"cannot write an adapter file into {folder}: {error}") from error


class AttachedAdapter:
    """One adapter from a file, on the encoder's suffix; safe to use from several threads at once.

    Args:
        sessions: The encoder; its suffix session is shared with every other adapter.
        family: The adapter's family.
        path: What `write_adapter` gave. The file stays mapped, so it must not be written to;
            replacing or removing it is harmless.

    Raises:
        EncoderError: The file is not readable, not what its name says, or not this encoder's; or
            the suffix runs on a provider that has to be fed.
    """

    def __init__(self, sessions: EncoderSessions, family: str, path: Path) -> None:
        self._package = sessions.package
        self._session = sessions.suffix_session(family)
        if not self._session.get_overridable_initializers():
            raise EncoderError(
                f"on {running(self._session)} an adapter cannot be attached from a file; feed it"
            )
        _check_digest(path)
        try:
            form = onnxruntime.AdapterFormat.read_adapter(str(path))
            self._adapter = onnxruntime.LoraAdapter()
            self._adapter.Load(str(path))
        except Exception as error:  # the runtime's own exceptions share no public base
            raise EncoderError(f"{path} is no adapter file: {error}") from error
        if form.get_model_version() != _model_version(self._package):
            raise EncoderError(
                f"{path} is for another encoder than {self._package.name!r}; "
                "write it from the adapter's bundle again"
            )
        found = {name: value.numpy() for name, value in form.get_parameters().items()}
        check_tensors(self._package, family, found)
        # The runtime keeps no reference: the options and the adapter have to live as long as this.
        self._options = onnxruntime.RunOptions()
        self._options.add_active_adapter(self._adapter)

    def run(self, hidden: Array) -> Array:
        """Features float32 [n, d] of hidden values float32 [n, ...], with the adapter.

        Raises:
            EncoderError: `hidden` has another shape or type.
        """
        check_rows(hidden, self._package.hidden_shape, "hidden")
        return in_batches(
            lambda part: self._session.run(
                None, {"hidden": np.ascontiguousarray(hidden[part])}, self._options
            )[0],
            len(hidden),
            (self._package.suffix_dim,),
            at_once=rows_at_once(self._package),
        )


def _check_digest(path: Path) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EncoderError(f"cannot read {path}: {error.strerror}") from error
    if path.name != f"{digest}{SUFFIX}":
        raise EncoderError(
            f"{path} is damaged: its SHA-256 is {digest[:12]}..., not its name; "
            "write it from the adapter's bundle again"
        )


def _model_version(package: EncoderPackage) -> int:
    """A number for the encoder's digest: the file format has room for 32 bits."""
    return int(package.digest[:7], 16)
