"""ONNX Runtime sessions over an encoder package: the prefix once, the suffix with any adapter.

The daemon and the exporter run encoders through here. Weights are handed to ONNX Runtime by name,
so a device needs neither torch nor ONNX; feeds are checked first, because the runtime silently
accepts tensors of another rank or leaves one at its default.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.errors import EncoderError
from exporter.package import PREFIX_GRAPH, EncoderPackage

Array = npt.NDArray[np.float32]

# Rows run at once: bounds the memory that intermediate values take, whatever a caller sends.
BATCH_ROWS = 64


class EncoderSessions:
    """The encoder, ready to run; safe to use from several threads at once.

    Args:
        package: The encoder.
        threads: Threads for one run.

    Example:
        >>> from exporter.package import default_encoder_package
        >>> sessions = EncoderSessions(default_encoder_package())
        >>> images = np.zeros((2, 3, 64, 64), np.float32)
        >>> sessions.suffix(sessions.prefix(images)).shape
        (2, 576)
    """

    def __init__(self, package: EncoderPackage, threads: int = 1) -> None:
        self.package = package
        self.threads = threads
        size = package.image_size
        self._image_shape = (3, size, size)
        self._prefix = _session(package, PREFIX_GRAPH, threads)
        self._suffixes: dict[str, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()

    def prefix(self, images: Array) -> Array:
        """Runs the encoder's first blocks.

        Args:
            images: float32 [n, 3, s, s] as `preprocess.prepare` returns them.

        Returns:
            Hidden values, float32 [n, *package.hidden_shape].

        Raises:
            EncoderError: The input has another shape or type.
        """
        _check(images, self._image_shape, "images")
        return _run(self._prefix, "images", images, {}, self.package.hidden_shape)

    def suffix(
        self,
        hidden: Array,
        tensors: Mapping[str, Array] | None = None,
        family: str | None = None,
    ) -> Array:
        """Runs the encoder's last blocks, adapted when tensors are given.

        Args:
            hidden: float32 [n, *package.hidden_shape], from `prefix`.
            tensors: All of an adapter's tensors by name, or None for the base model.
            family: The adapter's family; the package's first when absent.

        Returns:
            Features, float32 [n, package.feature_dim], not normalised.

        Raises:
            EncoderError: The family, a tensor's name, shape or type is not this encoder's.
        """
        family = family or self.package.families[0]
        _check(hidden, self.package.hidden_shape, "hidden")
        feeds = {}
        if tensors:
            check_tensors(self.package, family, tensors)
            feeds = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        return _run(self._suffix(family), "hidden", hidden, feeds, (self.package.feature_dim,))

    def _suffix(self, family: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if family not in self._suffixes:
                graph = self.package.family(family).graph
                self._suffixes[family] = _session(self.package, graph, self.threads)
            return self._suffixes[family]


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Options for a device that has other work to do: few threads, none of them spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def check_tensors(
    package: EncoderPackage, family: str, tensors: Mapping[str, npt.NDArray[np.generic]]
) -> int:
    """Checks that tensors are a whole adapter of this encoder, and returns its rank.

    Raises:
        EncoderError: A tensor is missing, unknown, or of another type or shape than the rest.
    """
    shapes = package.family(family).tensors
    if unknown := sorted(set(tensors) - set(shapes)):
        raise EncoderError(f"adapter tensor {unknown[0]!r} is none of {family!r} on this encoder")
    if missing := sorted(set(shapes) - set(tensors)):
        raise EncoderError(f"adapter tensor {missing[0]!r} is missing")
    rank: int | None = None
    for name, shape in shapes.items():
        value = tensors[name]
        if value.dtype != np.float32:
            raise EncoderError(f"adapter tensor {name!r} is {value.dtype}, expected float32")
        fits = len(shape) == value.ndim
        for wanted, found in zip(shape, value.shape, strict=False):
            if wanted == "rank":
                rank = found if rank is None else rank
                wanted = rank  # noqa: PLW2901 - the symbol's value from here on
            fits = fits and wanted == found
        if not fits:
            at = "" if rank is None else f" at rank {rank}"
            raise EncoderError(
                f"adapter tensor {name!r} has shape {list(value.shape)}, expected {list(shape)}{at}"
            )
    return rank or 0


def _session(package: EncoderPackage, graph: str, threads: int) -> onnxruntime.InferenceSession:
    options = session_options(threads)
    weights = package.graph_weights(graph)
    options.add_external_initializers(
        list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in weights.values()]
    )
    try:
        return onnxruntime.InferenceSession(
            package.read(graph), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's own exceptions share no public base
        raise EncoderError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {package.path / graph}: {error}"
        ) from error


def _run(
    session: onnxruntime.InferenceSession,
    name: str,
    rows: Array,
    feeds: Mapping[str, Array],
    shape: tuple[int, ...],
) -> Array:
    outputs: list[Array] = [
        session.run(None, {name: np.ascontiguousarray(rows[at : at + BATCH_ROWS]), **feeds})[0]
        for at in range(0, len(rows), BATCH_ROWS)
    ]
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate(outputs) if outputs else np.empty((0, *shape), np.float32)


def _check(value: Array, shape: tuple[int, ...], what: str) -> None:
    if value.dtype != np.float32 or value.shape[1:] != shape or value.ndim != len(shape) + 1:
        wanted = ", ".join(str(axis) for axis in shape)
        raise EncoderError(
            f"{what} are {value.dtype} {list(value.shape)}, expected float32 [n, {wanted}]"
        )
