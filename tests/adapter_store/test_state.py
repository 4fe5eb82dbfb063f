"""One process at a time has a state directory, and a killed one leaves it ready for the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapter_store.errors import DatabaseTooNewError, DiskFullError, StateLockedError
from adapter_store.generation import GenerationManifest
from adapter_store.state import StateDir
from adapter_store.wire import Offer, encode

ROOT = Path(__file__).parents[2]


def generation(state, *bundles, parent=None):
    manifest = GenerationManifest(
        number=0,
        encoder="e" * 64,
        bundles=list(bundles),
        parent=parent,
        reason="test",
        created_at=0.0,
    )
    return state.generations.create(manifest, np.ones((2, 3), np.float16))


def test_a_second_agent_is_refused_and_told_who_has_it(tmp_path) -> None:
    with StateDir(tmp_path), pytest.raises(StateLockedError, match=f"by process {os.getpid()};"):
        StateDir(tmp_path)
    StateDir(tmp_path).close()


def test_closing_twice_is_fine(tmp_path) -> None:
    state = StateDir(tmp_path)
    state.close()
    state.close()
    with StateDir(tmp_path) as again:
        assert len(again.outbox) == 0


def test_a_directory_that_could_not_be_opened_is_not_left_locked(tmp_path) -> None:
    with StateDir(tmp_path) as state, state._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")
    for _ in range(2):
        with pytest.raises(DatabaseTooNewError):
            StateDir(tmp_path)


def test_a_path_that_cannot_be_used_is_named(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskFullError, match=r"cannot use .*file"):
        StateDir(tmp_path / "file" / "state")


def test_a_damaged_generation_is_reported(tmp_path) -> None:
    with StateDir(tmp_path) as state:
        for _ in range(2):
            generation(state, state.blobs.put(b"bundle"))
        state.generations.activate(1)
        state.generations.activate(2)
        assert state.recovered is None
    (tmp_path / "generations/000002/manifest.json").unlink()
    with StateDir(tmp_path) as state:
        assert "generation 1 is used instead" in state.recovered


def test_pruning_keeps_what_is_owed_to_the_catalogue_and_what_an_open_episode_needs(state) -> None:
    used, offered, tried, done, named, stray = (
        state.blobs.put(name) for name in (b"1", b"2", b"3", b"4", b"5", b"6")
    )
    generation(state, used)
    state.generations.activate(1)
    offer = Offer(digest=offered, size_bytes=1)
    state.outbox.put(offer.id, encode(offer), "offer")
    state.outbox.put("other", b"\x09not for this version", "offer")
    state.episodes.save({"number": 1, "stage": "closed", "candidate": done})
    state.episodes.save({"number": 2, "stage": "trial", "candidates": [{"digest": tried}]})
    state.prune(protect_blobs={named})
    assert set(state.blobs) == {used, offered, tried, named}
    assert not state.blobs.has(stray)


def test_a_killed_agent_loses_nothing_that_was_acknowledged(tmp_path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from adapter_store.generation import GenerationManifest
from adapter_store.journal import SampleRecord
from adapter_store.state import StateDir

state = StateDir(Path(sys.argv[1]))
for k in range(100_000):
    record = SampleRecord(id=f"s{k}", at=0.0, generation=1, label="a", probability=1.0,
                          adapter=None, score=0.0, p_value=1.0,
                          features=np.ones(3, np.float16), image=None)
    state.journal.record([record], {"seen": k + 1})
    state.journal.feedback(f"s{k}", "b")
    state.outbox.put(f"message {k}", b"x", "offer")
    manifest = GenerationManifest(number=0, encoder="e" * 64, parent=None, reason="",
                                  bundles=[state.blobs.put(str(k).encode())], created_at=0.0)
    state.generations.activate(state.generations.create(manifest, np.ones((2, 3), "f2")).number)
    state.prune()
    print(k + 1, flush=True)
"""
    done = 0
    for round_ in range(4):
        path = tmp_path / str(round_)
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        # Each round is killed at another moment of another turn.
        for _ in range(3 + 4 * round_):
            done = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.wait()
        done = int(rest[-1]) if rest and rest[-1].isdigit() else done
        with StateDir(path) as state:
            assert state.recovered is None
            assert state.generations.current().number in (done, done + 1)
            state.generations.current().check()
            assert state.journal.count_labelled() in (done, done + 1)
            assert len(state.outbox) in (done, done + 1)
            assert state.journal.alarm_state()["seen"] in (done, done + 1)
