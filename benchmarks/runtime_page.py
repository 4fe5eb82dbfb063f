"""docs/benchmarks/runtime.md's tables and plots, from the report of `runtime`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.pages import PAGE as OOD_PAGE
from benchmarks.pages import table, write_section

PAGE: Final = OOD_PAGE.parent / "runtime.md"
PLOTS: Final = PAGE.parent / "runtime"
_VIT: Final = "ViT-Tiny"
_PREFIX: Final = ", prefix"
_ROUTES: Final = {1: "first route stood", 2: "one refinement"}

Report = Mapping[str, Any]
Bar = tuple[str, str, bool]


def write(report: Report, page: Path = PAGE, plots: Path = PLOTS) -> None:
    """Write every section whose part was measured, and the plots beside the page."""
    write_section("bars", table(("bar", "measured", ""), list(_bars(report))), page)
    for name, section in _SECTIONS.items():
        if name in report:
            write_section(name, section(report[name]), page)
    machine, versions = (report["circumstances"][key] for key in ("machine", "versions"))
    about = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    write_section("machine", f"{machine['cpu']}, {machine['cores']} cores; {about}.", page)
    plots.mkdir(exist_ok=True)
    if "rivals" in report:
        _draw_rivals(report["rivals"]["retrieval"], plots / "adapters.svg")
    if "soak" in report:
        _draw_soak(report["soak"], plots / "soak.svg")


def _bars(report: Report) -> Iterator[Sequence[object]]:
    """A row a bar: what was asked, what was measured, whether it was met."""
    for part, bars in (
        ("path", _path_bars),
        ("rivals", _rival_bars),
        ("forms", _form_bars),
        ("daemon", _daemon_bars),
        ("soak", _soak_bars),
    ):
        if part in report:
            for asked, measured, met in bars(report[part]):
                yield asked, measured, "met" if met else "**missed**"


def _path_bars(path: Report) -> Iterator[Bar]:
    cells = {
        name: {
            (row["bundles"], row["adapter_passes"]): row["ratio"]
            for row in rows
            if row["batch"] == 1
        }
        for name, rows in path.items()
        if name.startswith(_VIT) and _PREFIX in name
    }
    for passes, limit in ((1, 1.10), (2, 1.45)):
        found = {
            name: [ratio for (_, taken), ratio in rows.items() if taken == passes]
            for name, rows in cells.items()
        }
        found = {name: ratios for name, ratios in found.items() if ratios}
        yield (
            f"path, {_ROUTES[passes]}: at most {limit:.2f} × the bare encoder",
            "; ".join(
                f"{name}: {min(ratios):.2f} to {max(ratios):.2f}" for name, ratios in found.items()
            ),
            all(max(ratios) <= limit for ratios in found.values()),
        )
    spans = {
        name: max(ratios) / min(ratios) - 1
        for name, rows in cells.items()
        if (ratios := [ratio for (_, taken), ratio in rows.items() if taken == 1])
    }
    yield (
        "1 to 1,000 installed adapters: within 5 %",
        "; ".join(f"{name}: {100 * span:.1f} %" for name, span in spans.items()),
        all(span <= 0.05 for span in spans.values()),
    )


def _rival_bars(rivals: Report) -> Iterator[Bar]:
    for name, limit in (("first route stood", 1.45), ("one refinement", 1.80)):
        ratios = [
            row["ways"][f"lazily, {name}"]["ratio"]
            for row in rivals["retrieval"]
            if f"lazily, {name}" in row["ways"]
        ]
        yield (
            f"the published procedure, lazily, {name}: at most {limit:.2f} ×",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            max(ratios) <= limit,
        )
    (twenty,) = (row["ways"] for row in rivals["retrieval"] if row["adapters"] == 20)
    ours = twenty["daemon"]["minimum_ms"]
    times = {
        name: twenty[f"every adapter, {name}"]["minimum_ms"] / ours
        for name in ("whole passes", "shared prefix")
    }
    yield (
        "at least 8 times faster than the published procedure in ONNX Runtime, 20 adapters",
        f"{times['whole passes']:.1f} (from a shared prefix: {times['shared prefix']:.1f})",
        times["whole passes"] >= 8,
    )


def _form_bars(forms: Report) -> Iterator[Bar]:
    families = forms["families"]
    mixed = {name: found["mixed"]["whole_ratio"] for name, found in families.items()}
    yield (
        "a batch of 32 with 32 adapters: at most 1.25 × one with one",
        ", ".join(f"{name} {ratio:.2f}" for name, ratio in mixed.items()),
        max(mixed.values()) <= 1.25,
    )
    switch = {name: found["switch_ms"]["check tensors"] for name, found in families.items()}
    yield (
        "adapter switch: at most 5 ms",
        ", ".join(f"{name} {value:.2f} ms" for name, value in switch.items()),
        max(switch.values()) <= 5,
    )
    fold = {
        name: found["switch_ms"]["fold and rebuild"]
        for name, found in families.items()
        if "fold and rebuild" in found["switch_ms"]
    }
    yield (
        "fold and rebuild: at most 80 ms",
        ", ".join(f"{name} {value:.0f} ms" for name, value in fold.items()),
        max(fold.values()) <= 80,
    )


def _daemon_bars(daemon: Report) -> Iterator[Bar]:
    for key, found in daemon.items():
        first = found["first_answer_s"]
        yield (
            f"first answer at most 1 s after the start, {key}",
            f"{first['median']:.2f} s (fastest {first['minimum']:.2f})",
            first["median"] <= 1,
        )
    for key, found in daemon.items():
        most = 125 if key.startswith("int8") else 150
        yield (
            f"resident memory at most {most} MB, {key}",
            f"{found['resident_mb']:.0f} MB",
            found["resident_mb"] <= most,
        )
    # With many bundles both sides wait for adapters that are not in memory, not for each other.
    adds = {k: found["http_adds_ms"] for k, found in daemon.items() if k.endswith(", 1 bundles")}
    yield (
        "HTTP adds at most 1.5 ms p50",
        ", ".join(f"{key}: {value:.2f} ms" for key, value in adds.items()),
        max(adds.values()) <= 1.5,
    )


def _soak_bars(soak: Report) -> Iterator[Bar]:
    growth = soak["growth_mb"]
    yield (
        "no leak over 1,000,000 requests",
        f"{growth:+.1f} MB over the last four fifths of {soak['requests']:,} requests",
        soak["requests"] >= 1_000_000 and abs(growth) <= 2,
    )


def _path_section(path: Report) -> str:
    tables = []
    for batch in (1, 8, 32):
        counts = sorted({row["bundles"] for rows in path.values() for row in rows})
        rows = []
        for name, found in path.items():
            for passes in _ROUTES:
                cells = {
                    row["bundles"]: row
                    for row in found
                    if row["batch"] == batch and row["adapter_passes"] == passes
                }
                if cells:
                    ratios = (
                        f"{cells[count]['ratio']:.2f}" if count in cells else "–"
                        for count in counts
                    )
                    bare = min(row["bare"]["minimum_ms"] for row in cells.values())
                    rows.append((name, _ROUTES[passes], f"{bare:.2f}", *ratios))
        head = ("encoder", "route", "bare, ms", *(f"{count:,}" for count in counts))
        tables.append(f"Batch {batch}:\n\n{table(head, rows)}")
    return "\n\n".join(tables)


def _rivals_section(rivals: Report) -> str:
    names = list(dict.fromkeys(name for row in rivals["retrieval"] for name in row["ways"]))
    rows = [
        (
            name,
            *(
                f"{row['ways'][name]['minimum_ms']:.1f} ({row['ways'][name]['ratio']:.2f} ×)"
                if name in row["ways"]
                else "–"
                for row in rivals["retrieval"]
            ),
        )
        for name in names
    ]
    head = ("one sample, ms", *(f"{row['adapters']} adapters" for row in rivals["retrieval"]))
    return "\n\n".join((table(head, rows), _peft(rivals["peft"]), _files(rivals["one_file_each"])))


def _peft(peft: Report) -> str:
    if "left_out" in peft:
        return f"PEFT was left out: {peft['left_out']}."
    times = {name: found["minimum_ms"] for name, found in peft["times"].items()}
    return (
        f"PEFT {peft['version']}, LoRA of rank {peft['rank']}, a batch of {peft['batch']} in "
        f"torch: one adapter {times['one adapter']:.0f} ms, "
        f"32 adapters {times['32 adapters']:.0f} ms ({peft['mixed_ratio']:.2f} ×); without "
        f"adapters {times['bare, torch']:.0f} ms in torch, {times['bare, ONNX Runtime']:.0f} ms in "
        "ONNX Runtime."
    )


def _files(files: Report) -> str:
    times = {name: found["minimum_ms"] for name, found in files["times"].items()}
    return (
        f"One ONNX file for each adapter: {files['file_bytes'] / 1e6:.1f} MB a file, "
        f"{times['switch']:.0f} ms to open one, {times['run']:.2f} ms a sample once it is open "
        f"(bare encoder {times['bare']:.2f})."
    )


def _forms_section(forms: Report) -> str:
    rows = [
        (
            name,
            *(f"{found['batch_1_ms'][form]:.3f}" for form in ("bare", "fed, checked once")),
            f"{found['batch_1_ms'].get('folded', 0):.3f}"
            if "folded" in found["batch_1_ms"]
            else "–",
            f"{found['mixed']['suffix_ratio']:.2f} ×",
            f"{found['mixed']['whole_ratio']:.2f} ×",
        )
        for name, found in forms["families"].items()
    ]
    head = ("family", "bare suffix, ms", "fed", "folded", "mixed batch, suffix", "whole")
    return table(head, rows)


def _daemon_section(daemon: Report) -> str:
    rows = [
        (
            key,
            f"{found['first_answer_s']['median']:.2f}",
            f"{found['resident_mb']:.0f}",
            *(
                f"{found['ms'][way]['p50']:.2f} / {found['ms'][way]['p99']:.2f}"
                for way in ("in process", "http", "http, journalled")
            ),
        )
        for key, found in daemon.items()
    ]
    head = (
        "encoder",
        "first answer, s",
        "resident, MB",
        "in process, ms p50 / p99",
        "over HTTP",
        "over HTTP, journalled",
    )
    return table(head, rows)


def _soak_section(soak: Report) -> str:
    rate = soak["requests"] / soak["seconds"]
    first, last = (soak["resident_mb"][place]["mb"] for place in (0, -1))
    return (
        f"{soak['requests']:,} journalled requests over {soak['connections']} connections, "
        f"{soak['bundles']} bundles, {rate:,.0f} a second: {first:.1f} MB resident after the first "
        f"{soak['resident_mb'][0]['requests']:,}, {last:.1f} MB at the end."
    )


_SECTIONS: Final = {
    "path": _path_section,
    "rivals": _rivals_section,
    "forms": _forms_section,
    "daemon": _daemon_section,
    "soak": _soak_section,
}


def _draw_rivals(retrieval: Sequence[Report], plot: Path) -> None:
    """Milliseconds a sample by the number of adapters."""
    figure, axes = _figure(height=4)
    ways = ("daemon", "every adapter, whole passes", "every adapter, shared prefix")
    counts = [row["adapters"] for row in retrieval]
    for way in (*ways, *(f"{way}, torch" for way in ways[1:])):
        times = [row["ways"][way]["minimum_ms"] for row in retrieval]
        axes.plot(counts, times, marker="o", linestyle=":" if "torch" in way else "-", label=way)
    bare = [row["ways"]["bare"]["minimum_ms"] for row in retrieval]
    axes.plot(counts, bare, color="black", linewidth=1, label="bare encoder")
    axes.set(yscale="log", ylim=(4, 6000), xlabel="installed adapters", ylabel="ms a sample")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center")
    figure.savefig(plot, metadata={"Date": None})


def _draw_soak(soak: Report, plot: Path) -> None:
    """Resident memory by requests answered."""
    figure, axes = _figure(height=3)
    readings = soak["resident_mb"]
    axes.plot([r["requests"] for r in readings], [r["mb"] for r in readings])
    axes.set(ylim=(0, None), xlabel="requests answered", ylabel="resident memory, MB")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(plot, metadata={"Date": None})


def _figure(height: float) -> tuple[Any, Any]:
    """A figure seven inches wide and its axes; the same data give the same file."""
    import matplotlib as mpl  # noqa: PLC0415 - drawing only
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams["svg.hashsalt"] = "driftkeel"
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()
