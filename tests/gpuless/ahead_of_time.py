"""Compile what a launch would compile, for a GPU that is not here, and say what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import triton
from hazards import between_waits, from_registers, overwritten, unfenced
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 86, 89, 90, 100, 120)

# Their assembler spills a few bytes by choice, to stay where one more program fits.
SPILLS_BY_CHOICE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide).
SHARED_LIMIT = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
    "gfx942": 64 << 10,
}  # fmt: skip

# The matrix instruction that an architecture has to be used with.
TENSOR_CORE = {
    80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma",
    120: "mma.sync", "gfx942": "mfma",
}  # fmt: skip

INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma_",
    "ldmatrix": r"\bldmatrix",
    "cp.async": r"\bcp\.async\.c[ag]\.",
    "TMA load": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
    "TMA store": r"\bcp\.async\.bulk\.tensor\.\dd\.global",
    "float atomic": r"\b(?:atom|red)\.[\w.]*\.f(?:16|16x2|32|64)\b|\bglobal_atomic_add_f",
}

if triton.knobs.runtime.interpret:
    raise pytest.UsageError(
        "what compiles Triton's kernels needs a process of its own, but TRITON_INTERPRET is set to "
        "interpret: run the folder alone and without it"
    )

_RUN = JITFunction.run


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    kernel: str
    capability: int | str  # 80 for sm_80, or the name of an AMD architecture
    warps: int
    registers: int  # of a thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    arguments: int  # tensors and numbers that a launch hands over
    warnings: frozenset[str]  # C75xx: ptxas waits for each wgmma, or moves its registers
    instructions: frozenset[str]  # names from INSTRUCTIONS
    assembly: str = field(repr=False)
    binary: bytes = field(repr=False)  # what a GPU would run

    def __str__(self) -> str:
        return (
            f"{self.kernel} for {self.capability}: {self.warps} warps, {self.registers} registers, "
            f"{self.spills} bytes spilled, {self.shared} bytes shared, "
            f"{', '.join(sorted(self.instructions)) or 'no instruction of note'}"
        )

    def hazards(self) -> list[str]:
        """Instructions that make a product read something else than it should, and why."""
        found = []
        if self.instructions & {"wgmma", "tcgen05.mma"}:
            found += [f"no proxy fence before {text}" for text in unfenced(self.assembly)]
        if "wgmma" in self.instructions:
            sass = disassembled(self.binary)
            found += [f"a wgmma in flight reads what is written by {t}" for t in overwritten(sass)]
        return found

    def slow(self, products: int) -> list[str]:
        """What keeps the tensor cores of sm_90 waiting, and why: `products` are those of a step of
        the loop, a wgmma each."""
        sass = disassembled(self.binary)
        found = [f"ptxas says {code}" for code in sorted(self.warnings)]
        found += [f"its operand goes through registers: {text}" for text in from_registers(sass)]
        runs = between_waits(sass)
        if min(runs, default=0) < products:
            found.append(f"expected {products} products from one wait to the next, got {runs}")
        return found


def compile_for(kernel, capability: int | str, *args, **kwargs) -> Compiled:
    """`kernel[grid](*args, **kwargs)` compiled only; tensors are meta, fake or real."""
    with compiling_for(capability) as compiled:
        kernel[(1,)](*args, **kwargs)
    return compiled[-1]


@contextmanager
def compiling_for(capability: int | str) -> Iterator[list[Compiled]]:
    """Launches inside, through any launcher, are compiled for the architecture, and not run.

    The list fills with one entry a launch, in their order.
    """
    compiled: list[Compiled] = []
    outer, active = JITFunction.run, triton.runtime.driver._active
    device = torch.cuda.device

    def run(self, *args, grid, warmup, **kwargs):
        args = [_stand_in(arg) for arg in args]
        kwargs = {name: _stand_in(arg) for name, arg in kwargs.items()}
        kernel = _RUN(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_inspect(kernel, self.__name__, capability))
        return kernel

    JITFunction.run = run
    torch.cuda.device = lambda device: nullcontext()  # there is none to launch on
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        yield compiled
    finally:
        JITFunction.run, torch.cuda.device = outer, device
        triton.runtime.driver._active = active


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def check(compiled: Compiled, *, tensor_core: str | None = "", pipelined: bool = True) -> None:
    """No spills, no float atomics, no hazards, shared memory within the limit, and the
    instructions wanted.

    `tensor_core` is the architecture's own unless named; None where the kernel has no products.
    """
    expected = [TENSOR_CORE[compiled.capability]] if tensor_core == "" else [tensor_core]
    faults = [
        f"expected {name}"
        for name in expected
        if name is not None and name not in compiled.instructions
    ]
    if compiled.spills:
        faults.append("expected no spills")
    if compiled.shared > (limit := SHARED_LIMIT[compiled.capability]):
        faults.append(f"expected at most {limit} bytes of shared memory")
    if "float atomic" in compiled.instructions:
        faults.append("expected no float atomics")
    faults += compiled.hazards()
    # AMD's pipelines are ordinary loads, which the assembly does not tell apart.
    nvidia = isinstance(compiled.capability, int)
    if pipelined and nvidia and not compiled.instructions & {"cp.async", "TMA load"}:
        faults.append("expected pipelined loads, cp.async or TMA")
    assert not faults, f"{'; '.join(faults)}; got {compiled}"


# -------------------------------------------------------------------------------------- the driver


class _Driver:
    """Of the one device there is, seen as Triton's launches see it up to the launch itself."""

    def __init__(self, capability: int | str) -> None:
        if isinstance(capability, int):
            self.target, self.device = GPUTarget("cuda", capability, 32), capability
        else:
            self.target, self.device = GPUTarget("hip", capability, 64), 0x900

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each architecture: kernels are kept by device."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Pointer:
    """A tensor without memory, whose type and alignment are what a launch is specialised on."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._tensor = tensor.dtype, tensor

    def data_ptr(self) -> int:
        """Allocations are aligned; views may not be."""
        return self._tensor.storage_offset() * self._tensor.element_size()

    def ptr_range(self) -> int:
        """In bytes, as AMD's specialisation asks."""
        return self._tensor.untyped_storage().nbytes()


