"""The picture of an `Explanation`: the score histogram beside the evidence over time.

The one place that draws it, for the device's and the operator's command. matplotlib is imported
only here and only when called; a device need not have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from adapter_store.explanation import Explanation

FORMATS: Final = (".png", ".svg")
# Evidence starts at 0, which a logarithmic axis does not have.
_LEAST_SHOWN: Final = 1e-3


def draw(found: Explanation, path: Path) -> None:
    """Draw an explanation into a file whose suffix is one of `FORMATS`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - a device need not have it

    figure = Figure(figsize=(10, 4), layout="constrained")
    scores, time = figure.subplots(1, 2)
    scores.stairs(found.known, found.bins, label="known (calibration)", fill=True, alpha=0.4)
    scores.stairs(found.shifted, found.bins, label="since the onset", linewidth=2)
    scores.set(xlabel="score", ylabel="share of samples", title=f"episode {found.episode}")
    scores.legend()
    time.semilogy(found.seqs, [max(level, _LEAST_SHOWN) for level in found.evidence])
    time.axhline(max(found.alarm_at, _LEAST_SHOWN), color="black", linestyle="--", label="alarm")
    time.axvline(found.onset_seq, color="gray", linestyle=":", label="onset")
    time.set(xlabel="sample", ylabel="evidence", title="evidence over time")
    time.legend()
    figure.savefig(path)
