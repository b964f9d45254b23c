"""FLOPs and bytes of every launch of a step on a GPU, counted without one.

The two walks of `gpl_fast.fast` run with their arguments on tensors without memory, and a recorder
in the place of the stages: neither a GPU nor Triton is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpl_fast.backend import BackendUnavailable
from gpl_fast.fast import policy
from gpl_fast.fast.backward import Backward
from gpl_fast.fast.call import Call
from gpl_fast.fast.forward import Forward
from gpl_fast.fast.plan import Plan
from gpl_fast.net import weights
from gpl_fast.net.lossnet import LossNet
from gpl_fast.tools.recorder import SMALL as SMALL
from gpl_fast.tools.recorder import Launch, Recorder, count_of
from gpl_fast.tools.workload import TOP, Workload, check_shape, make_inputs, make_loss
from gpl_fast.tools.workload import WORKLOADS as WORKLOADS

WORKSPACE_MB = 2048.0


@dataclass(frozen=True)
class _Growing(policy.Policy):
    """One whose "auto" begins at so many megabytes."""

    auto_mb: float = 0.0

    def workspace(self, workspace_mb: float | None) -> tuple[int, bool]:
        """As `policy.Policy`'s of "auto"."""
        del workspace_mb
        return int(self.auto_mb * policy.MIB), False


@cache
def launches(
    work: Workload,
    workspace_mb: float = WORKSPACE_MB,
    architecture: str = "sm_90",
    grows: bool = False,
) -> tuple[list[Launch], list[Launch]]:
    """Of the forward and of the backward, in bfloat16 with the default network.

    Args:
        grows: the workspace does, as "auto", for an input which cannot do with it.

    Raises:
        ValueError: `gpl_fast.tools.workload.check_shape`, or it does not fit into the workspace.
    """
    if grows:
        known = policy.named(architecture)
        with policy.injected(_Growing(**vars(known), auto_mb=workspace_mb)) as name:
            return _walked(work, None, name)
    return _walked(work, workspace_mb, architecture)


def _walked(
    work: Workload, workspace_mb: float | None, architecture: str
) -> tuple[list[Launch], list[Launch]]:
    n, c, h, w = work.shape
    net = LossNet.vgg(c)
    check_shape(net, work.shape, work.kind)
    assert not isinstance(net.chain, str)
    x, target = torch.empty(work.shape, device="meta"), _target(work)
    call = Call(
        architecture, net.identity, net.chain, features=((net.layer_names[-1], 1.0),), styles=(),
        kind=work.kind, activation=work.activation, target_activation=work.activation,
        temperature=1.0, dtype=torch.bfloat16, workspace_mb=workspace_mb, tensors=tuple(target),
    )  # fmt: skip
    plan = Plan(call, n, h, w)
    layout = policy.named(architecture).layout(call, x.device)
    packs = weights.of(net.identity).packs(layout)
    recorder = Recorder()
    stages: Any = recorder
    g = torch.empty(4, n, device="meta")
    with recorder:
        terms, saved = Forward(plan, x, target, packs, True, stages=stages).run()
        terms.float()  # as the operator puts them out
        first, recorder.launches = recorder.launches, []
        Backward(plan, x, {}, packs, saved, g, stages=stages).run()
    return first, recorder.launches


class _Around(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees ATen's operators around the two of the walks, in whose place nothing is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gpl_fast.perceptual_fwd.default:
            return torch.zeros(4, len(args[0])), []
        if func is torch.ops.gpl_fast.perceptual_bwd.default:
            return torch.zeros_like(args[0])
        self.operators += [func.overloadpacket.__name__] * count_of(func)
        return func(*args, **(kwargs or {}))


@cache
def launches_around(kind: str = "dense") -> tuple[str, ...]:
    """ATen's operators that a whole loss and its backward launch around the two of the walks.

    Of a small call on the CPU, which asks for the same ones as a GPU's but for the looks at a
    target's values, which a GPU leaves out.

    Raises:
        BackendUnavailable: the fast path cannot run here.
    """
    loss = make_loss("fast-bf16", 3)
    x, target = make_inputs((2, 3, 32, 32), kind, "cpu")
    x.requires_grad_()
    with _Around() as around:
        loss(x, target).backward()
    return tuple(around.operators)


def count_line(work: Workload, inside: int) -> str:
    """How many launches a step has: inside the two operators, and around them where the fast path
    can run here."""
    try:
        return f"launches: {inside} inside, {len(launches_around(work.kind))} outside"
    except BackendUnavailable:
        return f"launches: {inside} inside"


def _target(work: Workload) -> dict[str, Tensor]:
    n, c, h, w = work.shape
    if work.kind == "dense":
        return {"dense": torch.empty(work.shape, device="meta")}
    if work.kind == "labels":
        return {"labels": torch.empty((n, h, w), dtype=torch.long, device="meta")}
    shape = (n, min(TOP, c), h, w)
    return {
        "topk_values": torch.empty(shape, device="meta"),
        "topk_indices": torch.empty(shape, dtype=torch.long, device="meta"),
    }
