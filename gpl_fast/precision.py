"""The arithmetic that PyTorch was told to use, and ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpl_fast.graphs import constant_in_graphs


def tf32_allowed() -> bool:
    """Whether PyTorch's own convolutions of float32 run as TF32.

    ``allow_tf32`` sets this too, but raises where it is read after ``fp32_precision`` was set.
    """
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums, for a prediction in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(t: Tensor) -> Any:
    """A context in which operators on `t` keep the dtypes they are given."""
    kind = t.device.type if has_autocast(t.device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


@constant_in_graphs  # torch 2.11 cannot trace it
def has_autocast(kind: str) -> bool:
    """Whether devices of this kind have any."""
    return torch.amp.is_autocast_available(kind)
