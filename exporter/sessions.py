"""ONNX Runtime sessions over an encoder package: the prefix once, the suffix with any adapter.

The daemon and the exporter run encoders through here. Weights are handed to ONNX Runtime by name,
so a device needs neither torch nor ONNX; feeds are checked first, because the runtime silently
accepts tensors of another rank or leaves one at its default.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.errors import EncoderError
from exporter.package import PREFIX_GRAPH, EncoderPackage
from ood.statistics import l2_normalise

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
        self._rows = rows_at_once(package)
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
        check_rows(images, self._image_shape, "images")
        shape = self.package.hidden_shape
        return _run(self._prefix, "images", images, {}, shape, at_once=self._rows)

    def base_features(self, hidden: Array) -> Array:
        """The base space's features: what the frozen encoder says of samples without an adapter.

        Args:
            hidden: float32 [n, *package.hidden_shape], from `prefix`.

        Returns:
            l2-normalised features, float32 [n, package.feature_dim].

        Raises:
            EncoderError: The input has another shape or type.
        """
        if not self.package.base_from_prefix:
            return l2_normalise(self.suffix(hidden))
        check_rows(hidden, self.package.hidden_shape, "hidden")
        widths = self.package.manifest.feature_parts
        rows = hidden.reshape(len(hidden), -1)[:, -sum(widths) :].astype(np.float64)
        starts = [0, *accumulate(widths[:-1])]
        norms = np.sqrt(np.add.reduceat(rows * rows, starts, axis=1))
        norms[norms == 0] = 1.0
        return l2_normalise(rows / np.repeat(norms, widths, axis=1))

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
            Features, float32 [n, package.suffix_dim], not normalised; the network's own come first.

        Raises:
            EncoderError: The family, a tensor's name, shape or type is not this encoder's.
        """
        family = family or self.package.families[0]
        check_rows(hidden, self.package.hidden_shape, "hidden")
        feeds = {}
        if tensors:
            check_tensors(self.package, family, tensors)
            feeds = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        session, shape = self.suffix_session(family), (self.package.suffix_dim,)
        return _run(session, "hidden", hidden, feeds, shape, at_once=self._rows)

    def suffix_session(self, family: str) -> onnxruntime.InferenceSession:
        """The one session of a family's suffix, made when it is first asked for.

        Raises:
            EncoderError: The encoder was not built for this family.
        """
        with self._lock:
            if family not in self._suffixes:
                graph = self.package.family(family).graph
                self._suffixes[family] = _session(self.package, graph, self.threads)
            return self._suffixes[family]


class FedAdapter:
    """One adapter in memory, checked once; safe to use from several threads at once.

    What `EncoderSessions.suffix` computes, without looking at every tensor in every call.

    Args:
        sessions: The encoder; its suffix session is shared with every other adapter.
        family: The adapter's family.
        tensors: The adapter's tensors; they must not be written to any more.

    Raises:
        EncoderError: The family, a tensor's name, shape or type is not this encoder's.
    """

    def __init__(
        self, sessions: EncoderSessions, family: str, tensors: Mapping[str, Array]
    ) -> None:
        check_tensors(sessions.package, family, tensors)
        self._package = sessions.package
        self._session = sessions.suffix_session(family)
        self._feeds = {name: np.ascontiguousarray(value) for name, value in tensors.items()}

    def run(self, hidden: Array) -> Array:
        """Features float32 [n, d] of hidden values float32 [n, ...], with the adapter.

        Raises:
            EncoderError: `hidden` has another shape or type.
        """
        package = self._package
        check_rows(hidden, package.hidden_shape, "hidden")
        shape, rows = (package.suffix_dim,), rows_at_once(package)
        return _run(self._session, "hidden", hidden, self._feeds, shape, at_once=rows)


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Options for a device that has other work to do: few threads, none of them spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The arena keeps what the largest batch took, more than a small encoder's weights, and runs are
    # no faster with it.
    options.enable_cpu_mem_arena = False
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


def open_session(
    graph: bytes, weights: Mapping[str, npt.NDArray[np.generic]], *, threads: int, source: str
) -> onnxruntime.InferenceSession:
    """Makes a session of a graph without weights and the weights it names.

    Args:
        graph: The graph.
        weights: The weights by initialiser name; the session keeps a copy.
        threads: Threads for one run.
        source: What to call the graph in an error.

    Raises:
        EncoderError: ONNX Runtime cannot load it.
    """
    options = session_options(threads)
    options.add_external_initializers(
        list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in weights.values()]
    )
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no public base
        raise EncoderError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {source}: {error}"
        ) from error


def check_rows(rows: Array, shape: tuple[int, ...], what: str) -> None:
    """Checks a batch, because the runtime's own words name no shape.

    Raises:
        EncoderError: It is not float32 [n, *shape].
    """
    if rows.dtype != np.float32 or rows.shape[1:] != shape or rows.ndim != len(shape) + 1:
        wanted = ", ".join(str(axis) for axis in shape)
        raise EncoderError(
            f"{what} are {rows.dtype} {list(rows.shape)}, expected float32 [n, {wanted}]"
        )


def rows_at_once(package: EncoderPackage) -> int:
    """How many rows a graph of this encoder is run on at once, at most."""
    return min(package.manifest.rows_per_run or BATCH_ROWS, BATCH_ROWS)


def in_batches(
    run: Callable[[slice], Array], count: int, shape: tuple[int, ...], *, at_once: int
) -> Array:
    """Runs rows in batches of `at_once` and puts the results [n, *shape] together."""
    outputs = [run(slice(at, at + at_once)) for at in range(0, count, at_once)]
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate(outputs) if outputs else np.empty((0, *shape), np.float32)


def _session(package: EncoderPackage, graph: str, threads: int) -> onnxruntime.InferenceSession:
    return open_session(
        package.read(graph),
        package.graph_weights(graph),
        threads=threads,
        source=str(package.path / graph),
    )


def _run(
    session: onnxruntime.InferenceSession,
    name: str,
    rows: Array,
    feeds: Mapping[str, Array],
    shape: tuple[int, ...],
    *,
    at_once: int,
) -> Array:
    return in_batches(
        lambda part: session.run(None, {name: np.ascontiguousarray(rows[part]), **feeds})[0],
        len(rows),
        shape,
        at_once=at_once,
    )
