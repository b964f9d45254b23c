"""The CUDA code in the compiled library: for which GPUs it is, and which driver it needs."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class CudaBuild:
    """The CUDA code in the library: nvcc's version, and "80", "90a", …, for which it holds machine
    code; `ptx` are those that it also holds as PTX, for newer GPUs."""

    nvcc: str
    architectures: tuple[str, ...]
    ptx: tuple[str, ...]

    def serves(self, major: int, minor: int) -> bool:
        """Whether a GPU of this compute capability can run it."""
        for name in self.architectures:
            number, exact = int(name.rstrip("af")), not name.isdigit()
            same = number == 10 * major + minor
            if same or (not exact and number // 10 == major and number % 10 <= minor):
                return True
        return any(int(name) <= 10 * major + minor for name in self.ptx if name.isdigit())

    def needs_driver(self, major: int, minor: int) -> tuple[int, int]:
        """The CUDA that the driver has to know for such a GPU. Any of nvcc's generation does for
        machine code and for the runtime that is linked in; PTX wants nvcc's own or a newer one.
        """
        of_nvcc = self.nvcc.split(".")
        generation, release = int(of_nvcc[0]), int(of_nvcc[1])
        compiled = CudaBuild(self.nvcc, self.architectures, ()).serves(major, minor)
        return generation, 0 if compiled else release

    def __str__(self) -> str:
        names = [f"sm_{a}" for a in self.architectures] + [f"compute_{a} (PTX)" for a in self.ptx]
        return f"{', '.join(names)}, by nvcc {self.nvcc}"


def parse_cuda_build(text: str) -> CudaBuild | None:
    """What ``setup.py`` baked in, "13.0 80+PTX 90a"; None for "", a library without CUDA."""
    if not text:
        return None
    nvcc, *entries = text.split()
    ptx = tuple(e.removesuffix("+PTX") for e in entries if e.endswith("+PTX"))
    return CudaBuild(nvcc, tuple(e.removesuffix("+PTX") for e in entries), ptx)


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the GPU's driver knows, such as (12, 8); None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10
