"""The backward walk over the CUDA operators: the whole network, every layer by `conv_block_bwd`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ATOL, NARROW, error, make_target
from policies import decided
from saved import fast_node, left_by
from torch import nn

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, ops
from gpl_fast.fast import operator
from gpl_fast.fast.backward import Backward
from gpl_fast.fast.plan import Plan

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
TF32 = {FLOAT: 2e-3}  # the kernel's; ATen's on the CPU is float32
C, SIZE = 11, (21, 26)


def chain_of_modules(pool):
    sequential = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 10, 5, padding=2), nn.ReLU(),
        pool, nn.Conv2d(10, 9, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    return LossNet.from_sequential(sequential, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def generic(**options):
    return GenericPerceptualLoss(C, widths=NARROW, **options)


def family(features, styles=()):
    return PerceptualLoss(LossNet.vgg(C, (2, 2), widths=NARROW), features, dict(styles))


# (loss, target, rows of a strip, layers that ATen has to do: a tap is inside the step)
LOSSES = {
    "three blocks": (lambda: generic(net="1,1,1"), "dense", None, ""),
    "levels, labels": (lambda: generic(net="1,1", level_weights=(0.5, 1.0)), "labels", None, ""),
    "several convolutions": (lambda: generic(net="2,3"), "dense", None, ""),
    "strips": (lambda: generic(net="2,3", kernel_size=5), "dense", 4, ""),
    "average pools, strips": (lambda: generic(net="2,1", pool="avg"), "dense", 4, ""),
    "stride 2": (lambda: generic(net="1,2", pool="stride"), "dense", None, ""),
    "stride 2, levels": (
        lambda: generic(net="2,1", pool="stride", level_weights=(1.0, 0.5)), "dense", 4, ""),
    "7 x 7": (lambda: generic(net="1", kernel_size=7, temperature=2.0), "dense", None, ""),
    "sigmoid": (lambda: generic(net="1,1", activation="sigmoid"), "dense", None, ""),
    "stored features": (lambda: generic(net="1,1", reduction="sum"), "features", None, ""),
    "total": (lambda: SegmentationLoss(C, net="1,1", widths=NARROW), "labels", None, ""),
    "total, no activation": (
        lambda: SegmentationLoss(C, net="2,1", widths=NARROW, activation="none", temperature=2.0,
                                 label_smoothing=0.1, class_weight=torch.rand(C)),
        "labels", 4, ""),
    "taps at outputs": (
        lambda: family({"relu1_1": 1.0, "pool1": 1.0, "relu2_1": 2.0}, {"relu1_1": 1.0}),
        "dense", 4, ""),
    "taps inside": (
        lambda: family({"conv1_1": 1.0, "relu1_2": 0.5, "conv2_2": 1.0}),
        "dense", None, "conv1_1 conv1_2"),
    "taps inside, strips": (
        lambda: family({"conv1_2": 1.0, "relu2_2": 0.5, "pool2": 1.0}),
        "dense", 4, "conv1_2 conv2_2"),
    "mean, std, biases": (
        lambda: PerceptualLoss(chain_of_modules(nn.MaxPool2d(2)), {"relu2_1": 1.0, "pool1": 0.1}),
        "image", 4, ""),
    "adapter": (
        lambda: GenericPerceptualLoss(
            C, chain_of_modules(nn.AvgPool2d(2)).with_input_adapter(C)),
        "dense", 4, ""),
}  # fmt: skip


class Recorder:
    """Stages that note whose weights `conv_block_bwd` reads."""

    def __init__(self, stages, names):
        self.stages, self.names, self.kernels = stages, names, set()

    def __getattr__(self, name):
        stage = getattr(self.stages, name)

        def run(first, **rest):
            if name.startswith("conv_block"):
                self.kernels.add(self.names[rest["w"].data_ptr()])
            return stage(first, **rest)

        return run


def called(value):
    """The node's call, its prediction, what it kept of the target, and what it saved."""
    node, (plan, saved) = fast_node(value), left_by(value)
    x, *rest = node.saved_tensors
    kept = dict(zip(plan.call.kept, rest, strict=False))
    return plan, x, plan.call.with_mask(kept) if plan.call.weighed else kept, saved


