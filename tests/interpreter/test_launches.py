"""Both walks on fake CUDA tensors: what would be launched on a GPU, on which memory.

A fake tensor has no values: whoever asked for one, which on a GPU waits for the device, would fail.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from cases import call_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gpl_fast import LossNet
from gpl_fast.fast import policy
from gpl_fast.fast.backward import Backward
from gpl_fast.fast.forward import Forward
from gpl_fast.fast.plan import Plan
from gpl_fast.kernels import conv_block, launch

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# The functions of the same names stand before some of these modules.
STAGES = [
    importlib.import_module(f"gpl_fast.kernels.{name}")
    for name in (
        "branch",
        "diff_reduce",
        "label_conv",
        "relu",
        "relu_pool",
        "softmax_bwd",
        "softmax_pack",
        "unit_diff",
    )
]
BLOCK, PACK = "_conv_block_fwd_kernel", "_softmax_pack_fwd_kernel"
LOOK = ("_look_kernel", "_decide_kernel")  # which branch is carried


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    args: dict[str, Any]  # by the names of the kernel's parameters
    meta: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves(tuple(self.args.values())) if isinstance(t, Tensor)]


@pytest.fixture
def launches(monkeypatch):
    """Fills with what would have been launched."""
    found: list[Launch] = []

    def launch(kernel, grid, *args, **meta):
        named = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=False))
        found.append(Launch(kernel.fn.__name__, tuple(grid), named, meta))

    for stage in (conv_block, *STAGES):
        monkeypatch.setattr(stage, "launch", launch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return found


CUDA, SM_90 = torch.device("cuda", 0), "sm_90"
ATEN = torch.ops.aten


class WithoutGuards(TorchFunctionMode):
    """Some methods by their operators: in a CPU build of torch the methods' own device guards fail
    before a fake tensor is asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return self.view(*args)
        if func is Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            view, value = self.view(*args[:2]), args[2]
            if isinstance(value, Tensor):
                return ATEN.copy_.default(view, value)
            return ATEN.fill_.Scalar(view, value)
        if func is Tensor.contiguous:
            layout = (kwargs or {}).get("memory_format", torch.contiguous_format)
            t = args[0]
            if t.is_contiguous(memory_format=layout):
                return t
            return ATEN.clone.default(t, memory_format=layout)
        if func is Tensor.data_ptr:  # which memory it is, as it is asked for
            t = args[0]
            return t.untyped_storage()._cdata + t.storage_offset() * t.element_size()
        return func(*args, **(kwargs or {}))

    def view(self, t: Tensor, index) -> Tensor:
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
            at = next(k for k, i in enumerate(index) if i is Ellipsis)
            index[at : at + 1] = [slice(None)] * (t.dim() - len(index) + 1)
        dim, by_tensors = 0, []
        for i in index:
            if isinstance(i, int):
                t = ATEN.select.int(t, dim, i)
                continue
            if isinstance(i, slice):
                t = ATEN.slice.Tensor(t, dim, i.start, i.stop, i.step or 1)
            by_tensors.append(i if isinstance(i, Tensor) else None)
            dim += 1
        if any(i is not None for i in by_tensors):
            t = ATEN.index.Tensor(t, by_tensors)
        return t


def target_tensors(kind: str, shape, dtype: torch.dtype, p: Plan) -> dict[str, Tensor]:
    n, _, h, w = shape
    make = functools.partial(torch.empty, device=CUDA)
    if kind == "dense":
        return {"dense": make(shape)}
    if kind == "labels":
        return {"labels": make(n, h, w, dtype=torch.int64)}
    if kind == "topk":
        return {
            "topk_values": make(n, 3, h, w),
            "topk_indices": make(n, 3, h, w, dtype=torch.int64),
            "topk_rest": make(n, h, w),
        }
    return {f"feature.{t}": make(p.tap_shape(t), dtype=dtype) for t in p.call.taps}


