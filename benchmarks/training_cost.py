"""What does training an adapter cost, next to the ordinary way?

The ordinary way: a bottleneck adapter in every block, every image through the whole network in
every step. Ours: adapters in the last blocks, the prefix run once and its activations kept in
float16, by the daemon's own training loop. Both learn the same tasks by the same recipe, every
training in a process of its own, on one thread; afterwards each epoch's adapter is judged by a
Gaussian head with one shared covariance on the network's own output, and by the daemon's decision,
which also weighs base features of all depths (for both alike).

    python -m benchmarks.training_cost --data DIR [--encoder DIR] [--out FILE]

Times are processor seconds, which other work on the machine disturbs little; loading the encoder is
left out of them on both sides and told apart. "To the same accuracy": the lower of the two final
accuracies, each a mean over tasks; the time is that of the first epoch that reaches it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.command import arguments, parsed, write
from benchmarks.tasks import SplitTask, build_package, circumstances, load_tasks
from benchmarks.training_ways import RANK, Job, Measured, Variant, write_task
from exporter.package import EncoderPackage

_ONE_THREAD: Final = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
}
BASELINE: Final = Variant(name="all blocks, float32", blocks="all", precision="float32")
OURS: Final = (
    Variant(name="last blocks, float32", blocks="last", precision="float32"),
    Variant(name="last blocks, bfloat16", blocks="last", precision="bfloat16"),
)
# Told for one epoch only: what the number format alone gives the ordinary way.
ASIDE: Final = Variant(name="all blocks, bfloat16", blocks="all", precision="bfloat16")
MICRO_BATCHES: Final = (16, 4)


def in_own_process(job: Job) -> Measured:
    """Carry a job out in a fresh process of one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_ways"],
        input=msgspec.json.encode(job),
        stdout=subprocess.PIPE,
        env=os.environ | _ONE_THREAD,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=Measured)


def summary(runs: Sequence[Measured]) -> dict[str, Any]:
    """The mean over tasks of one variant; memory is the largest of any."""
    return {
        "accuracy": _mean([run.accuracy for run in runs], 4),
        "decided_accuracy": _mean([run.decided_accuracy for run in runs], 4),
        "frozen_accuracy": _mean([run.frozen_accuracy for run in runs], 4),
        "cpu_s": _mean([run.cpu_s for run in runs], 2),
        "wall_s": _mean([run.wall_s for run in runs], 2),
        "before_s": _mean([run.before_s for run in runs], 2),
        "load_s": _mean([run.load_s for run in runs], 2),
        "memory": memory(runs),
    }


def memory(runs: Sequence[Measured]) -> dict[str, float]:
    """Peak memory: in all, without the libraries, and without the loaded encoder either."""
    return {
        "peak_mb": max(run.peak_mb for run in runs),
        "above_imports_mb": round(max(run.peak_mb - run.imports_mb for run in runs), 1),
        "above_loaded_mb": round(
            max(run.peak_mb - run.imports_mb - run.loading_mb for run in runs), 1
        ),
    }


def compared(baseline: dict[str, Any], ours: dict[str, Any], *, by: str) -> dict[str, Any]:
    """How much faster and smaller one variant is than the baseline.

    Args:
        baseline: A `summary`.
        ours: Another's.
        by: The accuracy meant, `accuracy` or `decided_accuracy`.
    """
    target = min(baseline[by][-1], ours[by][-1])
    reached = [
        (k, side["cpu_s"][k])
        for side in (baseline, ours)
        for k in [next(k for k, a in enumerate(side[by]) if a >= target)]
    ]
    return {
        "same_accuracy": target,
        "epochs_to_it": [k + 1 for k, _ in reached],
        "cpu_s_to_it": [seconds for _, seconds in reached],
        "times_faster_to_it": round(reached[0][1] / reached[1][1], 2),
        "times_faster_whole_training": round(baseline["cpu_s"][-1] / ours["cpu_s"][-1], 2),
        "final_accuracy_difference": round(ours[by][-1] - baseline[by][-1], 4),
        "memory_ratio": {
            key: round(ours["memory"][key] / baseline["memory"][key], 3)
            for key in baseline["memory"]
        },
    }


def _mean(values: Sequence[Any], digits: int) -> Any:
    result: Any = np.round(np.mean(np.array(values, dtype=np.float64), axis=0), digits).tolist()
    return result


def measure(
    encoder: Path, tasks: Sequence[SplitTask], recipe: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Train every variant on every task and compare them with the baseline.

    Args:
        encoder: The package's directory.
        tasks: The tasks.
        recipe: `epochs`, `batch_size`, `learning_rate` and `seed` of all trainings.
        say: Told about each training once it is done.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [write_task(Path(folder) / f"{k}.npz", task) for k, task in enumerate(tasks)]

        def run(variant: Variant, file: Path, *, judged: bool, **changed: Any) -> Measured:
            settings = recipe | changed
            job = Job(
                variant=variant, encoder=str(encoder), task=str(file), judged=judged, **settings
            )
            found = in_own_process(job)
            last = f"{100 * found.accuracy[-1]:.1f} %" if judged else ""
            say(f"{variant.name}: {found.cpu_s[-1]:.1f} s, {found.peak_mb:.0f} MB {last}")
            return found

        runs: dict[str, list[Measured]] = {variant.name: [] for variant in (BASELINE, *OURS)}
        # Task by task, so that a busy minute of the machine meets all variants alike.
        for file in files:
            for variant in (BASELINE, *OURS):
                runs[variant.name].append(run(variant, file, judged=True))
        variants = {name: summary(found) for name, found in runs.items()}
        one_epoch: list[dict[str, Any]] = []
        for variant in (BASELINE, ASIDE, *OURS):
            for size in (None, *MICRO_BATCHES):
                small = msgspec.structs.replace(variant, micro_batch=size)
                tried = run(small, files[0], judged=False, epochs=1)
                one_epoch.append(
                    {
                        "variant": variant.name,
                        "micro_batch": size,
                        **memory([tried]),
                        "cpu_s_of_steps": round(tried.cpu_s[0] - tried.before_s, 2),
                    }
                )
    baseline = variants[BASELINE.name]
    for variant in OURS:
        ours = variants[variant.name]
        ours["compared_with_baseline"] = {
            by: compared(baseline, ours, by=by) for by in ("accuracy", "decided_accuracy")
        }
    return {
        "tasks": len(tasks),
        "samples": {"train": len(tasks[0].train.labels), "test": len(tasks[0].test.labels)},
        "recipe": recipe,
        "rank": RANK,
        "baseline": BASELINE.name,
        "variants": variants,
        "one_epoch": one_epoch,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = arguments(
        "What training an adapter costs.", "training_cost", encoder="ViT-Tiny at 96 px"
    )
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    options = parsed(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        encoder = options.encoder or build_package(options.data, Path(folder) / "encoder")
        package = EncoderPackage.load(encoder)
        recipe = {"epochs": options.epochs, "batch_size": 48, "learning_rate": 0.003, "seed": 0}
        tasks = load_tasks(options.data, package, options.tasks)
        result = measure(encoder, tasks, recipe, lambda line: print(line, flush=True))
        report = {"benchmark": "training_cost", **circumstances(package), **result}
    for name, variant in report["variants"].items():
        print(name, variant["memory"], variant.get("compared_with_baseline", ""))
    write(report, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