def _stand_in(arg):
    """PyTorch warns, and will fail, where a fake tensor is asked for its address."""
    if isinstance(arg, tuple):
        return tuple(map(_stand_in, arg))
    return _Pointer(arg) if isinstance(arg, FakeTensor) else arg


# --------------------------------------------------------------------------------- what came out


def _inspect(kernel, name: str, capability: int | str) -> Compiled:
    if isinstance(capability, int):
        assembly = kernel.asm["ptx"]
        registers, spills, warnings = _ptxas(assembly, capability)
    else:
        warnings = frozenset()
        assembly = kernel.asm["amdgcn"]
        registers = _first(r"\.vgpr_count:\s+(\d+)", assembly)
        spills = 4 * sum(
            _first(rf"\.{kind}_spill_count:\s+(\d+)", assembly) for kind in ("vgpr", "sgpr")
        )
    found = (key for key, pattern in INSTRUCTIONS.items() if re.search(pattern, assembly))
    return Compiled(
        kernel=name,
        capability=capability,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        arguments=_arguments(kernel.src.signature.values()),
        warnings=warnings,
        instructions=frozenset(found),
        assembly=assembly,
        binary=kernel.asm["cubin" if isinstance(capability, int) else "hsaco"],
    )


def _arguments(types) -> int:
    """Of a signature, in which tuples are spread and constants stay behind."""
    return sum(_arguments(t) if isinstance(t, tuple) else t != "constexpr" for t in types)


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in:\n{text[-2000:]}"
    return int(found.group(1))


def _ptxas(ptx: str, capability: int) -> tuple[int, int, frozenset[str]]:
    """(registers, bytes spilled, codes of warnings about wgmma): the assembler that comes with
    Triton, asked once more."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = f"--gpu-name={sm_arch_from_capability(capability)}"
        done = subprocess.run(
            [get_ptxas(capability).path, "-v", arch, source, "-o", f"{source}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    report = done.stdout + done.stderr
    spills = sum(_first(rf"(\d+) bytes spill {kind}", report) for kind in ("stores", "loads"))
    registers = _first(r"Used (\d+) registers", report)
    return registers, spills, frozenset(re.findall(r"\bC75\d\d\b", report))


def disassembled(binary: bytes) -> str:
    """The SASS of a kernel, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
