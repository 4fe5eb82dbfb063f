"""Making a package's derived graphs by rewriting its own: no torch, and no digest changes.

The builder calls it for a new package, `driftkeel encoder derive` for one that was built without.
Needs the ONNX package.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from exporter.bank_graph import banked
from exporter.bare import bare
from exporter.derived import BARE_GRAPH, DerivedGraph, bank_graph, write_derived
from exporter.errors import EncoderError
from exporter.graphs import weight_names
from exporter.package import EncoderPackage

Progress = Callable[[str], None]


def derive(package: EncoderPackage, progress: Progress) -> tuple[str, ...]:
    """Makes and writes the bare suffix and every family's bank.

    A graph that cannot be made is left out and said: the package works without it.

    Args:
        package: The encoder; its directory must be writable.
        progress: Told what could not be made, and why.

    Returns:
        The graphs written.

    Raises:
        EncoderError: The encoder is quantised.
        DiskFullError: A file cannot be written.
    """
    if package.manifest.quantised is not None:
        raise EncoderError(
            f"{package.name!r} is quantised: its adapters can only be fed; fold or bank them with "
            "the encoder it was made from"
        )
    found: dict[str, DerivedGraph] = {}
    for family in package.families:
        entry = package.family(family)
        proto = onnx.load_model_from_string(package.read(entry.graph))
        for name, make in ((BARE_GRAPH, bare), (bank_graph(family), banked)):
            if name in found:
                continue
            try:
                made = make(proto, entry.tensors)
            except EncoderError as error:
                progress(f"no graph {name!r}: {error}")
                continue
            data = made.SerializeToString(deterministic=True)
            found[name] = DerivedGraph(data, weight_names(made))
    write_derived(package, found)
    return tuple(sorted(found))
