"""Who does the stages: on the CPU the compiled operators; on a GPU Triton's kernels forward, and
backward the compiled operators too, or Triton's kernels where those cannot run."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from gpl_fast import ops, tiles
from gpl_fast.graphs import constant_in_graphs

TRITON_DEVICES = {"cuda"}  # tests add "cpu", for Triton's interpreter


def has_blocks(device: torch.device) -> bool:
    """Whether one kernel does a whole step of the forward."""
    return device.type in TRITON_DEVICES


@constant_in_graphs
def arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """How convolutions of maps of `dtype` are computed: `plan.Spec.arithmetic`."""
    on_cpu = device.type == "cpu" and not has_blocks(device)
    return ops.cpu_arithmetic(dtype) if on_cpu else "own"


def stages_on(device: torch.device) -> ModuleType:
    """The module whose functions are the forward's stages."""
    if not has_blocks(device):
        return ops
    from gpl_fast import kernels  # only here: importing Triton takes a while

    return kernels


def backward_stages_on(device: torch.device) -> ModuleType:
    """The module whose functions are the backward's stages."""
    return compiled_on(device) or stages_on(device)


def compiled_on(device: torch.device) -> ModuleType | None:
    """The operators of csrc/cuda, None where they cannot run."""
    return ops if ops.cuda_obstacle(device) is None else None


def tile_for(a: Tensor, c_in: int, c_out: int, stride: int, form: str) -> tiles.Tile:
    """The tile for a map `a` (N, H, W, C_in) on its device."""
    name = str(a.dtype).removeprefix("torch.")
    return tiles.choose(architecture(a.device), name, form, c_in, c_out, stride)


def architecture(device: torch.device) -> int:
    """90 for sm_90; the interpreter goes by the oldest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
