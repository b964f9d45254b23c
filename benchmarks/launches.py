"""What the host does for a launch of a step's kernels, without a GPU.

``python benchmarks/launches.py`` compiles the kernels of a step for sm_90 and launches them again
and again, by Triton's own code up to a driver that does nothing, in turns with an empty kernel of
four arguments. It prints microseconds of a launch and of the stage's function around it, beside
its first kernel, how many times as long as the empty one's a launch is, and how many arguments
reach the launcher. It needs Triton and a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import gpl_fast
from gpl_fast import kernels
from gpl_fast.fast import policy

ARCH = 90
TIMES = 3.0  # an empty launch: what a launch should not take longer than
ARGUMENTS = 20
# Everything that Triton asks of libcuda, answered at once: pointers are what they are, attributes
# are large.
STUB = """
typedef unsigned long long u64;
#define DONE(name) int name() { return 0; }
DONE(cuCtxGetLimit) DONE(cuCtxSetCurrent) DONE(cuCtxSetLimit) DONE(cuDevicePrimaryCtxRetain)
DONE(cuFuncSetAttribute) DONE(cuFuncSetCacheConfig) DONE(cuModuleLoadData) DONE(cuLaunchKernelEx)
DONE(cuModuleGetFunction) DONE(cuOccupancyMaxActiveClusters) DONE(cuTensorMapEncodeTiled)
DONE(cuTensorMapEncodeIm2col) DONE(cuLaunchKernel) DONE(cuPointerGetAttributes)
int cuGetErrorString(int code, const char** text) { *text = "none"; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int* value, int which, void* function) { *value = 1024; return 0; }
int cuPointerGetAttribute(u64* value, int which, u64 pointer) { *value = pointer; return 0; }
"""


@triton.jit
def _empty(a_ptr, b_ptr, n, m):  # type: ignore[no-untyped-def]
    pass


@dataclass
class Launch:
    """One launch: how to make it again, alone and by the stage's function, and its arguments."""

    name: str
    again: Callable[[], Any]
    stage: Callable[[], Any] | None
    arguments: int


@contextlib.contextmanager
def no_driver() -> Iterator[None]:
    """Launches are compiled for sm_90, and made by Triton up to the call of the driver."""
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCH, 32)

    # Functions and modules of the same names are beside one another there.
    launching, active = sys.modules["gpl_fast.kernels.launch"], triton.runtime.driver._active
    nowhere = patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext())
    allocate = patch.object(launching, "_allocate", on_the_cpu)
    with tempfile.TemporaryDirectory() as folder, nowhere, allocate:
        library = Path(folder, "libcuda.so.1")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-O2", "-x", "c", "-"]
        named = ["-Wl,-soname,libcuda.so.1", "-o", str(library)]
        subprocess.run([*command, *named], input=STUB, text=True, check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # found by its name from here on
        triton.knobs.nvidia.libcuda_path = folder
        try:
            triton.runtime.driver.set_active(Driver())
            triton.set_allocator(on_the_cpu)
            yield
        finally:
            triton.runtime.driver._active = active


def on_the_cpu(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for descriptors that nobody reads."""
    return torch.empty(size, dtype=torch.int8)


class Watched:
    """Stages of Triton's whose launches are kept, by kernel and form."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}
        self.form = ""

    def __getattr__(self, stage: str) -> Callable[..., Any]:
        run = getattr(kernels, stage)

        def call(*args: Any, **options: Any) -> Any:
            with watched(self, self.form, partial(run, *args, **options)):
                return run(*args, **options)

        return call


@contextlib.contextmanager
def watched(into: Watched, form: str, stage: Callable[[], Any] | None) -> Iterator[None]:
    """The first launch of each kernel inside is kept; the stage beside its first kernel."""
    outer, kernels_of_it = JITFunction.run, count()

    def run(self: Any, *args: Any, **options: Any) -> Any:
        kernel = outer(self, *args, **options)
        whole = None if next(kernels_of_it) else stage
        name = f"{self.__name__.removeprefix('_').removesuffix('_kernel')}, {form}"
        if name not in into.launches:
            again = partial(outer, self, *args, **options)
            arguments = flat(kernel.src.signature.values())
            into.launches[name] = Launch(name, again, whole, arguments)
        return kernel

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = outer


def flat(types: Any) -> int:
    """How many arguments there are, those of tuples by themselves, without constants."""
    return sum(flat(t) if isinstance(t, tuple) else t != "constexpr" for t in types)


def of_a_step(classes: int = 19, forms: tuple[str, ...] = ("dense", "labels", "topk")) -> Watched:
    """The launches of a step's both halves, with a target of each kind."""
    found = Watched()
    now = replace(policy.named("cpu"), forward="triton", backward="triton", arch=ARCH)
    loss = gpl_fast.GenericPerceptualLoss(classes, backend="fast", compute_dtype="bfloat16")
    x = torch.randn(2, classes, 32, 48)
    targets: dict[str, Any] = {"dense": torch.randn_like(x)}
    targets["labels"] = torch.randint(classes, (2, 32, 48))
    targets["topk"] = gpl_fast.TopK(*torch.softmax(x, dim=1).topk(3, dim=1), "uniform")
    for found.form in forms:
        with policy.injected(now, triton=found):
            logits = x.clone().requires_grad_()
            loss(logits, targets[found.form]).backward()
    return found


def empty() -> Launch:
    """The kernel that all others are compared with."""
    found, (a, b) = Watched(), torch.empty(2, 16)
    with watched(found, "of four arguments", None):
        _empty[(1,)](a, b, 3, 5)
    return found.launches["empty, of four arguments"]


def seconds(launches: list[Callable[[], Any]], rounds: int, calls: int) -> list[float]:
    """The least of each in `rounds` turns: load on the machine makes none shorter."""
    least = [float("inf")] * len(launches)
    for _ in range(rounds):
        for i, again in enumerate(launches):
            begin = time.perf_counter()
            for _ in range(calls):
                again()
            least[i] = min(least[i], (time.perf_counter() - begin) / calls)
    return least


def rows(rounds: int, calls: int, **step: Any) -> list[list[str]]:
    """A line a launch, the empty one first."""
    with no_driver():
        found = [empty(), *of_a_step(**step).launches.values()]
        alone = seconds([launch.again for launch in found], rounds, calls)
        # As the walks call them: choice of the grid and the tile, and the device.
        whole = seconds([launch.stage or launch.again for launch in found], rounds, calls)
    return [
        [launch.name, f"{launch.arguments}", f"{1e6 * a:.1f}", f"{a / alone[0]:.2f}",
         f"{1e6 * b:.1f}" if launch.stage else ""]
        for launch, a, b in zip(found, alone, whole, strict=True)
    ]  # fmt: skip


def main() -> int:
    """Print the table; 1 where a launch has more arguments, or takes longer, than it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=20, help="of each, a round")
    args = parser.parse_args()
    found = rows(args.rounds, args.calls)
    print("| launch | arguments | µs | times an empty one | µs of the stage |")
    print("|---|--:|--:|--:|--:|")
    for row in found:
        print("| " + " | ".join(row) + " |")
    return int(any(int(r[1]) > ARGUMENTS or float(r[3]) > TIMES for r in found))


if __name__ == "__main__":
    sys.exit(main())
