"""Graphs derived from a package's own: the bare suffix, and each family's bank.

They compute what the package's graphs do, so they are no part of the encoder's identity: they lie
beside its files, listed in `derived.json`, and a package made without them keeps its digest when
they are added. This reads and writes them, with neither ONNX nor torch; `exporter.derive` makes
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from adapter_store.blobs import write_durably
from exporter.errors import EncoderError
from exporter.package import EncoderPackage, FileEntry, file_entries

DERIVED = "derived.json"
BARE_GRAPH = "suffix.onnx"
_LIMIT_BYTES = 1 << 20


def bank_graph(family: str) -> str:
    """The file of a family's bank graph."""
    return f"bank-{family}.onnx"


@dataclass(frozen=True)
class DerivedGraph:
    """One derived graph, whole.

    Attributes:
        data: The graph, weights left out.
        weights: The package's weights it has to be given.
    """

    data: bytes
    weights: tuple[str, ...]


class _Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`derived.json`: whose graphs these are, their weights, digests and sizes."""

    encoder: str
    graphs: dict[str, tuple[str, ...]]
    files: dict[str, FileEntry]


def read_derived(package: EncoderPackage, name: str) -> DerivedGraph:
    """Reads one derived graph and checks it.

    Args:
        package: The encoder.
        name: `BARE_GRAPH`, or what `bank_graph` gives.

    Raises:
        EncoderError: The package lacks it, or it is damaged or another encoder's.
    """
    again = f"run `driftkeel encoder derive {package.path}`"
    listing = _listing(package, again)
    entry = listing.files.get(name) if listing else None
    if listing is None or entry is None:
        raise EncoderError(f"encoder {package.name!r} has no graph {name!r}; {again}")
    path = package.path / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EncoderError(f"cannot read {path}: {error.strerror}; {again}") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise EncoderError(f"{path} is damaged: its SHA-256 is not that of {DERIVED}; {again}")
    return DerivedGraph(data, listing.graphs[name])


def derived_names(package: EncoderPackage) -> tuple[str, ...]:
    """The derived graphs that a package has, sorted.

    Raises:
        EncoderError: The list of them is not readable or is another encoder's.
    """
    listing = _listing(package, f"run `driftkeel encoder derive {package.path}`")
    return tuple(sorted(listing.files)) if listing else ()


def write_derived(package: EncoderPackage, graphs: Mapping[str, DerivedGraph]) -> None:
    """Puts derived graphs beside a package's files, replacing those that were there.

    The list is written last: until then the earlier one stands, and graphs that it does not
    vouch for are not read.

    Raises:
        DiskFullError: A file cannot be written.
    """
    contents = {name: graph.data for name, graph in graphs.items()}
    listing = _Listing(
        encoder=package.digest,
        graphs={name: graph.weights for name, graph in sorted(graphs.items())},
        files=file_entries(contents),
    )
    for name, data in [*contents.items(), (DERIVED, msgspec.json.encode(listing, order="sorted"))]:
        write_durably(package.path / name, data)


def _listing(package: EncoderPackage, again: str) -> _Listing | None:
    path = package.path / DERIVED
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise EncoderError(f"{path} is larger than {_LIMIT_BYTES} bytes; {again}")
        listing = msgspec.json.decode(path.read_bytes(), type=_Listing)
    except (OSError, msgspec.DecodeError) as error:
        raise EncoderError(f"{path} is not readable: {error}; {again}") from error
    if listing.encoder != package.digest:
        raise EncoderError(
            f"{path} is of encoder {listing.encoder[:12]}, this is {package.digest[:12]}; {again}"
        )
    for name in listing.files:
        if name != Path(name).name or name not in listing.graphs or name in package.manifest.files:
            raise EncoderError(f"{path} names the graph {name!r}, which it cannot hold; {again}")
    return listing
