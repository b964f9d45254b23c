"""Weights are constants: behind a key, in no graph's saved tensors and in no program."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from cases import value_and_grad
from saved import fast_node, left_by
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss
from gpl_fast.fast.call import read
from gpl_fast.fast.geometry import Geometry
from gpl_fast.net import weights

N, C, H, W = 2, 5, 24, 40
SMALL = {"net": "1,1", "widths": (8, 8), "backend": "fast"}
X, T = torch.randn(2, N, C, H, W)
Y = torch.randint(0, C, (N, H, W))
MASK = torch.rand(N, H, W) > 0.2


def gpl(**words):
    return GenericPerceptualLoss(C, **SMALL, **words)


def total(**words):
    return SegmentationLoss(C, **SMALL, class_weight=[1, 2, 3, 4, 5], temperature=2.0, **words)


def johnson():
    net = LossNet.vgg(C, (1, 1), (8, 8))
    return PerceptualLoss(net, {"relu2_1": 1.0}, {"relu1_1": 1.0}, backend="fast")


# A loss, what it is called with, and what is kept of that besides the prediction.
VALID, LABELS = ((N, H, W), torch.bool), ((N, H, W), torch.int16)
CASES = {
    "labels": (gpl, (Y,), []),
    "mask": (gpl, (T, MASK), [VALID]),
    "avg": (lambda: gpl(pool="avg", level_weights=(1, 2)), (Y,), []),
    "bfloat16": (lambda: gpl(compute_dtype=torch.bfloat16), (T,), []),
    "total": (total, (Y,), [VALID, LABELS, ((C,), torch.float32)]),
    "total, teacher": (total, (Y, T), [LABELS, ((C,), torch.float32)]),
    "johnson": (johnson, (T,), []),
}


def as_called(loss, way: str):
    return loss if way == "eager" else torch.compile(loss, fullgraph=True, backend="aot_eager")


def contract(loss, *args):
    """Shapes and dtypes of what the forward leaves, and who it is for."""
    value = loss(X.clone().requires_grad_(), *args)
    return list(Geometry(read(fast_node(value).call), N, H, W).saved().values())


@pytest.fixture(params=["eager", "compiled"])
def way(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_hooks_see_the_contract_and_numbers_of_images(name, way):
    make, args, besides = CASES[name]
    loss, kept, x = make(), [], X.clone().requires_grad_()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = as_called(loss, way)(x, *args)
    assert value.requires_grad
    assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in loss.net.cached_tensors()}
    seen = [
        (tuple(t.shape), t.dtype) for t in kept if t.numel() > N and t.data_ptr() != x.data_ptr()
    ]
    assert sorted(map(str, seen)) == sorted(map(str, [*contract(loss, *args), *besides]))


def test_the_default_network_passes_few_bytes_through_hooks(way):
    """15 MiB of weights belong to it."""
    loss, kept = GenericPerceptualLoss(3, backend="fast"), []
    x, y = torch.randn(1, 3, 32, 32, requires_grad=True), torch.randint(0, 3, (1, 32, 32))
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        as_called(loss, way)(x, y)
    assert sum(t.nbytes for t in kept if t.data_ptr() != x.data_ptr()) <= 0.08 * 2**20
    assert sum(t.nbytes for t in loss.net.cached_tensors()) > 14 * 2**20


def contiguous(t):
    return t.clone(memory_format=torch.contiguous_format)


def channels_last(t):
    return t.clone(memory_format=torch.channels_last) if t.dim() == 4 else t.clone()


def reversed_dimensions(t):
    order = tuple(range(t.dim() - 1, -1, -1))
    return t.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("name", CASES)
def test_hooks_may_change_strides(name, way):
    make, args, _ = CASES[name]
    loss, x = make(), X.clone().requires_grad_()
    call = as_called(loss, way)
    _, want = value_and_grad(loss, X, *args)
    hooks = [save_on_cpu(pin_memory=False)]
    for change in (contiguous, channels_last, reversed_dimensions):
        hooks += [
            saved_tensors_hooks(change, lambda t: t),
            saved_tensors_hooks(lambda t: t, change),
        ]
    for hook in hooks:
        with hook:
            value = call(x, *args)
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], want, rtol=0, atol=0)


# ---------------------------------------------------------------------------------- who has them


def packs_of(loss):
    loss(X, Y)
    return weights.of(loss.net.identity)._packs


def test_losses_of_one_structure_and_seed_have_one():
    a, b, other = gpl(seed=41), gpl(seed=41), gpl(seed=42)
    assert packs_of(a) is packs_of(b)
    assert packs_of(a) is not packs_of(other)
    assert len(packs_of(a)) == 1


def test_compiled_losses_of_two_seeds_keep_their_own():
    losses = [gpl(seed=seed) for seed in (43, 44)]
    step = torch.compile(lambda x: sum(loss(x, Y) for loss in losses), fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    alone = [as_called(loss, "compiled") for loss in losses]
    wants = [value_and_grad(loss, X, Y) for loss in losses]
    assert not torch.equal(wants[0][1], wants[1][1])
    for call, want in zip((*alone, *reversed(alone)), (*wants, *reversed(wants)), strict=True):
        for a, b in zip(value_and_grad(call, X, Y), want, strict=True):
            assert torch.equal(a, b)
    value, grad = value_and_grad(step, X)
    torch.testing.assert_close(value, wants[0][0] + wants[1][0])
    torch.testing.assert_close(grad, wants[0][1] + wants[1][1])


def test_a_backward_keeps_the_network_of_its_forward():
    x = X.clone().requires_grad_()
    want = value_and_grad(gpl(seed=45), X, Y)[1]
    loss = gpl(seed=45)
    key, value = loss.net.identity, loss(x, Y)
    held = weakref.ref(weights.of(key))
    del loss
    gc.collect()
    assert torch.equal(torch.autograd.grad(value, x)[0], want)
    del value
    gc.collect()
    assert held() is None


def test_a_compiled_backward_says_that_its_network_is_gone():
    loss, x = gpl(seed=46), X.clone().requires_grad_()
    value = as_called(loss, "compiled")(x, Y)
    del loss
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"build the loss that it was made of.*and keep it"):
        torch.autograd.grad(value, x, retain_graph=True)
    again = gpl(seed=46)
    want = value_and_grad(again, X, Y)[1]
    assert torch.equal(torch.autograd.grad(value, x)[0], want)


def test_no_fake_tensor_is_kept():
    loss = gpl(seed=47)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss(mode.from_tensor(X), mode.from_tensor(T))
    assert not loss.net.cached_tensors()
    planned, _ = left_by(loss(X.clone().requires_grad_(), T))
    assert planned.call.network == loss.net.identity
    assert all(type(t) is torch.Tensor for t in loss.net.cached_tensors())


# ----------------------------------------------------------------------------- exported programs


class Model(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.head, self.loss = nn.Conv2d(3, C, 1), loss

    def forward(self, image, labels):
        return self.loss(self.head(image), labels)


LOADED = """
import sys, torch
import gpl_fast
gpl_fast.GenericPerceptualLoss  # the operators
program = torch.export.load(sys.argv[1]).module()
image, labels, want = torch.load(sys.argv[2])
try:
    program(image, labels)
except RuntimeError as error:
    print(error)
loss = gpl_fast.GenericPerceptualLoss(5, net="1,1", widths=(8, 8), backend="fast", seed=48)
torch.testing.assert_close(program(image, labels), want)
"""


def test_a_program_finds_the_weights_of_its_process(tmp_path):
    model, image = Model(gpl(seed=48)), torch.randn(N, 3, H, W)
    with torch.no_grad():
        want = model(image, Y)
        program = torch.export.export(model, (image, Y))
        assert torch.equal(program.module()(image, Y), want)
    held = {t.data_ptr() for t in model.loss.net.cached_tensors()}
    inside = (*program.state_dict.values(), *program.constants.values())
    assert not held & {t.data_ptr() for t in inside if isinstance(t, torch.Tensor)}
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((image, Y, want), tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "program.pt2", tmp_path / "data.pt"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is not in this process" in done.stdout
    assert "build the loss that it was made of before it runs" in done.stdout
    assert "LossNet.load" in done.stdout
