"""Runs in processes of their own: what they measure, what is kept, what fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.bench import runner
from edge_agent.bench.activations import Activations
from edge_agent.bench.datasets import LabelledSet
from edge_agent.bench.runner import Outcome, Run, execute, plan
from edge_agent.bench.streams import StreamSettings
from edge_agent.bench.worker import Training
from exporter.package import EncoderPackage

QUICK = Training(epochs=1, rank=2)


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, run: Run) -> None:
        self.lines.append(f"start {run.strategy}")

    def advanced(self, run: Run, task: int, of: int, accuracy: float) -> None:
        assert 0 <= accuracy <= 100
        self.lines.append(f"{run.strategy} {task}/{of}")

    def finished(self, outcome: Outcome, *, kept: bool) -> None:
        self.lines.append(f"{'kept' if kept else 'end'} {outcome.run.strategy}")


@pytest.fixture
def runs_of(striped: LabelledSet, package: EncoderPackage, activations: Activations) -> Any:
    def make(*strategies: str, training: Training = QUICK, **changed: Any) -> list[Run]:
        return plan(
            "stripes",
            striped,
            StreamSettings(**{"init": 2, "increment": 2, **changed}),
            domain_key=None,
            package=package,
            activations=activations,
            training=training,
            strategies=strategies,
        )

    return make


def test_a_run_measures_and_is_not_run_again_until_its_settings_change(
    runs_of: Any, tmp_path: Path
) -> None:
    first, again, other = Log(), Log(), Log()
    (outcome,) = execute(runs_of("frozen"), tmp_path, jobs=1, watcher=first)
    result = outcome.result
    assert result is not None
    assert first.lines == ["start frozen", "frozen 1/2", "frozen 2/2", "end frozen"]
    written = json.loads((tmp_path / "stripes" / "frozen-0.json").read_text(encoding="utf-8"))
    assert written == result
    assert [len([v for v in row if v is not None]) for row in result["accuracy_matrix"]] == [1, 2]
    assert result["last"] > 70
    assert result["passes_per_sample"] == 1.0
    assert result["bytes_per_task"] > 0
    assert 20 < result["peak_memory_mb"] < 2000
    assert result["eval_ms_per_sample"] > outcome.run.activations.prefix_ms

    execute(runs_of("frozen"), tmp_path, jobs=1, watcher=again)
    assert again.lines == ["kept frozen"]
    execute(runs_of("frozen", shots=4), tmp_path, jobs=1, watcher=other)
    assert other.lines[0] == "start frozen"


def test_the_same_seed_gives_the_same_accuracies(runs_of: Any, tmp_path: Path) -> None:
    found = [
        execute(runs_of("joint"), tmp_path / name, jobs=1, watcher=Log())[0].result
        for name in ("one", "two")
    ]
    assert found[0]["accuracy_matrix"] == found[1]["accuracy_matrix"]
    assert found[0]["average"] is None
    assert found[0]["accuracy_matrix"][0] == [None, None]


def test_one_that_fails_is_told_and_the_others_go_on(runs_of: Any, tmp_path: Path) -> None:
    refused = runs_of("joint", training=Training(epochs=1, rank=2, family="nonesuch"))
    log = Log()
    bad, good = execute([*refused, *runs_of("frozen")], tmp_path, jobs=2, watcher=log)
    assert bad.result is None
    assert "nonesuch" in bad.error
    assert good.result is not None
    assert not (tmp_path / "stripes" / "joint-0.json").exists()


def test_a_process_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text("{}", encoding="utf-8")
    result, error = runner._worker(spec, set(), lambda _: None)
    assert result is None
    assert "ended with status 1" in error
    assert "missing required field" in error


def test_without_torch_what_trains_says_what_to_install(runs_of: Any, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n", encoding="utf-8"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from edge_agent.bench import worker\n"
        "import types\n"
        "def measure(spec, progress):\n"
        "    worker._engine(spec, trains=spec.strategy == 'joint')\n"
        "    return {}\n"
        "worker.measure = measure\n"
        "sys.exit(worker.main(sys.argv[1]))\n"
    )
    for name, status in (("joint", 2), ("frozen", 0)):
        (run,) = runs_of(name)
        spec = tmp_path / f"{name}.json"
        spec.write_text(
            json.dumps(
                {
                    "strategy": name,
                    "seed": 0,
                    "encoder": str(run.encoder),
                    "hidden": "",
                    "prefix_ms": 1.0,
                    "stream": "",
                    "training": {},
                }
            ),
            encoding="utf-8",
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(spec)], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert ("pip install 'driftkeel[train]'" in done.stdout) == (name == "joint")


def test_a_plan_holds_everything_that_decides_a_result(runs_of: Any, striped: LabelledSet) -> None:
    (run,) = runs_of("frozen")
    told = run.settings
    assert told["data"]["digest"] == striped.digest
    assert told["stream"]["order_seed"] == 1993
    assert [task["train"] for task in told["tasks"]] == [24, 24]
    assert json.loads(json.dumps(told)) == told
    assert np.array_equal(run.classes.index, striped.classes.index)
