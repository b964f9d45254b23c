"""Who computes each step, forward and backward, on which device, in which arithmetic.

The only file of the fast path that asks for a device; `Plan.how` holds what is decided here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import torch

from gpl_fast import ops, tiles
from gpl_fast.fast.by_table import ByTable
from gpl_fast.fast.call import Call
from gpl_fast.fast.measured import nearest, softmax_bwd
from gpl_fast.net.steps import Step
from gpl_fast.net.weights import Layout
from gpl_fast.tiles import Tile

MIB = 2**20
# workspace_mb="auto": megabytes of a CPU; of a GPU at least these and one part of so many, which
# make a step a few dozen launches: more memory hardly makes them fewer.
CPU_WORKSPACE_MB = 256
GPU_WORKSPACE_MB, GPU_WORKSPACE_SHARE = 640, 64

# Signs and winners come of the prediction's convolutions; the others decide nothing.
Role = Literal["prediction", "difference", "gradient"]


class Way(NamedTuple):
    """How a convolution is computed."""

    # Results to a side that are computed together: 4 and 2 by Winograd's algorithm
    # (csrc/cpu/winograd.cpp), 1 by the definition in bfloat16 (direct_conv.cpp), 0 by ATen.
    tile: int
    dtype: torch.dtype  # of the weight as it is read, and of what is multiplied by it

    def weight_elements(self, kernel_size: int, c_in: int, c_out: int) -> int:
        """Of the weight as it is read: its points in blocks of 32 output channels and of pairs of
        input channels, or of its taps 32 input and output channels at a time."""
        blocks = -(-c_out // 32) * 32
        if self.tile > 1:
            return (self.tile + 2) ** 2 * (-(-c_in // 2) * 2) * blocks
        if self.tile == 1:
            return kernel_size**2 * (-(-c_in // 32) * 32) * blocks
        return kernel_size**2 * c_in * c_out


class How(NamedTuple):
    """Who computes one step."""

    block: bool  # forward: one kernel does all of it, `conv_block_fwd`
    tile: Tile | None  # of that kernel
    prediction: Way
    difference: Way
    gradient: Way
    block_bwd: bool  # backward: one kernel goes from its output's gradient to its input's


@dataclass(frozen=True)
class Policy:
    """What is known of a machine, and what follows from it.

    Attributes:
        device: "cpu" or "cuda".
        forward, backward: who has the stages, by `implementation`: "compiled" or "triton".
        arch: 90 for sm_90; 0 of a CPU.
        bfloat16: what a CPU has for it, `gpl_fast.ops.cpu_bfloat16`: "none", "pairs" or "matrix".
        memory_mb: of a GPU, in 2^20 bytes.
        strip_mb: buffers of about this size stay in the allocator's free lists and close to the
            last-level cache; larger ones are fresh pages at every call. None = the workspace.
        strip_rows: fewer rows than these are mostly halo.
        winograd_tiles: from so many tiles on transforming the weight pays.
        mixed_tiles: from so many tiles of 2 x 2 on those in float32 pay where the definition in
            bfloat16 is the alternative.
        mixed_channels: from so many input channels on pairs of bfloat16 make the first layer's
            tiles of 2 x 2.
    """

    device: str = "cpu"
    forward: str = "compiled"
    backward: str = "compiled"
    arch: int = 0
    bfloat16: str = "none"
    memory_mb: float = 0.0
    strip_mb: float | None = 24.0
    strip_rows: int = 8
    winograd_tiles: int = 128
    mixed_tiles: int = 4096
    mixed_channels: int = 64

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU's own convolutions run."""
        return self.forward == "compiled"

    def workspace(self, workspace_mb: float | None) -> tuple[int, bool]:
        """Bytes, and whether they are a hard bound: of "auto" (None) a share of a GPU's memory, the
        same on every rank, that grows for an input which cannot do with it."""
        if workspace_mb is not None:
            return int(workspace_mb * MIB), True
        of_gpu = max(GPU_WORKSPACE_MB, self.memory_mb / GPU_WORKSPACE_SHARE)
        return int((of_gpu if self.device == "cuda" else CPU_WORKSPACE_MB) * MIB), False

    def arithmetic(self, dtype: torch.dtype) -> str:
        """Of convolutions of maps of `dtype`: in their "own" one, "float32", or "mixed" of both.
        Most CPUs multiply half precision no faster than float32 (docs/cpu.md)."""
        if not self.on_cpu:
            return "own"
        if dtype != torch.bfloat16:
            return "float32"
        return {"none": "float32", "pairs": "mixed", "matrix": "own"}[self.bfloat16]

    def weight_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the weights that convolve maps of `dtype`."""
        return torch.float32 if self.arithmetic(dtype) == "float32" else dtype

    def layout(self, call: Call, device: torch.device) -> Layout:
        """How the weights lie in memory for a call."""
        backward = [s.conv for i, s in enumerate(call.chain.steps) if self.by_kernel(call, i, s)]
        return Layout(
            device, self.weight_dtype(call.dtype), call.looked_up, not self.on_cpu, tuple(backward)
        )

    def by_kernel(self, call: Call, i: int, step: Step) -> bool:
        """Whether `conv_block_bwd` makes step i's data gradient, and not ATen."""
        if self.device != "cuda" or self.backward != "compiled":
            return False
        dtype = str(call.dtype).removeprefix("torch.")
        layer = (i == 0 and not call.front, step.out_channels, step.kernel_size, step.stride)
        row = nearest(self.arch, dtype, layer, step.in_channels)
        return row is not None and row["kernel_ms"] < row["aten_ms"]

    def softmax_bwd(self, classes: int) -> str:
        """Who has that stage: on a GPU the faster of the compiled one and Triton's."""
        return softmax_bwd(self.backward, self.arch, classes)

    def tile(self, call: Call, i: int, step: Step, c_in: int) -> Tile:
        """Of `conv_block_fwd`."""
        listed = i == 0 and call.looked_up and not call.front
        form = "listed" if listed else "plain" if call.plain else "diff"
        dtype = str(call.dtype).removeprefix("torch.")
        return tiles.choose(self.arch, dtype, form, c_in, step.out_channels, step.stride)

    def way(self, call: Call, i: int, step: Step, role: Role, tiles: Mapping[int, int]) -> Way:
        """Of step i's convolution, or of its data gradient (docs/cpu.md).

        Args:
            tiles: how many of 2 x 2 and of 4 x 4 results there are; 0 where those do not fit.
        """
        arithmetic, dtype = self.arithmetic(call.dtype), self.weight_dtype(call.dtype)
        if not self.on_cpu or step.stride != 1:
            return Way(0, dtype)
        mixed = arithmetic == "mixed"
        in_pairs = mixed and (
            role == "gradient"
            or (role == "prediction" and i == 0 and step.in_channels >= self.mixed_channels)
        )
        if step.kernel_size == 3 and arithmetic != "own":
            multiplied = call.dtype if in_pairs else torch.float32
            if role != "prediction" and tiles[4] >= self.winograd_tiles:
                return Way(4, multiplied)
            enough = self.mixed_tiles if mixed and not in_pairs else self.winograd_tiles
            if tiles[2] >= enough:
                return Way(2, multiplied)
        return Way(int(dtype == torch.bfloat16), dtype)


