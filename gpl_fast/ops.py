"""Loads the compiled operators. The only file that names ``torch.ops.gpl_fast``.

Every operator writes into buffers that the caller owns, so that a workspace is used again without
page faults; shapes, dtypes and layouts are checked in ``csrc/*.cpp``. Maps are NHWC. A strip is
the rows ``[row0, row0 + rows)`` of every image; rows outside the image are written as zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().parent / "libgpl_fast.so"

ACTIVATIONS = {"none": 0, "softmax": 1, "sigmoid": 2}
POOLS = {"max": 0, "avg": 1, "": 2}

_MUTATING = (
    "softmax_pack_fwd",
    "label_conv_fwd",
    "topk_conv_fwd",
    "relu_fwd",
    "relu_diff_fwd",
    "relu_pool_fwd",
    "relu_pool_diff_fwd",
    "relu_pool_bwd",
    "relu_bwd",
    "softmax_bwd",
    "winograd_weight",
    "winograd",
    "direct_weight",
    "direct_conv",
    "populate",
    "conv_block_bwd",
    "conv_block_logits_bwd",
)
_TEXTS = ("cpu_capability", "cpu_bfloat16", "cuda_build")


@functools.cache
def load() -> str | None:
    """Load the library once; the reason why not, or None."""
    if not LIBRARY.exists():
        return f"the compiled operators are not built ({LIBRARY.name} is missing)"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"the compiled operators do not load: {error}"
    for name in _MUTATING:
        torch.library.register_fake(f"gpl_fast::{name}", _mutating_fake)
    torch.library.register_fake("gpl_fast::diff_reduce_fwd", _diff_reduce_fwd_fake)
    return None


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


def cuda_obstacle(device: torch.device) -> str | None:
    """Why the library's CUDA operators cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"they are for CUDA devices, not for {device.type!r}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if (reason := load()) is not None:
        return reason
    build = parse_cuda_build(torch.ops.gpl_fast.cuda_build())
    if build is None:
        return "the compiled operators were built without nvcc, for the CPU only"
    major, minor = torch.cuda.get_device_capability(device)
    if not build.serves(major, minor):
        return f"the compiled operators hold {build}, nothing for sm_{major}{minor}"
    return None


@functools.cache
def cpu_arithmetic(dtype: torch.dtype) -> str:
    """How this CPU's convolutions of maps of `dtype` are computed: `plan.Spec.arithmetic`."""
    if dtype != torch.bfloat16:
        return "float32"
    unit: str = __getattr__("cpu_bfloat16")()
    return {"none": "float32", "pairs": "mixed", "matrix": "own"}[unit]


def _mutating_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _diff_reduce_fwd_fake(delta: torch.Tensor) -> torch.Tensor:
    return delta.new_empty(delta.shape[0], dtype=torch.float64)


def __getattr__(name: str) -> Any:
    """``ops.relu_bwd`` and so on: the operator itself (``OpOverload``)."""
    if name not in (*_MUTATING, "diff_reduce_fwd", *_TEXTS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (reason := load()) is not None:
        raise RuntimeError(reason)
    operator = getattr(torch.ops.gpl_fast, name).default
    globals()[name] = operator
    return operator
