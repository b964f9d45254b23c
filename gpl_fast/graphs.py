"""What torch.compile takes for granted while it traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile calls `function` while it traces and keeps the result.

    What `torch.compiler.assume_constant_result` does, which would import all of torch._dynamo. The
    arguments must be constants in torch 2.11; the object of a method may be any, and nothing of it
    is guarded: what the result depends on must be an argument too (`LossNet.identity`).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def constant(number: float) -> float:
    """`number`, which may be a symbol of the graph that is traced, as a constant of that graph:
    torch.compile guards on its value."""
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return float(guard_scalar(number))