# ------------------------------------------------------------------------------------- by name

CPUS = {"avx2": "none", "avx512": "none", "avx512_bf16": "pairs", "amx": "matrix"}
_injected: dict[str, tuple[Policy, Mapping[str, Any]]] = {}
_current: list[str] = []
_numbers = count()


@functools.lru_cache(maxsize=64)
def name_of(device: torch.device) -> str:
    """What `named` takes for `device`."""
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def current(device: torch.device) -> str:
    """The name of who decides on `device` now."""
    return _current[-1] if _current else name_of(device)


def named(name: str) -> Policy:
    """The Policy of a device ("cpu", "cuda:0"), of an architecture that need not be there ("sm_90",
    "avx2", "avx512", "avx512_bf16", "amx"), or one that `injected` gave.

    Raises:
        ValueError: there is none of this name.
    """
    return _injected[name][0] if name in _injected else _of_name(name)


@functools.lru_cache(maxsize=64)
def _of_name(name: str) -> Policy:
    if name in CPUS:
        return Policy(bfloat16=CPUS[name])
    if name.startswith("sm_") and name[3:].isdigit():
        return Policy("cuda", "triton", "compiled", int(name[3:]), strip_mb=None)
    if name.partition(":")[0] in ("cpu", "cuda"):
        return ask(torch.device(name))
    raise ValueError(f"architecture: got {name!r}, expected one of {', '.join(CPUS)}, sm_80, …")


def ask(device: torch.device) -> Policy:
    """What there is to know of `device`."""
    if device.type != "cuda":
        return Policy(bfloat16=ops.cpu_bfloat16())
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / MIB
    backward = "compiled" if ops.cuda_obstacle(device) is None else "triton"
    return Policy("cuda", "triton", backward, 10 * major + minor, "none", memory, None)


@contextmanager
def injected(policy: Policy, **implementations: Any) -> Iterator[str]:
    """For tests: `policy` decides on every device, and stages may be those of `implementations`, by
    the names that the policy gives them. Yields the name, which graphs traced here keep."""
    name = f"injected {next(_numbers)}"
    _injected[name] = policy, implementations
    _current.append(name)
    try:
        yield name
    finally:
        _current.remove(name)
        del _injected[name]


@functools.lru_cache(maxsize=64)
def implementation(policy: str, half: Literal["forward", "backward"]) -> Any:
    """Who has the stages of a half, by the policy's name: `gpl_fast.stages.Stages`."""
    who = getattr(named(policy), half)
    if who in (given := _injected.get(policy, (None, {}))[1]):
        return given[who]
    if who == "compiled":
        return ops if named(policy).device == "cpu" else ByTable(named(policy).softmax_bwd)
    from gpl_fast import kernels  # only here: importing Triton takes a while

    return kernels
