"""Folding an adapter into the encoder's weights: the bare suffix with other numbers.

Families that are linear in the weights (`lora`, `sparse`, `ssf`, `bitfit`, `ia3`, and `hydra` where
a site is one linear map) cost nothing at run time this way; the others keep their nodes and are
refused.
NumPy and ONNX Runtime alone. For switching often, feed or attach instead: a fold makes a session.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.derived import BARE_GRAPH, read_derived
from exporter.errors import EncoderError, ParityError
from exporter.families import adapter_family, attached_sites
from exporter.families.base import LinearFamily
from exporter.package import EncoderPackage
from exporter.places import place
from exporter.probing import tolerance
from exporter.providers import RuntimeSettings
from exporter.sessions import (
    EncoderSessions,
    check_rows,
    check_tensors,
    in_batches,
    open_session,
    rows_at_once,
)

Array = npt.NDArray[np.float32]
Weights = dict[str, npt.NDArray[np.generic]]

TOLERANCE = 1e-4
_PROBE_SEED = 20_240_229


def folded_weights(
    package: EncoderPackage,
    family_name: str,
    tensors: Mapping[str, Array],
    weights: Mapping[str, npt.NDArray[np.generic]],
) -> Weights:
    """The bare suffix's weights with an adapter folded in.

    Args:
        package: The encoder.
        family_name: The adapter's family.
        tensors: The adapter's tensors.
        weights: The bare suffix's weights by stored name; they are left as they are.

    Returns:
        All of the weights, in the order given; those that the adapter does not change are the
        same arrays.

    Raises:
        EncoderError: The family is not linear in the weights, or a site's weights cannot take
            the adapter; the message names the family and the site.
    """
    family = adapter_family(family_name)
    if not isinstance(family, LinearFamily):
        raise EncoderError(
            f"the family {family_name!r} is not linear in the encoder's weights and cannot be "
            "folded into them; feed or attach the adapter"
        )
    check_tensors(package, family_name, tensors)
    folded = dict(weights)
    for name, site in attached_sites(family, package.manifest.sites).items():
        start = f"{name}/"
        params = {
            key.removeprefix(start): value.astype(np.float64)
            for key, value in tensors.items()
            if key.startswith(start)
        }
        try:
            where = place(name, site, folded)
            changed = family.fold(where.read(folded), params, site)
        except EncoderError as error:
            raise EncoderError(
                f"{family_name!r} cannot be folded into the site {name!r} of {package.name!r}: "
                f"{error}; feed or attach the adapter"
            ) from error
        folded |= where.written(folded, changed)
    return folded


class Folder:
    """Folds one adapter after another into an encoder's suffix.

    Keeps the suffix's weights in memory, so that a fold reads no file.

    Args:
        sessions: The encoder; every fold is compared with what it computes.

    Raises:
        EncoderError: The package has no bare suffix.
    """

    def __init__(self, sessions: EncoderSessions) -> None:
        self._sessions = sessions
        self._graph = read_derived(sessions.package, BARE_GRAPH)
        self._weights = sessions.package.named_weights(self._graph.weights)

    def fold(self, family: str, tensors: Mapping[str, Array]) -> FoldedSuffix:
        """Folds an adapter and makes the session that runs it.

        Raises:
            EncoderError: The adapter cannot be folded, or is not this encoder's.
            ParityError: The folded suffix does not compute what the adapter does, which happens
                where a weight's name misleads or a weight is used twice.
        """
        package = self._sessions.package
        weights = folded_weights(package, family, tensors, self._weights)
        settings = self._sessions.settings
        suffix = FoldedSuffix(package, self._graph.data, weights, settings=settings)
        rng = np.random.default_rng(_PROBE_SEED)
        probe = rng.standard_normal((1, *package.hidden_shape), dtype=np.float32)
        expected = self._sessions.suffix(probe, tensors, family)
        size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))) or 1.0
        difference = float(np.abs(suffix.run(probe) - expected).max()) / size
        if not difference <= TOLERANCE:
            raise ParityError(
                f"folding {family!r} into {package.name!r} changes features by {difference:.3g} "
                f"of their size, the tolerance is {TOLERANCE:g}; feed or attach the adapter"
            )
        return suffix


class FoldedSuffix:
    """The bare suffix with an adapter in its weights; safe to use from several threads at once.

    Args:
        package: The encoder.
        graph: Its bare suffix.
        weights: What `folded_weights` gave.
        threads: Threads for one run, where no settings are given.
        settings: How the session is made.
    """

    def __init__(
        self,
        package: EncoderPackage,
        graph: bytes,
        weights: Mapping[str, npt.NDArray[np.generic]],
        threads: int = 1,
        *,
        settings: RuntimeSettings | None = None,
    ) -> None:
        self._package = package
        self._session: onnxruntime.InferenceSession = open_session(
            graph,
            weights,
            source=BARE_GRAPH,
            settings=settings or RuntimeSettings(threads=threads),
            tolerance=tolerance(package),
            at_once=rows_at_once(package),
        )

    def run(self, hidden: Array) -> Array:
        """Features float32 [n, d] of hidden values float32 [n, ...].

        Raises:
            EncoderError: `hidden` has another shape or type.
        """
        check_rows(hidden, self._package.hidden_shape, "hidden")

        return in_batches(
            lambda part: self._session.run(None, {"hidden": np.ascontiguousarray(hidden[part])})[0],
            len(hidden),
            (self._package.suffix_dim,),
            at_once=rows_at_once(self._package),
        )
