"""Memory that is large enough for its page faults to count."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

# glibc maps such memory anew at every call.
MAPPED_BYTES = 2**25


def prefer_huge_pages(t: Tensor) -> None:
    """Ask Linux for pages of 2 MiB under a large new `t`: with many classes, faults of 4 KiB each
    take as long as the arithmetic. Elsewhere, and of less memory, nothing."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or t.device.type != "cpu" or t.nbytes < MAPPED_BYTES:
        return
    start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = t.data_ptr() + t.nbytes - start
    # Whether it is heard or not, the memory is the same.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
