"""What docs/coming_from.md says beside its blocks, in its order."""

from __future__ import annotations

import math

import lpips
import monai
import piq
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

MEAN, STD = (torch.tensor(v).tolist() for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def images(n: int = 2, channels: int = 3) -> tuple[Tensor, Tensor]:
    target = torch.rand(n, channels, 48, 40, dtype=torch.float64)
    return (target + 0.2 * torch.randn_like(target)).clamp(0, 1), target


def maps() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 40, dtype=torch.float64), torch.randint(0, 3, (2, 32, 40))


def equal(value: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(value, other, rtol=1e-10, atol=0)


def test_weights_are_copied_and_the_target_gets_no_gradient():
    trunk = torchvision.models.vgg16(weights="DEFAULT").features[:4]
    loss = gpl_fast.PerceptualLoss(gpl_fast.LossNet.from_sequential(trunk), {"relu1_2": 1.0})
    pred, target = images()
    before = loss(pred, target)
    trunk[0].weight.data.zero_()
    assert torch.equal(loss(pred, target), before)
    target.requires_grad_()
    loss(pred.requires_grad_(), target).backward()
    assert pred.grad is not None
    assert target.grad is None


# ---------------------------------------------------------------------------------------- torch.nn


def test_the_ignored_label_and_what_a_mean_of_nothing_is():
    logits, labels = maps()
    labels[0, :5] = -100
    theirs = nn.CrossEntropyLoss()
    ours = gpl_fast.SegmentationLoss(3, ignore_index=-100, gpl_weight=0)
    equal(ours(logits, labels), theirs(logits, labels))
    labels[:] = -100
    assert theirs(logits, labels).isnan()
    assert ours(logits, labels) == 0


def test_weights_of_pixels_divide_too():
    logits, labels = maps()
    m = torch.rand(2, 32, 40, dtype=torch.float64)
    each = F.cross_entropy(logits, labels, reduction="none")
    equal(
        gpl_fast.SegmentationLoss(3, gpl_weight=0)(logits, labels, mask=m),
        (m * each).sum() / m.sum(),
    )


def test_weights_of_classes_of_a_binary_cross_entropy_do_not_divide():
    logits, _ = maps()
    labels = torch.randint(0, 2, logits.shape)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    theirs = nn.BCEWithLogitsLoss(weight=weight.view(3, 1, 1))
    ours = gpl_fast.SegmentationLoss(3, mode="multilabel", class_weight=weight, gpl_weight=0)
    equal(ours(logits, labels), theirs(logits, labels.double()))


# --------------------------------------------------------------------------------------------- piq


def contents(**words: object) -> tuple[piq.ContentLoss, gpl_fast.LossNet]:
    theirs = piq.ContentLoss("vgg16", **words)
    net = gpl_fast.LossNet.from_sequential(theirs.model, mean=MEAN, std=STD)
    return theirs.double(), net


def test_layers_of_piq_named_conv_are_those_after_the_relu():
    theirs, net = contents(layers=["conv2_1"])
    pred, target = images()
    ours = gpl_fast.PerceptualLoss(net, {"relu2_1": 128})(pred, target)
    equal(ours, theirs(pred, target))
    assert not torch.isclose(ours, gpl_fast.PerceptualLoss(net, {"conv2_1": 128})(pred, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_channels_and_reductions_of_piq(reduction):
    w = torch.rand(1, 128, 1, 1)
    theirs, net = contents(layers=["relu2_2"], weights=[w], reduction=reduction)
    ours = gpl_fast.PerceptualLoss(net, {"relu2_2": 128 * w.flatten()}, reduction=reduction)
    equal(ours(*(both := images())), theirs(*both))


# ----------------------------------------------------------------------------------------- BasicSR


def test_basicsr_gives_a_pair(basicsr):
    theirs = basicsr.PerceptualLoss({"relu1_2": 1.0}).double()
    value, style = theirs(*images())
    assert value > 0
    assert style is None


def test_l2_of_basicsr_cannot_be_built(basicsr):
    with pytest.raises(AttributeError, match="L2loss"):
        basicsr.PerceptualLoss({"relu1_2": 1.0}, criterion="l2")


def test_fro_of_basicsr_is_a_root_over_the_batch(basicsr):
    theirs = basicsr.PerceptualLoss({"relu1_2": 1.0}, criterion="fro", use_input_norm=False)
    net = gpl_fast.LossNet.from_sequential(theirs.vgg.vgg_net)
    pred, target = images()
    mean = gpl_fast.PerceptualLoss(net, {"relu1_2": 1.0})(pred, target)
    elements = 2 * 64 * 48 * 40
    equal((elements * mean).sqrt(), theirs.double()(pred, target)[0])


# ------------------------------------------------------------- pytorch/examples and Johnson's Lua


def test_one_style_image_of_any_size_stands_for_the_batch():
    trunk = torchvision.models.vgg16(weights="DEFAULT").features
    net = gpl_fast.LossNet.from_sequential(trunk)
    loss = gpl_fast.PerceptualLoss(net, {}, {"relu2_2": 1.0})
    pred, content = images()
    style = torch.rand(1, 3, 64, 80, dtype=torch.float64)
    value = loss(pred, content, style_target=style)
    equal(value, torch.stack([loss(x[None], x[None], style_target=style) for x in pred]).mean())
    equal(loss(pred, content, style_target=loss.encode(style)), value)


def test_total_variation_of_the_lua_code():
    s, (n, c, h, w) = 1e-3, (2, 3, 16, 16)
    x = torch.rand(n, c, h, w, dtype=torch.float64, requires_grad=True)
    inside = x[:, :, :-1, :-1]
    across = (inside - x[:, :, :-1, 1:]).square() + (inside - x[:, :, 1:, :-1]).square()
    (theirs,) = torch.autograd.grad(s / 2 * across.sum(), x)
    loss = gpl_fast.PerceptualLoss(
        gpl_fast.LossNet.vgg(3, (1,)), {}, tv_weight=s * n * c * h * (w - 1) / 2
    )
    (ours,) = torch.autograd.grad(loss(x, x.detach()), x)
    torch.testing.assert_close(ours[..., :-2, :-2], theirs[..., :-2, :-2], rtol=1e-10, atol=1e-15)
    assert math.isclose(1e-6 * 4 * 3 * 256 * 256 / 2, 0.39, rel_tol=0.01)


# ----------------------------------------------------------------------------- lpips, torchmetrics

LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def test_heads_of_lpips_as_weights_of_channels():
    theirs = lpips.LPIPS(net="vgg", verbose=False)
    trunk = nn.Sequential(*(m for part in theirs.net.children() for m in part))
    shift, scale = (t.flatten().tolist() for t in theirs.scaling_layer.buffers())
    net = gpl_fast.LossNet.from_sequential(trunk, mean=shift, std=scale)
    heads = {
        layer: lin.model[-1].weight.detach().flatten()
        for layer, lin in zip(LAYERS, theirs.lins, strict=True)
    }
    weights = {layer: len(h) * h for layer, h in heads.items()}
    ours = gpl_fast.PerceptualLoss(net, weights, normalize_features=True)
    equal(ours(*(both := images())), theirs.double()(*both).mean().detach())


def test_lpips_is_told_the_range_at_each_call_ours_once():
    theirs = lpips.LPIPS(net="vgg", verbose=False)
    ours = gpl_fast.LPIPS.from_module(theirs, normalize=True, reduction="none")
    value = theirs.double()(*(both := images()), normalize=True)
    assert value.shape == (2, 1, 1, 1)
    equal(ours(*both), value.detach().flatten())


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_who_takes_the_fast_path(net):
    loss = gpl_fast.LPIPS.from_module(lpips.LPIPS(net=net, verbose=False))
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert loss.explain(x, x).backend == ("fast" if net == "vgg" else "reference")


# ------------------------------------------------------------------------------------------- MONAI


def test_one_channel_is_spread_over_three():
    theirs = monai.losses.PerceptualLoss(spatial_dims=2, network_type="vgg")
    ours = gpl_fast.LPIPS.from_module(theirs.perceptual_function)
    pred, target = images(channels=1)
    spread = (x.expand(-1, 3, -1, -1) for x in (pred, target))
    equal(ours(*spread), theirs.double()(pred, target).detach())


@pytest.mark.parametrize("one_hot", [False, True])
def test_weights_of_classes_beside_dice(one_hot):
    logits, labels = maps()
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    theirs = monai.losses.DiceCELoss(softmax=True, to_onehot_y=not one_hot, weight=weight)
    dice = monai.losses.DiceLoss(softmax=True, to_onehot_y=not one_hot, weight=weight)
    target = labels.unsqueeze(1)
    normalizer = None
    if one_hot:
        target = F.one_hot(labels, 3).movedim(-1, 1).double()
        labels, normalizer = target.argmax(1), labels.numel()
    loss = gpl_fast.SegmentationLoss(3, ignore_index=None, class_weight=weight, gpl_weight=0)
    ours = loss(logits, labels, normalizer=normalizer)
    equal(dice(logits, target) + ours, theirs(logits, target))


# ---------------------------------------------------------------------------------- mmsegmentation


def test_class_weights_of_mmsegmentation_know_no_ignored_label(mmseg):
    logits, labels = maps()
    labels[0, 0] = 255
    theirs = mmseg.CrossEntropyLoss(class_weight=[1.0, 2.0, 0.5], avg_non_ignore=True)
    with pytest.raises(IndexError):
        theirs(logits, labels, ignore_index=255)


def test_a_divisor_of_mmsegmentation(mmseg):
    logits, labels = maps()
    theirs = mmseg.CrossEntropyLoss()(logits, labels, avg_factor=1000)
    divisor = 1000 + torch.finfo(torch.float32).eps  # as theirs does
    equal(gpl_fast.SegmentationLoss(3, gpl_weight=0)(logits, labels, normalizer=divisor), theirs)


def test_several_ignored_labels_against_one(mmseg):
    logits, labels = maps()
    labels[0, :4], labels[1, :7] = 254, 255
    theirs = mmseg.CrossEntropyLoss(avg_non_ignore=True)
    ours = gpl_fast.SegmentationLoss(3, ignore_index=(254, 255), gpl_weight=0)
    equal(ours(logits, labels), theirs(logits, labels.clamp(max=254), ignore_index=254))


@pytest.mark.parametrize("avg_non_ignore", [True, False])
def test_sigmoids_of_several_classes(avg_non_ignore, mmseg):
    logits, labels = maps()
    labels[0, 0] = 255
    theirs = mmseg.CrossEntropyLoss(use_sigmoid=True, avg_non_ignore=avg_non_ignore)
    one_hot = F.one_hot(labels.clamp(max=2), 3).movedim(-1, 1)
    one_hot = one_hot.where((labels != 255).unsqueeze(1), 255)
    ours = gpl_fast.SegmentationLoss(3, mode="multilabel", gpl_weight=0)
    value = ours(logits, one_hot, normalizer=None if avg_non_ignore else one_hot.numel())
    single = theirs(logits, labels, ignore_index=255)
    torch.testing.assert_close(value.float(), single, rtol=1e-6, atol=0)


def test_weights_of_pixels_of_mmsegmentation(mmseg):
    logits, labels = maps()
    weight = torch.rand(2, 32, 40)
    theirs = mmseg.CrossEntropyLoss()(logits, labels, weight=weight)
    ours = gpl_fast.SegmentationLoss(3, gpl_weight=0)
    equal(ours(logits, labels, mask=weight, normalizer=labels.numel()), theirs)
