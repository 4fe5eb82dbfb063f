"""What a generation decides, as ONNX nodes: first guess, the adapter it names, second guess.

A static graph cannot go on until the answer is stable, so it holds the router's first round: what
`edge_agent` decides with one adapter a sample at most, in float32. Adapters come as banks, and run
on the rows that name them. `exporter.standalone` calls it. Needs the ONNX package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from exporter.bank import AdapterBank
from exporter.derived import bank_graph, read_derived
from exporter.errors import EncoderError
from exporter.graph_writer import TINY, GraphWriter
from exporter.package import EncoderPackage
from ood.logits import Discriminant
from ood.mixture import Mixture

LABEL: Final = "label"
LABEL_NAME: Final = "label_name"
PROBABILITIES: Final = "probabilities"
ADAPTER: Final = "adapter"

# Base and own evidence see the same pixels and count half each, as in the daemon's decisions.
_SHARE: Final = 0.5
# Below every logit; infinity less infinity would be none.
_LEAST: Final = -1e30


@dataclass(frozen=True, eq=False)
class Group:
    """One bundle of a generation, as far as decisions need it.

    Attributes:
        family: The adapter's family; None for a bundle without an adapter.
        tensors: The adapter's tensors by name.
        head: Compares the bundle's labels, in their order, in the adapter's own space.
    """

    family: str | None = None
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None
    head: Discriminant | None = None


def add_decision(
    graph: GraphWriter,
    package: EncoderPackage,
    mixture: Mixture,
    groups: Sequence[Group],
    *,
    hidden: str,
    rows: str,
) -> list[str]:
    """Writes the decision into a graph, to `label`, `label_name`, `probabilities`, `adapter`.

    Args:
        graph: Where to.
        package: The encoder.
        mixture: The head in the base space.
        groups: The bundles in their canonical order, as the mixture numbers them.
        hidden: The value with what the prefix gives.
        rows: The value with base features of unit length, float32 [n, d].

    Returns:
        The evidence it rests on: the values with the components' log-likelihoods in the base space,
        float32 [n, k], and where there are adapters with those of every class in the space of the
        adapter that looked, float32 [n, entries]; both up to a number of each sample's own.

    Raises:
        EncoderError: The groups are not the mixture's, or a family has no bank.
    """
    owner = np.array([group for group, _ in mixture.entries], np.int64)
    _check_groups(groups, owner)
    place = {label: number for number, label in enumerate(mixture.labels)}
    of_label = np.zeros((len(owner), len(place)), np.float32)
    of_label[np.arange(len(owner)), [place[label] for _, label in mixture.entries]] = 1.0
    entries = _Entries(
        owner=graph.constant(owner, np.int64),
        of_label=graph.constant(of_label),
        label_has=graph.constant(of_label.T > 0, np.bool_),
    )
    component = graph.constant(mixture.component, np.int64)
    logs = graph.add("Add", _logits(graph, rows, mixture), graph.constant(mixture.log_prior))
    first = graph.add(
        "Mul",
        graph.add("Gather", graph.add("Softmax", logs, axis=1), component, axis=1),
        graph.constant(mixture.share),
    )
    adapts = np.array([group.family is not None for group in groups])
    evidence = [logs]
    if not adapts.any():
        sums, label, _ = _decided(graph, entries, first)
        none = graph.constant([-1], np.int64)
        graph.add("Expand", none, graph.add("Shape", label), output=ADAPTER)
    else:
        _, _, group = _decided(graph, entries, first)
        shared = graph.add(
            "Add",
            graph.add("Gather", logs, component, axis=1),
            graph.constant(np.log(mixture.share)),
        )
        own = _own(graph, package, groups, owner, hidden=hidden, group=group)
        evidence.append(own)
        second, looked = _refined(
            graph, entries, adapts, first=first, shared=shared, own=own, group=group
        )
        sums, label, last = _decided(graph, entries, second)
        # A bundle without an adapter decides by the base space, also after another had looked.
        number = graph.constant(np.where(adapts, np.arange(len(groups)), -1), np.int64)
        none = graph.constant(-1, np.int64)
        said = graph.add("Gather", number, last, axis=0)
        graph.add("Where", looked, said, none, output=ADAPTER)
    total = graph.at_least(graph.reduced("ReduceSum", sums, keepdims=1), TINY)
    graph.add("Div", sums, total, output=PROBABILITIES)
    graph.add("Identity", label, output=LABEL)
    names = graph.constant(mixture.labels, np.object_)
    graph.add("Gather", names, label, axis=0, output=LABEL_NAME)
    return evidence


@dataclass(frozen=True)
class _Entries:
    """What belongs to what: an entry is one class of one bundle."""

    owner: str  # int64 [entries]
    of_label: str  # float32 [entries, labels], 1 where an entry is of a label
    label_has: str  # bool [labels, entries]


def _check_groups(groups: Sequence[Group], owner: npt.NDArray[np.int64]) -> None:
    if sorted(set(owner.tolist())) != list(range(len(groups))):
        raise EncoderError(f"{len(groups)} bundles are not those that the head was made of")
    for number, group in enumerate(groups):
        known = int(np.count_nonzero(owner == number))
        if (group.family is None) != (group.head is None):
            raise EncoderError(f"bundle {number} needs an adapter and its head, or neither")
        if group.head is not None and len(group.head.biases) != known:
            raise EncoderError(
                f"the head of bundle {number} has {len(group.head.biases)} labels, it knows {known}"
            )


def _logits(graph: GraphWriter, rows: str, mixture: Mixture) -> str:
    """What tells the components apart, float32 [n, k]."""
    classifier = mixture.discriminant
    centred = graph.add("Sub", rows, graph.constant(classifier.centre))
    product = graph.add("MatMul", centred, graph.constant(classifier.weights.T))
    return graph.add("Add", product, graph.constant(classifier.biases))


def _decided(graph: GraphWriter, entries: _Entries, posterior: str) -> tuple[str, str, str]:
    """The mass of each label, the likeliest label, and the group that contributes most to it."""
    sums = graph.add("MatMul", posterior, entries.of_label)
    label = graph.add("ArgMax", sums, axis=1, keepdims=0)
    mine = graph.add("Gather", entries.label_has, label, axis=0)
    masses = graph.add("Where", mine, posterior, graph.constant(-1.0))
    best = graph.add("ArgMax", masses, axis=1, keepdims=0)
    return sums, label, graph.add("Gather", entries.owner, best, axis=0)


def _refined(
    graph: GraphWriter,
    entries: _Entries,
    adapts: npt.NDArray[np.bool_],
    *,
    first: str,
    shared: str,
    own: str,
    group: str,
) -> tuple[str, str]:
    """The posterior once the named adapters have looked, and for which rows one did, bool [n]."""
    column = graph.constant([1], np.int64)
    looked = graph.add("Gather", graph.constant(adapts, np.bool_), group, axis=0)
    named = graph.add("Equal", graph.add("Unsqueeze", group, column), entries.owner)
    asked = graph.add("And", named, graph.add("Unsqueeze", looked, column))
    half = graph.constant(_SHARE)
    evidence = graph.add(
        "Add",
        graph.add("Mul", own, half),
        graph.add("Mul", shared, graph.constant(1.0 - _SHARE)),
    )
    within = graph.add("Where", asked, evidence, graph.constant(_LEAST))
    mass = graph.add("Where", asked, first, graph.constant(0.0))
    whole = graph.reduced("ReduceSum", mass, keepdims=1)
    again = graph.add("Mul", whole, graph.add("Softmax", within, axis=1))
    return graph.add("Where", asked, again, first), looked


def _own(
    graph: GraphWriter,
    package: EncoderPackage,
    groups: Sequence[Group],
    owner: npt.NDArray[np.int64],
    *,
    hidden: str,
    group: str,
) -> str:
    """Log-likelihoods in the named adapter's space, float32 [n, entries]; 0 where none looked."""
    families = sorted({one.family for one in groups if one.family is not None})
    count = graph.add("Shape", hidden, start=0, end=1)
    size = graph.add("Concat", count, graph.constant([len(owner)], np.int64), axis=0)
    zeros = graph.add("ConstantOfShape", size)
    parts = [
        _of_family(graph, package, family, groups, owner, hidden=hidden, group=group, zeros=zeros)
        for family in families
    ]
    total = parts[0]
    for part in parts[1:]:
        total = graph.add("Add", total, part)
    return total


