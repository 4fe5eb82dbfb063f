"""Giving memory that was freed back to the operating system.

Loading an encoder reads its weights and hands them to ONNX Runtime, which lays them out anew: the
allocator keeps the pages of every copy in between. Answering, each thread frees into a heap of its
own, and what lies there no other thread uses again.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

# mallopt's parameter for the most heaps, in glibc's malloc.h.
_M_ARENA_MAX: Final = -8


def share_one_heap() -> None:
    """Have all threads to come allocate from one heap; where that cannot be had, do nothing.

    A device answers one batch at a time, so threads hardly ever wait for each other there. With a
    heap for each thread, 120 requests grew a daemon with ViT-Tiny from 162 to 216 MB; with one, to
    166.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own; musl has none
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Have the C library return what it holds and does not use; where it cannot, do nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
