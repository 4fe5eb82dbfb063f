"""Freed memory goes back to the operating system where the C library can do that."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from edge_agent.freed_memory import give_back

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


def test_a_c_library_without_trimming_is_no_error(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or object())
    give_back()
    assert asked == [None]
