"""The backward walk over the CUDA operators: the whole network, every layer by `conv_block_bwd`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ATOL, NARROW, error, make_target
from torch import nn

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, chain, ops
from gpl_fast import plan as plans
from gpl_fast.chain import backward, data_gradient
from gpl_fast.plan import Plan

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


class ByKernel(chain.Backward):
    """Records which layers the kernel does."""

    def _is_block(self, step):
        found = super()._is_block(step)
        (self.kernels if found else self.atens).add(step.conv)
        return found


class ByATen(chain.Backward):
    def _is_block(self, step):
        return False


def in_float32(plan, x, target, packs, saved, g):
    """The same call from the same rounded numbers, computed in float32."""
    spec = replace(plan.spec, dtype="float32")
    wider = ({k: t.float() if t.dtype in (BF16, HALF) else t for k, t in d.items()}
             for d in (packs, saved))  # fmt: skip
    return Plan(spec, plan.n, plan.h, plan.w), x, target, *wider, g


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("name", LOSSES)
def test_as_atens_data_gradient(emulated, name, dtype, monkeypatch):
    make, kind, rows, atens = LOSSES[name]
    if rows is not None:
        monkeypatch.setattr(plans, "PREFERRED_STRIP_BYTES", 1)
        monkeypatch.setattr(plans, "PREFERRED_ROWS", rows)
    monkeypatch.setattr(data_gradient, "by_kernel", lambda *layer: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loss = make()
    inner = getattr(loss, "gpl", loss)
    inner.options = replace(inner.options, backend="fast", compute_dtype=dtype)
    shape = (2, 3 if kind == "image" else C, *SIZE)
    target = make_target("dense" if kind == "image" else kind, shape, loss)
    x = (2 * torch.randn(shape)).requires_grad_()
    value = loss(x, target)

    calls = []
    monkeypatch.setattr(chain, "Backward", lambda *call: calls.append(call) or ByATen(*call))
    torch.autograd.grad(value.sum(), x)
    (call,) = calls
    plain, truth = ByATen(*call).run(), ByATen(*in_float32(*call)).run()
    monkeypatch.setattr(backward, "backward_stages_on", lambda device: emulated)
    walk = ByKernel(*call)
    walk.kernels, walk.atens = set(), set()
    got = walk.run()
    assert walk.atens == set(atens.split())
    assert walk.kernels == {step.conv for step in call[0].steps} - walk.atens
    assert error(got, truth) <= 2 * error(plain, truth) + (ATOL | TF32)[dtype]
