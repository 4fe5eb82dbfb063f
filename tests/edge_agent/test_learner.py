"""The learner: how a training process ends, dies, is stopped, and what is made of it."""

import os
import queue
import sys
from pathlib import Path

import pytest

from edge_agent.learner import Learner, Outcome

WAIT_S = 60.0


def learner(directory: Path, script: str) -> tuple[Learner, "queue.Queue[Outcome]"]:
    """A learner whose trainer is a few lines of Python run in the job's directory."""
    ends: queue.Queue[Outcome] = queue.Queue()
    prelude = "import os, sys, pathlib; os.chdir(sys.argv[1]);"
    command = (sys.executable, "-S", "-E", "-c", prelude + script)
    made = Learner(directory, ends.put, command=command)
    made.job_directory("job").mkdir(parents=True)
    return made, ends


def test_a_finished_training_gives_its_bundle(tmp_path: Path) -> None:
    trainer, ends = learner(tmp_path, "pathlib.Path('result.bundle').write_bytes(b'bundle')")
    trainer.start("job")
    assert ends.get(timeout=WAIT_S) == Outcome("job", b"bundle")


@pytest.mark.parametrize(("status", "unavailable"), [(2, False), (3, True)])
def test_a_refused_training_says_why(tmp_path: Path, status: int, unavailable: bool) -> None:
    said = '{"reason": "why"}'
    script = f"pathlib.Path('failure.json').write_text('{said}'); sys.exit({status})"
    trainer, ends = learner(tmp_path, script)
    trainer.start("job")
    assert ends.get(timeout=WAIT_S) == Outcome("job", None, "why", unavailable)


def test_a_killed_trainer_is_started_again_on_the_same_job(tmp_path: Path) -> None:
    script = (
        "n = len(list(pathlib.Path('.').glob('start-*')));"
        "pathlib.Path(f'start-{n}').touch();"
        "n < 1 and os.kill(os.getpid(), 9);"
        "pathlib.Path('result.bundle').write_bytes(b'bundle')"
    )
    trainer, ends = learner(tmp_path, script)
    trainer.start("job")
    assert ends.get(timeout=WAIT_S).bundle == b"bundle"
    assert len(list((tmp_path / "job").glob("start-*"))) == 2


def test_a_trainer_that_always_fails_is_given_up_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.learner._STARTS", 2)
    trainer, ends = learner(tmp_path, "sys.exit('out of memory')")
    trainer.start("job")
    outcome = ends.get(timeout=WAIT_S)
    assert outcome.bundle is None
    assert "out of memory" in outcome.reason


def test_a_stopped_training_ends_at_once_silently_and_keeps_its_job(tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    script = f"f = open({str(fifo)!r}, 'w'); f.write('x'); f.flush(); import time; time.sleep(600)"
    trainer, ends = learner(tmp_path / "jobs", script)
    trainer.start("job")
    with fifo.open() as alive:
        assert alive.read(1) == "x"
        trainer.stop()
        assert alive.read() == ""
    assert ends.empty()
    assert trainer.job_directory("job").is_dir()


def test_discarding_removes_the_jobs_of_earlier_episodes(tmp_path: Path) -> None:
    trainer, _ = learner(tmp_path, "pass")
    trainer.job_directory("old").mkdir()
    trainer.discard(keep="job")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
