"""BatchNorm2d behind a convolution is part of it: value and gradient are those of eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gpl_fast import LossNet, PerceptualLoss


def trained(module: nn.Module) -> nn.Module:
    """As after some training: statistics and affine parts that are not the initial ones."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            if m.affine:
                m.weight.data.normal_(1, 0.5)
                m.bias.data.normal_()
    return module


def vgg_bn(bias=True, **norm):
    """torchvision's vgg…_bn: Conv2d, BatchNorm2d, ReLU(inplace), pools between them."""
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6, **norm), nn.ReLU(True),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9, **norm)), nn.ReLU(True),
            nn.Conv2d(9, 8, 3, padding=1), nn.ReLU(True),
            nn.MaxPool2d(2),
        )
    )  # fmt: skip


TAPS = {"conv1_1": "1", "relu1_1": "2", "relu2_1": "5", "pool2": "8"}
KINDS = {
    "as torchvision's": {},
    "no bias": {"bias": False},
    "not affine": {"affine": False},
    "another eps": {"eps": 0.1},
}


def of_module(module, x):
    """What each tap returns in eval mode, in float64."""
    wide, found = copy.deepcopy(module).double().eval(), {}
    for i, m in enumerate(wide):
        x = m(x)
        found[str(i)] = x.clone()
    return {name: found[position] for name, position in TAPS.items()}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_modules(kind, mode):
    module = getattr(vgg_bn(**KINDS[kind]), mode)()
    net = LossNet.from_sequential(module)
    assert module.training == (mode == "train")
    x = torch.rand(2, 3, 22, 17, dtype=torch.float64)
    with torch.no_grad():
        want = of_module(module, x)
        got = net.features(x, TAPS)
    for name, features in want.items():
        torch.testing.assert_close(got[name], features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_modules(kind, backend):
    module = vgg_bn(**KINDS[kind])
    layers = {"relu1_1": 0.5, "pool2": 1.0}
    loss = PerceptualLoss(LossNet.from_sequential(module), layers, backend=backend)
    pred, target = torch.rand(2, 2, 3, 22, 17)
    pred.requires_grad_()
    value = loss(pred, target)
    (grad,) = torch.autograd.grad(value, pred)
    wide = pred.detach().double().requires_grad_()
    ours, theirs = of_module(module, wide), of_module(module, target.double())
    want = sum(w * (ours[k] - theirs[k]).square().mean() for k, w in layers.items())
    (slope,) = torch.autograd.grad(want, wide)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-4 * slope.abs().max())


def test_a_folded_network_is_a_chain_like_any_other(tmp_path):
    module = vgg_bn()
    net = LossNet.from_sequential(module, mean=0.4, std=0.3)
    assert (
        net.fingerprint()
        == LossNet.from_sequential(module.train(), mean=0.4, std=0.3).fingerprint()
    )
    net.save(tmp_path / "net.safetensors")
    again = LossNet.load(tmp_path / "net.safetensors")
    assert again.fingerprint() == net.fingerprint()
    assert all(torch.equal(again.weights[name], w) for name, w in net.weights.items())
    assert "conv2_1.bias" in LossNet.from_sequential(vgg_bn(bias=False)).weights
    module[1].running_mean.add_(1)
    assert LossNet.from_sequential(module, mean=0.4, std=0.3).fingerprint() != net.fingerprint()


def test_it_is_folded_in_float64():
    """Once rounded: float32 arithmetic would leave a few units in the last place."""
    conv, norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
    trained(norm)
    net = LossNet.from_sequential(nn.Sequential(conv, norm))
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
    bias = ((conv.bias.double() - norm.running_mean) * scale + norm.bias.double()).float()
    assert torch.equal(net.weights["conv1_1"], weight)
    assert torch.equal(net.weights["conv1_1.bias"], bias)


def test_two_norms_behind_one_convolution_and_other_dtypes():
    module = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        cast = copy.deepcopy(module).to(dtype)
        got = LossNet.from_sequential(cast).features(x, ["conv1_1"])["conv1_1"]
        torch.testing.assert_close(got, cast.double().eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "word"),
    [
        ([nn.ReLU()], "by BatchNorm2d or not"),
        ([nn.MaxPool2d(2)], "by BatchNorm2d or not"),
        ([nn.ReLU(), nn.MaxPool2d(2)], "by BatchNorm2d or not"),
    ],
)
def test_elsewhere_a_norm_is_refused(before, word):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), *before, nn.BatchNorm2d(4))
    position = len(before) + 1
    with pytest.raises(ValueError, match=rf"at position {position},.*{word}.*LossNet.from_module"):
        LossNet.from_sequential(module)
    with pytest.raises(ValueError, match=r"at position 0,.*LossNet\.from_module"):
        LossNet.from_sequential(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))


def test_norms_that_cannot_be_folded_are_refused():
    def refused(norm, word):
        with pytest.raises(ValueError, match=f"at position 1.*{word}"):
            LossNet.from_sequential(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()))

    refused(nn.BatchNorm2d(4, track_running_stats=False), "without running statistics.*from_module")
    refused(nn.BatchNorm2d(5), "expected num_features=4")
    refused(nn.SyncBatchNorm(4), r"another normalisation.*from_module")
    refused(nn.InstanceNorm2d(4), r"another normalisation.*from_module")
    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda m, a, out: out * 2)
    refused(hooked, "hooks")
    refused(nn.BatchNorm2d(4, device="meta"), "hold values; load them first")
    broken = nn.BatchNorm2d(4)
    broken.running_var.fill_(-1)
    with pytest.raises(ValueError, match=r"conv1_1.*not finite"):
        LossNet.from_sequential(nn.Sequential(nn.Conv2d(3, 4, 1), broken))
