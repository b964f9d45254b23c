"""What torch.compile takes for granted while it traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile calls `function` while it traces and keeps the result.

    What `torch.compiler.assume_constant_result` does, which would import all of torch._dynamo. The
    arguments must be constants in torch 2.11; the object of a method may be any, and nothing of it
    is guarded: what the result depends on must be an argument too (`LossNet.identity`).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