def _of_family(
    graph: GraphWriter,
    package: EncoderPackage,
    family: str,
    groups: Sequence[Group],
    owner: npt.NDArray[np.int64],
    *,
    hidden: str,
    group: str,
    zeros: str,
) -> str:
    """The same of one family's adapters, which run on the rows that name one of them."""
    members = [number for number, one in enumerate(groups) if one.family == family]
    places = np.full(len(groups), -1, np.int64)
    places[members] = np.arange(len(members))
    index = graph.add("Gather", graph.constant(places, np.int64), group, axis=0)
    mine = graph.add("GreaterOrEqual", index, graph.constant(0, np.int64))
    flags = graph.add("Cast", mine, to=TensorProto.INT64)
    # An empty batch is nothing every runtime takes, so that no row at all is a case of its own.
    any_row = graph.add("Cast", graph.add("ReduceMax", flags, keepdims=0), to=TensorProto.BOOL)
    some = graph.branch()
    rows = some.add("Squeeze", some.add("NonZero", mine), some.constant([0], np.int64))
    picked = some.add("Gather", hidden, rows, axis=0)
    which = some.add("Gather", index, rows, axis=0)
    ours = [groups[number] for number in members]
    logits = _banked(some, package, family, ours, hidden=picked, which=which)
    columns = np.full(len(owner), -1, np.int64)
    known = np.concatenate([np.flatnonzero(owner == number) for number in members])
    columns[known] = np.arange(len(known))
    if len(known) < len(owner) or (columns != np.arange(len(owner))).any():
        # Behind the family's columns one of zeros, for everybody else's.
        columns[columns < 0] = len(known)
        padded = some.add("Pad", logits, some.constant([0, 0, 0, 1], np.int64))
        logits = some.add("Gather", padded, some.constant(columns, np.int64), axis=1)
    where = some.add("Unsqueeze", rows, some.constant([1], np.int64))
    found = some.add("ScatterND", zeros, where, logits)
    none = graph.branch()
    nothing = none.add("Identity", zeros)
    return graph.add(
        "If",
        any_row,
        then_branch=some.chosen(f"{family}-runs", [_table(found, len(owner))]),
        else_branch=none.chosen(f"{family}-rests", [_table(nothing, len(owner))]),
    )


