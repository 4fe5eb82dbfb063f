"""Giving memory that was freed back to the operating system.

Loading an encoder reads its weights and hands them to ONNX Runtime, which lays them out anew: the
allocator keeps the pages of every copy in between.
"""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Have the C library return what it holds and does not use; where it cannot, do nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; musl has none
    if trim is not None:
        trim(0)
