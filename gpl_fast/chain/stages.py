"""Who does the stages: the compiled operators on the CPU, Triton's kernels on a GPU."""

from __future__ import annotations

from types import ModuleType

import torch

from gpl_fast import ops

TRITON_DEVICES = {"cuda"}  # tests add "cpu", for Triton's interpreter


def has_blocks(device: torch.device) -> bool:
    """Whether one kernel does a whole step of the forward."""
    return device.type in TRITON_DEVICES


def stages_on(device: torch.device) -> ModuleType:
    """The module whose functions are the stages."""
    if not has_blocks(device):
        return ops
    from gpl_fast import kernels  # only here: importing Triton takes a while

    return kernels
