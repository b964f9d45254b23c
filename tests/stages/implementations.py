"""Who computes a stage: the CPU's operators, Triton's kernels interpreted, CUDA's kernels on the
CPU, or a GPU. Each takes CPU tensors, `stages.<name>(first, keyword=...)`, and writes into them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import emulate
import operators
import torch
from definitions import same_bits
from torch import Tensor
from transport import on_device

from gpl_fast import ops

ELEMENTWISE = ("relu_bwd", "relu_pool_bwd", "softmax_bwd", "binary_ce_bwd")
BLOCKS = ("conv_block_bwd", "conv_block_logits_bwd")
STAGES = (
    "softmax_pack_fwd", "label_conv_fwd", "topk_conv_fwd", "relu_fwd", "relu_diff_fwd",
    "relu_pool_fwd", "relu_pool_diff_fwd", "diff_reduce_fwd", "unit_diff_fwd", "binary_ce_fwd",
    *ELEMENTWISE,
)  # fmt: skip
CPU_ALONE = ("winograd_weight", "winograd", "direct_weight", "direct_conv")
OF_TRITON = (*STAGES, "conv_block_fwd", "carry_target_fwd")
OF_CUDA = (*ELEMENTWISE, *BLOCKS)
# By stages that are Triton's alone.
WRITTEN = {"conv_block_fwd": {"y", "delta", "code"}, "carry_target_fwd": {"from_target"}}

Order = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Implementation:
    """`stages.<name>` is a stage; `orders` are orders of its threads or programs, by name."""

    name: str
    has: frozenset[str]
    find: Callable[[str], Callable[..., Any]] = field(repr=False)
    orders: Mapping[str, Order] = field(default_factory=dict, repr=False)
    playing: Order = field(default=contextlib.nullcontext, repr=False)  # what it needs set up
    device: torch.device | None = None

    def __getattr__(self, stage: str) -> Callable[..., Any]:
        if stage not in self.has:
            raise AttributeError(f"{self.name} has no {stage}")
        run, written = self.find(stage), outputs(stage)

        def call(first: Tensor, **options: Any) -> Any:
            given = tensors({"": first, **options})
            outs = {t.untyped_storage().data_ptr() for name, t in given if name in written}
            read = [t for _, t in given if not (t.untyped_storage().data_ptr() in outs or vast(t))]
            before = [t.clone() for t in read]
            if self.device is None:
                result = run(first, **options)
            else:
                result = on_device(self.device, run, first, **options)
            assert all(map(same_bits, read, before)), f"{stage} wrote an input"
            return result

        return call


def outputs(stage: str) -> set[str]:
    """The names of the arguments that a stage writes."""
    if stage in WRITTEN:
        return WRITTEN[stage]
    arguments = getattr(ops, stage)._schema.arguments
    return {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}


def vast(t: Tensor) -> bool:
    """Too large to keep a copy of: files with holes, in the tests of large offsets."""
    return max(t.untyped_storage().nbytes(), t.numel() * t.itemsize) > 2**28


def tensors(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """By name, those inside of a list of arguments by the list's."""
    found = []
    for name, value in arguments.items():
        inner = vars(value).values() if is_dataclass(value) else (value,)
        found += [(name, t) for t in inner if isinstance(t, Tensor)]
    return found


# ------------------------------------------------------------------------------------ on the CPU


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(stage: str) -> Callable[..., Any]:
    return getattr(ops, stage)


def cpu() -> list[Implementation]:
    orders = {f"{n} threads": lambda n=n: threads(n) for n in (1, 2, 3)}
    return [Implementation("cpu", frozenset(STAGES + CPU_ALONE), compiled, orders)]


def launchers(stage: str) -> Callable[..., Any]:
    from gpl_fast import kernels

    return getattr(kernels, stage)


def triton() -> list[Implementation]:
    import program_order as programs

    orders = {o.__name__: lambda o=o: programs.program_order(o) for o in programs.ORDERS}
    return [Implementation("triton", frozenset(OF_TRITON), launchers, orders)]


@contextlib.contextmanager
def variable(name: str, value: object) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def cuda_on_cpu() -> list[Implementation]:
    """Of the kernels of a convolution's block there are two, by the GPU."""

    def find(stage: str) -> Callable[..., Any]:
        return getattr(operators.load().operators, stage).default

    def playing(capability: int) -> Order:
        return lambda: contextlib.nullcontext(operators.load().play(capability))

    # Of threads and blocks: forward, reverse, three random ones.
    orders = {f"order {n}": lambda n=n: variable("CUDACPU_ORDER", n) for n in range(5)}
    return [
        Implementation("cuda", frozenset(ELEMENTWISE), find, orders),
        *(
            Implementation(f"cuda-{c}", frozenset(OF_CUDA), find, orders, playing(c))
            for c in (80, 90)
        ),
    ]


# ------------------------------------------------------------------------------------- on a GPU


def gpu() -> list[Implementation]:
    """GPL_FAST_TEST_DEVICE=cpu: what stands for it where there is none, to prove the tests."""
    device = torch.device(os.environ.get("GPL_FAST_TEST_DEVICE", "cuda"))
    if device.type != "cuda":
        others = cpu() if emulate.missing() else cuda_on_cpu()
        return [replace(one, name=f"gpu-{one.name}", device=device) for one in others]
    orders = {f"run {n}": contextlib.nullcontext for n in range(20)}
    found = [Implementation("gpu-triton", frozenset(OF_TRITON), launchers, orders, device=device)]
    if ops.cuda_obstacle(device) is None:
        found.append(
            Implementation("gpu-cuda", frozenset(ELEMENTWISE), compiled, orders, device=device)
        )
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        for capability in (80, 90) if hopper else (80,):
            way = lambda c=capability: variable("GPL_FAST_SM90A", int(c == 90))  # noqa: E731
            name = f"gpu-cuda-{capability}"
            found.append(Implementation(name, frozenset(OF_CUDA), compiled, orders, way, device))
    return found


MAKERS = {"cpu": cpu, "triton": triton, "cuda": cuda_on_cpu, "gpu": gpu}


def offered(kind: str, needed: set[str]) -> list[Implementation]:
    """Those of a kind that have every stage needed; the block's two kernels only where one is."""
    found = [i for i in MAKERS[kind]() if needed <= i.has]
    plain = [i for i in found if not i.has >= set(BLOCKS)]
    return plain or found
