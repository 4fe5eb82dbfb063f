"""ONNX Runtime sessions over an encoder package: the prefix once, the suffix with any adapter.

The daemon and the exporter run encoders through here. Weights are handed to ONNX Runtime by name,
so a device needs neither torch nor ONNX; feeds are checked first, because the runtime silently
accepts tensors of another rank or leaves one at its default.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.errors import EncoderError
from exporter.package import PREFIX_GRAPH, EncoderPackage
from exporter.probing import TOLERANCE, Feeds, neutral, problem, tolerance
from exporter.providers import (
    CPU,
    PROVIDERS,
    ProviderName,
    RuntimeSettings,
    available,
    chosen,
    level,
    nodes_taken,
    running,
)
from exporter.required_inputs import required_inputs
from ood.statistics import l2_normalise

Array = npt.NDArray[np.float32]

# Rows run at once: bounds the memory that intermediate values take, whatever a caller sends.
BATCH_ROWS = 64

log = logging.getLogger(__name__)


class EncoderSessions:
    """The encoder, ready to run; safe to use from several threads at once.

    Args:
        package: The encoder.
        threads: Threads for one run, where no settings are given.
        settings: How the sessions are made.

    Example:
        >>> from exporter.package import default_encoder_package
        >>> sessions = EncoderSessions(default_encoder_package())
        >>> images = np.zeros((2, 3, 64, 64), np.float32)
        >>> sessions.suffix(sessions.prefix(images)).shape
        (2, 576)
    """

    def __init__(
        self, package: EncoderPackage, threads: int = 1, *, settings: RuntimeSettings | None = None
    ) -> None:
        self.package = package
        self.settings = settings or RuntimeSettings(threads=threads)
        self.threads = self.settings.threads
        size = package.image_size
        self._image_shape = (3, size, size)
        self._rows = rows_at_once(package)
        self._prefix = _session(package, PREFIX_GRAPH, self.settings)
        self._suffixes: dict[str, onnxruntime.InferenceSession] = {}
        self._neutral: dict[str, Feeds] = {}  # what a suffix takes where there is no adapter
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
        flat = hidden.reshape(len(hidden), -1)
        return np.ascontiguousarray(flat[:, -self.package.feature_dim :])

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
        session, shape = self.suffix_session(family), (self.package.suffix_dim,)
        feeds: Mapping[str, Array] = self._neutral[family]
        if tensors:
            check_tensors(self.package, family, tensors)
            feeds = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        return _run(session, "hidden", hidden, feeds, shape, at_once=self._rows)

    def suffix_session(self, family: str) -> onnxruntime.InferenceSession:
        """The one session of a family's suffix, made when it is first asked for.

        Raises:
            EncoderError: The encoder was not built for this family.
        """
        with self._lock:
            if family not in self._suffixes:
                graph = self.package.family(family).graph
                session = _session(self.package, graph, self.settings)
                self._suffixes[family], self._neutral[family] = session, neutral(session)
            return self._suffixes[family]

    def running(self) -> dict[str, str]:
        """What runs each graph that was opened, by short name: `prefix`, `suffix-FAMILY`."""
        with self._lock:
            suffixes = {f"suffix-{family}": one for family, one in self._suffixes.items()}
        return {name: running(one) for name, one in {"prefix": self._prefix, **suffixes}.items()}


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


def session_options(
    threads: int = 1, settings: RuntimeSettings | None = None
) -> onnxruntime.SessionOptions:
    """Options for a device that has other work to do: few threads, none of them spinning.

    Args:
        threads: Threads for one run, where no settings are given.
        settings: How the session is made.
    """
    settings = settings or RuntimeSettings(threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = level(settings.graph_optimisation)
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
    graph: bytes,
    weights: Mapping[str, npt.NDArray[np.generic]],
    *,
    source: str,
    threads: int = 1,
    settings: RuntimeSettings | None = None,
    tolerance: float = TOLERANCE,
    at_once: int = BATCH_ROWS,
) -> onnxruntime.InferenceSession:
    """Makes a session of a graph without weights and the weights it names.

    The first provider of the settings that this machine has, that takes the graph and that computes
    what the CPU does is what runs it; each that does not is named in a warning.

    Args:
        graph: The graph.
        weights: The weights by initialiser name; the session keeps a copy.
        source: What to call the graph in an error.
        threads: Threads for one run, where no settings are given.
        settings: How the session is made.
        tolerance: What a provider's results may differ by from the CPU's, relative to their size.
        at_once: How many rows the session may be run on at once.

    Raises:
        EncoderError: ONNX Runtime cannot load it.
    """
    settings = settings or RuntimeSettings(threads=threads)
    for name in chosen(settings.providers, available())[:-1]:
        try:
            session = _opened(graph, weights, settings, name, source)
            reference = _opened(graph, weights, RuntimeSettings(), CPU, source)
            wrong = problem(session, reference, tolerance=tolerance, at_once=at_once)
        except Exception as error:  # noqa: BLE001 - providers raise what they like
            wrong = str(error).strip().partition("\n")[0]
        if wrong is None:
            return session
        log.warning("%s does not run %s, the next provider is tried: %s", name, source, wrong)
    return _opened(graph, weights, settings, CPU, source)


def _opened(
    graph: bytes,
    weights: Mapping[str, npt.NDArray[np.generic]],
    settings: RuntimeSettings,
    name: ProviderName,
    source: str,
) -> onnxruntime.InferenceSession:
    provider = PROVIDERS[name]
    options = session_options(settings=settings)
    options.add_external_initializers(
        list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in weights.values()]
    )
    wanted = (provider.execution_provider, dict(provider.options(settings.threads)))
    behind = [] if name == CPU else [PROVIDERS[CPU].execution_provider]
    if name != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            required_inputs(graph) if provider.compiles else graph,
            options,
            providers=[wanted, *behind],
            # Or a provider that fails is replaced without a word.
            enable_fallback=0,
        )
    except Exception as error:  # the runtime's own exceptions share no public base
        raise EncoderError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {source}: {error}"
        ) from error
    if running(session) != name:
        raise EncoderError(f"ONNX Runtime took {running(session)} instead")
    if name != CPU and nodes_taken(session, name) == 0:
        raise EncoderError("it takes none of the graph's nodes")
    return session


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


def _session(
    package: EncoderPackage, graph: str, settings: RuntimeSettings
) -> onnxruntime.InferenceSession:
    return open_session(
        package.read(graph),
        package.graph_weights(graph),
        source=str(package.path / graph),
        settings=settings,
        tolerance=tolerance(package),
        at_once=rows_at_once(package),
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