def walks(
    kind: str, shape, *, dtype: torch.dtype = BF16, pred: torch.dtype = FLOAT,
    pool: str = "max", blocks=(1, 1), workspace_mb: float = 64.0, masked: bool = False,
    channels_last: bool = False,
):  # fmt: skip
    """(plan, terms, saved, gradient) of a forward and a backward."""
    net = LossNet.vgg(shape[1], blocks, widths=(64, 128), pool=pool)
    call = call_of(net, kind=kind, dtype=dtype, workspace_mb=workspace_mb, policy=SM_90)
    p = Plan(call, shape[0], *shape[2:])
    made = net.packs(policy.named(SM_90).layout(call, torch.device("cpu")))  # but still here
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with FakeTensorMode(), WithoutGuards():
        packs = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)
            for name, t in made.items()
        }
        x = torch.empty(shape, dtype=pred, device=CUDA, memory_format=layout)
        target = target_tensors(kind, shape, dtype, p)
        if masked:
            target["valid"] = torch.empty(shape[0], *shape[2:], dtype=torch.bool, device=CUDA)
        terms, saved = Forward(p, x, target, packs, keep=True).run()
        g = torch.empty(4, shape[0], device=CUDA)
        kept = {k: target[k] for k in ("valid",) if k in target}
        stages = policy.implementation(SM_90, "forward")  # the compiled ones take no fakes
        return p, terms, saved, Backward(p, x, kept, packs, saved, g, stages).run()


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("dtype", [BF16, HALF, FLOAT])
@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
def test_shapes_dtypes_and_devices(kind, dtype, pool, launches):
    pred = FLOAT if dtype == BF16 else dtype
    shape = (2, 19, 37, 51)
    p, terms, saved, dx = walks(
        kind, shape, dtype=dtype, pred=pred, pool=pool, channels_last=dtype == HALF
    )
    assert (terms.shape, terms.dtype, terms.device) == ((4, 2), torch.float64, CUDA)
    assert {k: (tuple(t.shape), t.dtype) for k, t in saved.items()} == p.saved()
    assert (dx.shape, dx.dtype, dx.device) == (shape, pred, CUDA)
    assert dx.is_contiguous(memory_format=torch.channels_last) == (dtype == HALF)
    assert all(t.device == CUDA for launch in launches for t in launch.tensors)
    assert all(t.device == CUDA for t in saved.values())
    assert all(1 <= size <= 65535 for launch in launches for size in launch.grid[1:])

    kernels = [launch.kernel for launch in launches]
    if dtype != FLOAT and kind != "features":
        assert (kernels.pop(0), kernels.pop(0)) == LOOK
    assert kernels[0] == PACK
    assert kernels.count(BLOCK) == len(p.steps)
    assert kernels[-1] == "_softmax_bwd_kernel"
    forms = [launch.meta["FORM"] for launch in launches if launch.kernel == BLOCK]
    first, rest = ("plain", "plain") if kind == "features" else (kind, "diff")
    first = "diff" if kind == "dense" else first
    assert forms == [first] + [rest] * (len(forms) - 1)
    # Nothing of the last block but its difference, and its sum from the block itself.
    if kind != "features" and pool != "stride":
        last = [launch for launch in launches if launch.kernel == BLOCK][-1]
        assert last.args["y_ptr"] is None
        assert "_diff_reduce_fwd_kernel" not in kernels


def test_descriptors_where_the_table_and_the_channels_allow_them(launches):
    walks("dense", (1, 19, 32, 32), blocks=(1, 1), pool="stride")
    blocks = {
        (launch.meta["STRIDE"], launch.meta["DESCRIPTORS"])
        for launch in launches
        if launch.kernel == BLOCK
    }
    assert blocks == {(1, True), (2, False)}


