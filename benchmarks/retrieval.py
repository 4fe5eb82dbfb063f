"""Does a signature find the adapter for what a device sees, and say when there is none?

Sixty variants (`benchmarks.variants`), an adapter's signature of each; fresh samples of each look
for theirs. Then the same with the own adapter removed: now the answer has to be "none". What was
chosen was chosen on CIFAR-100 and Grocery variants under ViT-Tiny; the others, and the default
encoder, only judge.

    python -m benchmarks.retrieval --data DIR --cache DIR [--external DIR] [--out FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import retrieval_page, retrieval_speed
from benchmarks.command import arguments, parsed, write
from benchmarks.tasks import circumstances
from benchmarks.variants import Halves, draw, halves
from benchmarks.worlds import encoder
from ood.signature import (
    DEFAULT_MIN_SIMILARITY,
    SIZE_BYTES,
    Signature,
    Unpacked,
    signature,
    similarities,
    unpacked,
)

CONDITIONS: Final = {
    "64, balanced": (64, False),
    "64, Zipf": (64, True),
    "200, balanced": (200, False),
    "200, Zipf": (200, True),
}
ENCODERS: Final = ("vit-tiny", "default")
# The groups that settings were chosen on.
CHOSEN_ON: Final = ("cifar", "grocery")
_DRAWS: Final = 5
_SIGNATURES: Final = 100_000
_BINS: Final = 20

Floats64 = NDArray[np.float64]


def measure(found: list[Halves], seed: str) -> dict[str, Any]:
    """Recall and the rate of "none" under one encoder, by condition and by group."""
    table = _packed([signature(item.known, seed=seed) for item in found])
    groups = np.array([item.variant.group for item in found])
    own, other, rank, condition, group = [], [], [], [], []
    for number, item in enumerate(found):
        for place, (name, (samples, unbalanced)) in enumerate(CONDITIONS.items()):
            for repeat in range(_DRAWS):
                rng = np.random.default_rng([number, place, repeat])
                rows = draw(item.fresh_labels, samples, rng, unbalanced=unbalanced)
                alike = similarities(_packed([signature(item.fresh[rows], seed=seed)]), table)
                others = np.delete(alike, number)
                own.append(alike[number])
                other.append(others.max())
                rank.append(int((others >= alike[number]).sum()))
                condition.append(name)
                group.append(groups[number])
    values = (np.array(own), np.array(other), np.array(rank))
    chosen_on = np.isin(group, CHOSEN_ON)
    return {
        "all": _rates(*values, np.ones(len(own), bool)),
        "chosen on": _rates(*values, chosen_on),
        "not chosen on": _rates(*values, ~chosen_on),
        "by condition": {k: _rates(*values, np.array(condition) == k) for k in CONDITIONS},
        "by set": {str(k): _rates(*values, np.array(group) == k) for k in dict.fromkeys(groups)},
        "histogram": {
            "edges": np.linspace(0, 1, _BINS + 1).round(3).tolist(),
            "own": np.histogram(values[0], _BINS, (0, 1))[0].tolist(),
            "best other": np.histogram(values[1], _BINS, (0, 1))[0].tolist(),
        },
    }


def _rates(
    own: Floats64, other: Floats64, rank: NDArray[np.int64], which: NDArray[np.bool_]
) -> dict[str, float]:
    """Shares of queries; recall counts only what the threshold lets through, nearest does not."""
    offered = own[which] >= DEFAULT_MIN_SIMILARITY
    rates = {
        "recall_at_1": (rank[which] == 0) & offered,
        "recall_at_3": (rank[which] < 3) & offered,
        "nearest_is_own": rank[which] == 0,
        "own_in_nearest_3": rank[which] < 3,
        "none_without_own": other[which] < DEFAULT_MIN_SIMILARITY,
    }
    return {
        "queries": int(which.sum()),
        **{k: round(float(np.mean(v)), 4) for k, v in rates.items()},
    }


def _packed(items: list[Signature]) -> Unpacked:
    return unpacked(np.stack([np.frombuffer(item.to_bytes(), dtype=np.uint8) for item in items]))


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report and its page."""
    parser = arguments("Which adapter fits.", "retrieval", encoder="ViT-Tiny and the default")
    parser.add_argument("--cache", type=Path, required=True, help="where features are kept")
    parser.add_argument("--external", type=Path, help="where faiss-cpu and usearch are installed")
    options = parsed(parser, argv)

    def say(line: str) -> None:
        print(line, flush=True)

    report: dict[str, Any] = {"benchmark": "retrieval"}
    known: list[Signature] = []
    for name in ENCODERS:
        package = encoder(name, options.data, options.cache)
        found = halves(package, options.data, options.cache, progress=say)
        if not known:
            report |= circumstances(package)
            known = [signature(item.known, seed=package.digest) for item in found]
            report["signature_bytes"] = SIZE_BYTES
            report["min_similarity"] = DEFAULT_MIN_SIMILARITY
            report["variants"] = [item.variant.name for item in found]
            report["encoders"] = {}
        report["encoders"][name] = measure(found, package.digest)
        say(f"{name}: {report['encoders'][name]['all']}")
    report["speed"] = retrieval_speed.measure(
        known, _SIGNATURES, queries=200, exact=10, external=options.external, say=say
    )
    write(report, options.out)
    retrieval_page.write(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
