"""Tensors that hold values, whatever modes the caller runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def real_tensors() -> Iterator[None]:
    """Around what makes or reads weights: under ``FakeTensorMode`` they hold values too, and those
    made under ``torch.inference_mode`` may enter a graph later."""
    with torch.inference_mode(False), _disable_current_modes():
        yield


def holds_values(t: Tensor) -> bool:
    """False of tensors that are lazy, fake, or on the meta device."""
    return not (is_lazy(t) or t.is_meta or hasattr(t, "fake_mode"))