@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_the_first_layer_is_read_by_descriptors(kind, launches):
    walks(kind, (1, 19, 32, 32), blocks=(1, 1))
    blocks = [launch.meta["DESCRIPTORS"] for launch in launches if launch.kernel == BLOCK]
    assert blocks == [True, True]


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
def test_what_a_form_does_not_need_is_not_passed(kind, launches):
    """None is a constant of the kernel; a tensor is asked for its address at each launch."""
    walks(kind, (1, 19, 32, 32), blocks=(1, 1))
    first = next(launch for launch in launches if launch.kernel == BLOCK)
    given = {name for name, value in first.args.items() if value is not None}
    always = {"a_ptr", "weight_ptr", "y_ptr", "a_size", "place", "y_rows"}
    both = {"from_target_ptr", "delta_ptr", "delta_rows", "code_ptr", "code_rows"}
    assert given - {"partial_ptr", "bias_ptr"} == always | {
        "dense": both | {"d_ptr", "d_rows", "a_rows"}, "labels": both | {"list_ptrs"},
        "topk": both | {"list_ptrs"}, "features": {"a_rows", "code_ptr", "code_rows"},
    }[kind]  # fmt: skip
    missing = {"labels": {1, 2, 3}, "topk": {3}}.get(kind)
    if missing is not None:
        assert {i for i, t in enumerate(first.args["list_ptrs"]) if t is None} == missing
    assert len(first.tensors) + 7 <= 20


def test_true_float32_is_atens(launches, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    walks("labels", (1, 19, 32, 32), dtype=FLOAT)
    kernels = [launch.kernel for launch in launches]
    assert BLOCK not in kernels
    assert kernels.count("_label_conv_fwd_kernel") == 1
    assert kernels.count("_relu_pool_fwd_kernel") == 2


@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_chunks_of_images_and_of_rows(kind, launches):
    shape = (3, 150, 128, 128)
    p, *_ = walks(kind, shape, workspace_mb=20.0 if kind == "dense" else 14.0)
    assert p.images[0] == 1
    assert p.rows[0] == 128
    whole = [launch for launch in launches if launch.kernel == PACK]
    assert len(whole) == 3
    assert all(launch.grid == (128 * 4, 1) for launch in whole)  # by 32 columns
    launches.clear()
    p, _, _, dx = walks(kind, shape, workspace_mb=7.0, masked=True)
    assert p.rows[0] < 128
    strips = [launch for launch in launches if launch.kernel == PACK]
    assert len(strips) == 3 * -(-128 // p.rows[0])
    assert dx.shape == shape


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_no_images_launch_nothing(kind, pool, launches):
    p, terms, saved, dx = walks(kind, (0, 19, 37, 51), pool=pool)
    assert not launches
    assert terms.shape == (4, 0)
    assert {k: (tuple(t.shape), t.dtype) for k, t in saved.items()} == p.saved()
    assert dx.shape == (0, 19, 37, 51)


@pytest.mark.parametrize("descriptors", [False, True])
def test_the_allocator_is_pytorchs_for_the_launch_alone(descriptors, monkeypatch):
    """Where there are descriptors to put into memory; the caller may have set one for kernels of
    its own."""
    allocator = importlib.import_module("triton.runtime._allocation")._allocator
    seen, entered = [], []

    @contextlib.contextmanager
    def device(of):
        entered.append(of)
        yield

    def kernel(*args, **meta):
        seen.append((allocator.get(), args, meta))

    def mine(size, alignment, stream):
        raise AssertionError("asked the caller's")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = SimpleNamespace(device=CUDA)
    meta = {"BLOCK": 8, "DESCRIPTORS": descriptors}
    before = allocator.get()
    triton.set_allocator(mine)
    try:
        launch.launch({(4, 2): kernel}, [4, 2], x, 5, **meta)
        assert allocator.get() is mine
    finally:
        triton.set_allocator(before)
    assert seen == [(launch._allocate if descriptors else mine, (x, 5), meta)]
    assert entered == [CUDA]


@pytest.mark.parametrize("newer", [False, True])
def test_either_switch_of_pytorch_says_tf32(newer, launches):
    """Reading the older one raises where the newer one was set."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    for on in (False, True):
        if newer:
            cudnn.conv.fp32_precision = "tf32" if on else "ieee"
        else:
            cudnn.allow_tf32 = on
        launches.clear()
        walks("dense", (1, 19, 32, 32), dtype=FLOAT)
        assert (BLOCK in [launch.kernel for launch in launches]) == on
    cudnn.conv.fp32_precision = before
