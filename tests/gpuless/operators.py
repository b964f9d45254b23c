"""The CUDA operators of csrc for CPU tensors: the shipped kernels, run on the CPU.

What dispatches them is compiled with CPU tensors in the place of CUDA's, no stream, and another
name, so that both libraries can be loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulate
import torch

CHANGES = {
    "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU,": "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, XLA,",
    "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA,": "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU,",
    "LIBRARY_FRAGMENT(gpl_fast, m)": "LIBRARY_FRAGMENT(gpl_fast_emulated, m)",
    "LIBRARY_IMPL(gpl_fast,": "LIBRARY_IMPL(gpl_fast_emulated,",
    "(t).is_cuda() ?": "true ?",
    "  const torch::stable::accelerator::DeviceGuard guard(device);\n": "",
    "aoti_torch_get_current_cuda_stream(device, &stream)": "(device, AOTI_TORCH_SUCCESS)",
}
COUNTERS = ("mma", "ldmatrix", "ldmatrix_phases", "cp_async", "tma", "barriers", "shared",
            "shared_phases", "dynamic_shared_bytes")  # fmt: skip
# KiB of shared memory that a block may have, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 90: 227}


def dispatch(flags: tuple[str, ...] = ()) -> list[Path]:
    """All but the kernels, as objects."""
    csrc, torch_dir = emulate.KEPT / "csrc", Path(torch.__file__).parent
    with emulate.alone(csrc):
        changed = _changed(csrc)
    flags = (
        "-O1", *flags, f"-isystem{torch_dir / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DGPL_FAST_CUDA="none"',
    )  # fmt: skip
    own = [emulate.HERE / name for name in ("stages_on_cpu.cpp", "emulation.cpp")]
    return emulate.side_by_side((*changed, *own), flags, csrc)


def _changed(csrc: Path) -> list[Path]:
    """A copy of csrc with the changes, each made somewhere; its sources."""
    found = {}
    for path in emulate.CSRC.rglob("*.[ch]*"):
        found[path.relative_to(emulate.CSRC)] = path.read_text()
    for old, new in CHANGES.items():
        assert any(old in text for text in found.values()), old
        found = {name: text.replace(old, new) for name, text in found.items()}
    for path in [path for path in csrc.rglob("*.*") if path.relative_to(csrc) not in found]:
        path.unlink()
    for name, text in found.items():
        path = csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    operators = (csrc / name for name in sorted(found) if name.parent.name == "operators")
    # Those that know of CUDA.
    return [p for p in operators if p.suffix == ".cpp" and "GPL_FAST_CUDA" in p.read_text()]


def linked(kernels: Sequence[Path], target: Path, *flags: str) -> Path:
    """The library: kernels' objects with what dispatches them."""
    torch_lib = Path(torch.__file__).parent / "lib"
    against = (f"-L{torch_lib}", "-Wl,--no-as-needed", "-ltorch_cpu")
    return emulate.link([*kernels, *dispatch()], target, *against, *flags)


def build() -> Path:
    """The library of the shipped kernels."""
    kernels = emulate.kernels((*emulate.CONVOLUTIONS, *emulate.FORWARD, *emulate.ELEMENTWISE))
    name = emulate.digest(*map(str, (*kernels, *dispatch())))
    target = emulate.KEPT / f"libgpl_fast_emulated.{name}.so"
    with emulate.alone(emulate.KEPT / "libgpl_fast_emulated"):
        if not target.exists():
            for old in emulate.KEPT.glob("libgpl_fast_emulated.*.so"):
                old.unlink()
            linked(kernels, target.with_suffix(".new")).rename(target)
    return target


class Emulated:
    """A library of the operators, and the GPU that its kernels are to run on."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.library = library
        self.operators: Any = torch.ops.gpl_fast_emulated
        self._native = ctypes.CDLL(str(library))

    def play(self, capability: int, shared_kib: int | None = None) -> None:
        """Be a GPU of this compute capability, with its own KiB of shared memory unless named."""
        kib = SHARED_KIB[capability] if shared_kib is None else shared_kib
        self._native.play(capability, ctypes.c_size_t(kib))

    def count_shared(self, on: bool) -> None:
        """Whether accesses to shared memory are counted, which takes a while."""
        self._native.count_shared(ctypes.c_bool(on))

    def counters(self) -> dict[str, int]:
        """Of the last launch."""
        counts = (ctypes.c_uint64 * len(COUNTERS))()
        self._native.counters(counts)
        return dict(zip(COUNTERS, counts, strict=True))


@functools.cache
def load() -> Emulated:
    """Once a process; GPL_FAST_TEST_OPERATORS names a library of other kernels."""
    given = os.environ.get("GPL_FAST_TEST_OPERATORS")
    return Emulated(Path(given) if given else build())
