"""Freed memory goes back to the operating system where the C library can do that."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.freed_memory import give_back, share_one_heap

BLOCK, BLOCKS = 100_000, 400


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives memory back when asked"
)
def test_memory_that_was_freed_is_given_back() -> None:
    # Blocks below the size that is mapped apart, the last of which keeps the heap from shrinking.
    blocks = [np.ones(BLOCK, np.uint8) for _ in range(BLOCKS)]
    last = blocks.pop()
    full = resident_bytes()
    blocks.clear()
    give_back()
    assert full - resident_bytes() > BLOCK * BLOCKS // 2
    assert last.all()


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="only glibc has heaps to count"
)
def test_threads_share_one_heap() -> None:
    # In a process of its own: how many heaps there are cannot be taken back.
    program = """
import ctypes, sys, threading
from edge_agent.freed_memory import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
here = threading.Barrier(5)
def work():
    libc.malloc(100_000)
    here.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
here.wait()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""
    heaps = {}
    for how in ("shared", "apart"):
        told = subprocess.run(
            [sys.executable, "-c", program, how], capture_output=True, text=True, check=True
        )
        heaps[how] = told.stdout.count("<heap ")
    assert heaps["shared"] == 1
    assert heaps["apart"] > 1


@pytest.mark.parametrize("ask", [give_back, share_one_heap])
def test_a_c_library_without_it_is_no_error(monkeypatch, ask) -> None:
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or object())
    ask()
    assert asked == [None]
