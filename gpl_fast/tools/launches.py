"""FLOPs and bytes of every launch of a step on a GPU, counted without one.

The two walks of `gpl_fast.fast` run with their arguments on tensors without memory, and a recorder
in the place of the stages: neither a GPU nor Triton is needed. A launch is a stage, or an operator
of ATen's that neither views nor allocates. Bytes are those of each tensor once: halos, weights that
leave the cache and rows that other programs read again come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpl_fast.backend import BackendUnavailable
from gpl_fast.fast import policy
from gpl_fast.fast.backward import Backward
from gpl_fast.fast.call import Call
from gpl_fast.fast.forward import Forward
from gpl_fast.fast.plan import Plan
from gpl_fast.net import weights
from gpl_fast.net.lossnet import LossNet
from gpl_fast.stages import Listed
from gpl_fast.tiles import Tile
from gpl_fast.tools.workload import TOP, Workload, check_shape, make_inputs, make_loss
from gpl_fast.tools.workload import WORKLOADS as WORKLOADS

WORKSPACE_MB = 2048.0
SMALL = "other operators (ATen)"
GRADIENT = "data gradient (ATen)"
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
HOST = {"scalar_tensor"}  # a number of Python's, which a kernel takes as an argument


@dataclass
class Launch:
    """One kernel's work.

    Attributes:
        images, rows, columns: of its grid: of a convolution that of what comes before the pool.
        c_in, c_out, maps: of a convolution; the classes are `c_in`.
        operator: which one, of those that are `SMALL`.
    """

    name: str
    flops: float
    bytes: float
    images: int = 1
    rows: int = 1
    columns: int = 1
    c_in: int = 1
    c_out: int = 1
    maps: int = 1
    tile: Tile | None = None
    operator: str = ""


def is_launch(func: Any) -> bool:
    """Whether an operator runs a kernel: what views and what allocates does not."""
    packet = func.overloadpacket.__name__
    return not (func.is_view or packet in ALLOCATING | HOST or packet == "_unsafe_view")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands for the stages, and sees ATen's operators: collects both."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            x, w = args[:2]
            transposed = args[6]
            out = out.contiguous(memory_format=torch.channels_last)  # as cuDNN leaves it
            # Each weight meets each pixel of the side that is not spread.
            n, _, rows, columns = (x if transposed else out).shape
            name = GRADIENT if transposed else "convolution (ATen)"
            flops = 2.0 * n * rows * columns * w.numel()
            sizes = (n, rows, columns, out.shape[1], x.shape[1])
            self.launches.append(Launch(name, flops, _bytes((x, w, out)), *sizes))
        elif is_launch(func):
            packet = func.overloadpacket.__name__
            fills = packet.startswith("new_") or packet.endswith("_like")
            # What gathers reads of its source as much as it writes, what fills nothing.
            flat = tree_leaves(out if fills or packet == "index" else (args, kwargs, out))
            once = {id(t): t for t in flat if isinstance(t, Tensor)}.values()
            moved = _bytes(once) * (2 if packet == "index" else 1)
            self.launches.append(Launch(SMALL, 0.0, moved, operator=packet))
        return out

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A stage without arithmetic worth counting, on tensors of the rows that it touches."""
        if name.startswith("_") or not name.endswith(("_fwd", "_bwd")):
            raise AttributeError(name)
        return lambda first, **rest: self.launches.append(
            Launch(name, 0.0, _bytes((first, *rest.values())), len(first))
        )

    def carry_target_fwd(self, x: Tensor, *, step: tuple[int, int], **rest: Any) -> None:
        """As `gpl_fast.stages`: pixels of a grid, and what decides."""
        moved = _bytes((x, *rest.values())) / (step[0] * step[1])
        self.launches += [Launch("carry_target_fwd", 0.0, moved)] * 2

    def softmax_pack_fwd(self, x: Tensor, *, rows: int, target: Tensor | None, **rest: Any) -> None:
        """As `gpl_fast.stages`."""
        n, c, _, width = x.shape
        moved = _bytes((x, target, *rest.values()))
        maps = 1 if target is None else 2
        self.launches.append(Launch("softmax_pack_fwd", 0.0, moved, n, rows, width, c, maps=maps))

    def conv_block_fwd(
        self, a: Tensor, *, weight: Tensor, d: Tensor | None, target: Listed | None, **rest: Any
    ) -> Tensor | None:
        """As `gpl_fast.stages`."""
        n, height, width, _ = a.shape
        k, stride = rest["kernel_size"], rest["stride"]
        rows = (height + 2 * rest["pad_h"] - k) // stride + 1
        columns = (width + 2 * (k // 2) - k) // stride + 1
        branches = 1 if d is None else 2
        flops = 2.0 * branches * n * rows * columns * weight.numel()
        moved: float = _bytes((a, d, weight, *rest.values()))
        if target is not None:
            whole = (target.labels, target.values, target.indices, target.rest, target.valid)
            image_rows = next(t.shape[-2] for t in whole if t is not None)
            moved += _bytes((target.table, target.taken, target.interior, target.rest_table))
            moved += _bytes(whole) * min(1.0, height / image_rows)
        sizes = (n, rows, columns, a.shape[3], weight.shape[1], branches)
        self.launches.append(Launch("conv_block_fwd", flops, moved, *sizes, rest["tile"]))
        return a.new_empty((n, 1), dtype=torch.float32) if rest["reduce"] else None

    def relu_pool_bwd(
        self, dy: Tensor, *, code: Tensor, height: int, dz: Tensor, **_rest: int
    ) -> None:
        """As `gpl_fast.stages`: rows of whole maps."""
        moved = _bytes((dy, code)) * min(1.0, dz.shape[1] / height) + _bytes((dz,))
        self.launches.append(Launch("relu_pool_bwd", 0.0, moved, len(dy)))

    def softmax_bwd(self, x: Tensor, *, dy: Tensor, **rest: Any) -> None:
        """As `gpl_fast.stages`: rows of whole planes."""
        (n, c, height, width), rows = x.shape, dy.shape[1]
        moved = _bytes((x, *rest.values())) * min(1.0, rows / height) + _bytes((dy,))
        self.launches.append(Launch("softmax_bwd", 0.0, moved, n, rows, width, c))


def _bytes(arguments: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))


@cache
def launches(
    work: Workload, workspace_mb: float = WORKSPACE_MB, architecture: str = "sm_90"
) -> tuple[list[Launch], list[Launch]]:
    """Of the forward and of the backward, in bfloat16 with the default network.

    Raises:
        ValueError: `gpl_fast.tools.workload.check_shape`, or it does not fit into the workspace.
    """
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
        if is_launch(func):
            self.operators.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@cache
def launches_around(kind: str = "dense") -> tuple[str, ...]:
    """ATen's operators that a whole loss and its backward launch around the two of the walks.

    Of a small call on the CPU, which asks for the same ones as a GPU's: what looks at a target's
    values, which is left out there, is one operator.

    Raises:
        BackendUnavailable: the fast path cannot run here.
    """
    loss = make_loss("fast-bf16", 3)
    x, target = make_inputs((2, 3, 32, 32), kind, "cpu")
    x.requires_grad_()
    with _Around() as around:
        loss(x, target).backward()
    return tuple(around.operators)


def count_line(work: Workload, workspace_mb: float = WORKSPACE_MB) -> str:
    """How many launches a step has: inside the two operators, and around them where the fast path
    can run here."""
    inside = sum(map(len, launches(work, workspace_mb)))
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
