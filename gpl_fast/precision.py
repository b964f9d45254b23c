"""The arithmetic that PyTorch was told to use."""

from __future__ import annotations

from typing import Any

import torch


def tf32_allowed() -> bool:
    """Whether PyTorch's own convolutions of float32 run as TF32.

    ``allow_tf32`` sets this too, but raises where it is read after ``fp32_precision`` was set.
    """
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")