def by_aten(plan, x, kept, saved, g, dtype=None):
    """The same backward, ATen's data gradients; in another dtype from the same rounded numbers."""
    with decided(kernels=False, backward="compiled") as name:
        call = replace(plan.call, policy=name)
        packs = operator._packs(call, x)
        if dtype is not None:
            call = replace(call, dtype=dtype)
            packs, saved = ({k: wider(t) for k, t in d.items()} for d in (packs, saved))
        return Backward(Plan(call, plan.n, plan.h, plan.w), x, kept, packs, saved, g).run()


def wider(t):
    return t.float() if t.dtype in (BF16, HALF) else t


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("name", LOSSES)
def test_as_atens_data_gradient(emulated, name, dtype, decide, monkeypatch):
    make, kind, rows, atens = LOSSES[name]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loss = make()
    inner = getattr(loss, "gpl", loss)
    inner.options = replace(inner.options, backend="fast", compute_dtype=dtype)
    names = {}
    stages = Recorder(emulated, names)
    decide(kernels=True, rows=rows, backward="emulated", stages={"emulated": stages})
    shape = (2, 3 if kind == "image" else C, *SIZE)
    target = make_target("dense" if kind == "image" else kind, shape, loss)
    x = (2 * torch.randn(shape)).requires_grad_()
    value = loss(x, target)
    plan, *saved = called(value)
    packs = operator._packs(plan.call, x)
    names.update({packs[f"bwd.{s.conv}"].data_ptr(): s.conv for s in plan.steps})

    incoming = []
    fast_node(value).register_prehook(lambda grads: incoming.extend(grads))
    (got,) = torch.autograd.grad(value.sum(), x)
    every = {step.conv for step in plan.steps}
    assert stages.kernels == every - set(atens.split())
    assert {s.conv for s, how in zip(plan.steps, plan.how, strict=True) if how.block_bwd} == (
        stages.kernels
    )
    plain = by_aten(plan, *saved, *incoming)
    truth = by_aten(plan, *saved, *incoming, dtype=FLOAT)
    assert error(got, truth) <= 2 * error(plain, truth) + (ATOL | TF32)[dtype]


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features", "teacher"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("option", ["weights-cuda"])
def test_weights_of_pixels(emulated, option, dtype, kind, decide):
    loss = SegmentationLoss(C, net="2,1", widths=NARROW, label_smoothing=0.1)
    loss = loss if kind == "teacher" else generic(net="2,1")
    inner = getattr(loss, "gpl", loss)
    inner.options = replace(inner.options, backend="fast", compute_dtype=dtype)
    decide(kernels=True, backward="emulated", stages={"emulated": emulated})
    shape = (2, C, *SIZE)
    m = (3 * torch.rand(2, *SIZE) - 0.5).clamp(min=0)
    target = make_target("dense" if kind in ("features", "teacher") else kind, shape)
    given = [loss.encode(target, m)] if kind == "features" else [target, m]
    if kind == "teacher":
        given = [torch.randint(C, (2, *SIZE)), *given]
    x = (2 * torch.randn(shape)).requires_grad_()
    x.data[(m == 0).unsqueeze(1).expand_as(x)] = float("nan")
    value = loss(x, *given)
    plan, *saved = called(value)
    assert any(how.block_bwd for how in plan.how)
    incoming = []
    fast_node(value).register_prehook(lambda grads: incoming.extend(grads))
    (got,) = torch.autograd.grad(value.sum(), x)
    assert not got[(m == 0).unsqueeze(1).expand_as(x)].any()
    plain = by_aten(plan, *saved, *incoming)
    truth = by_aten(plan, *saved, *incoming, dtype=FLOAT)
    assert error(got, truth) <= 2 * error(plain, truth) + (ATOL | TF32)[dtype]