def _banked(
    graph: GraphWriter,
    package: EncoderPackage,
    family: str,
    members: Sequence[Group],
    *,
    hidden: str,
    which: str,
) -> str:
    """Log-likelihoods of every label of a family's bundles, each row's by its own adapter."""
    derived = read_derived(package, bank_graph(family))
    bank = AdapterBank(package, family, [one.tensors or {} for one in members])
    given = {"hidden": hidden, "index": which} | {
        # Every row here has an adapter: the neutral one at the end is not needed.
        name: graph.constant(value[:-1])
        for name, value in bank.tensors.items()
    }
    (features,) = graph.put_in(onnx.load_model_from_string(derived.data), f"bank-{family}", given)
    heads = [one.head for one in members if one.head is not None]
    widths = [len(head.centre) for head in heads]
    seen = graph.columns(features, 0, max(widths))
    if min(widths) < max(widths):
        used = np.arange(max(widths)) < np.array(widths)[:, None]
        seen = graph.add("Mul", seen, graph.add("Gather", graph.constant(used), which, axis=0))
    centres = np.zeros((len(heads), max(widths)))
    weights = np.zeros((sum(len(head.biases) for head in heads), max(widths)))
    first = 0
    for number, head in enumerate(heads):
        centres[number, : widths[number]] = head.centre
        weights[first : first + len(head.biases), : widths[number]] = head.weights
        first += len(head.biases)
    centre = graph.add("Gather", graph.constant(centres), which, axis=0)
    centred = graph.add("Sub", graph.unit_rows(seen), centre)
    product = graph.add("MatMul", centred, graph.constant(weights.T))
    return graph.add("Add", product, graph.constant(np.concatenate([h.biases for h in heads])))


def _table(name: str, entries: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", entries])
