"""Memory as the system tells of it: what this process holds, and what is there for the taking."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def reset_peak(cuda: bool) -> float | None:
    """MiB in use, from which the peak starts again; None if it cannot."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's; a step would use free pages again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    except (AttributeError, OSError):
        return None
    return resident_mib("VmRSS")


def resident_mib(field: str) -> float | None:
    """``VmRSS`` or ``VmHWM`` of this process in MiB, None where there is no ``/proc``.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    kib = _kib(Path("/proc/self/status"), field)
    return None if kib is None else kib / 1024


def free_bytes(device: str) -> int | None:
    """Memory that is there for the taking: free on the GPU, else ``MemAvailable``."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    kib = _kib(Path("/proc/meminfo"), "MemAvailable")
    return None if kib is None else kib * 1024


def _kib(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
