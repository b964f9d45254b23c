"""Inside of the fast path's two operators: what they call, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpl_fast.fast import operator
from gpl_fast.fast.call import read
from gpl_fast.fast.plan import Plan

IMPLEMENTATIONS = {
    torch.ops.gpl_fast.perceptual_fwd.default: operator._perceptual_fwd,
    torch.ops.gpl_fast.perceptual_bwd.default: operator._perceptual_bwd,
}


class Inside(TorchDispatchMode):
    """Each call of the operators goes on under a mode of its own.

    Args:
        make: the mode.

    Attributes:
        modes: of the calls, in their order.
    """

    def __init__(self, make: Callable[[], TorchDispatchMode]) -> None:
        super().__init__()
        self.make = make
        self.modes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in IMPLEMENTATIONS:
            return func(*args, **(kwargs or {}))
        with self.make() as mode:  # the operator itself would come to the mode, not what it calls
            self.modes.append(mode)
            return IMPLEMENTATIONS[func](*args)


class Taken(NamedTuple):
    """What one operator took at most, in bytes, besides what it returned."""

    half: str
    plan: Plan
    transient: int


class Measured(TorchDispatchMode):
    """Every call of the two operators; weights are packed before."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Taken] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in IMPLEMENTATIONS:
            return func(*args, **(kwargs or {}))
        call = read(next(a for a in args if isinstance(a, str)))
        operator._packs(call, args[0])
        peak, out = peak_bytes(lambda: func(*args))
        forward = func is torch.ops.gpl_fast.perceptual_fwd.default
        kept = sum(t.nbytes for t in ((out[0], *out[1]) if forward else (out,)))
        plan = operator._plan(call, args[0])
        self.taken.append(Taken("forward" if forward else "backward", plan, peak - kept))
        return out


def peak_bytes(call: Callable[[], Any]) -> tuple[int, Any]:
    """The most that tensors made by `call` hold at once, and its result."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
        result = call()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, result


def step(loss: Callable[..., torch.Tensor], pred: torch.Tensor, *args: Any) -> list[Taken]:
    """What a forward and its backward took; before them a target, where it is encoded first."""
    with Measured() as measured:
        value = loss(pred.detach().requires_grad_(), *args)
        value.sum().backward()
    halves = [t.half for t in measured.taken]
    assert halves in (["forward", "backward"], ["forward", "forward", "backward"])
    return measured.taken
