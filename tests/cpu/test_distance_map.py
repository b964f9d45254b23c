"""`distance_map` of each loss: where prediction and target differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import NARROW, error, make_target

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss

N, C, H, W = 2, 5, 64, 96  # a window of 32 divides both


def at_last_level(loss, x, y, criterion="l2"):
    """(N, 1, H_b, W_b) of two maps."""
    layer = list(loss.net.layer_names)[-1]
    a, b = (loss.net.features(loss.net.network_input(t, None), [layer])[layer] for t in (x, y))
    each = (a - b).square() if criterion == "l2" else (a - b).abs()
    return each.mean(dim=1, keepdim=True)


def resized(d):
    return F.interpolate(d, size=(H, W), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
@pytest.mark.parametrize("criterion", ["l2", "l1"])
def test_of_the_last_level(backend, kind, criterion):
    loss = GenericPerceptualLoss(
        C, widths=NARROW, level_weights=[1, 0, 0, 2, 3], criterion=criterion, backend=backend
    )
    x = torch.randn(N, C, H, W, requires_grad=True)
    target = make_target(kind, (N, C, H, W), loss)
    found = loss.distance_map(x, target)
    assert found.shape == (N, 1, H, W)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    alone = GenericPerceptualLoss(
        C, widths=NARROW, level_weights=[0, 0, 0, 0, 3], criterion=criterion, reduction="none"
    )
    # A resize by whole factors keeps the mean: it is the level's term of the loss.
    assert error(found.mean(dim=(1, 2, 3)), alone(x, target).detach()) < 1e-4
    if kind == "dense":
        y, t = torch.softmax(x.detach(), dim=1), torch.softmax(target, dim=1)
        assert error(found, 3 * resized(at_last_level(loss, y, t, criterion))) < 1e-4


def test_on_meta_tensors_with_weights_of_channels(backend):
    net = GenericPerceptualLoss(C, widths=NARROW).net
    layer = net.levels[-1]
    width = net.shapes(H, W)[layer][0]
    loss = PerceptualLoss(net, {layer: [1.0, *[0.5] * (width - 1)]}, backend=backend)
    x = torch.empty(N, C, H, W, device="meta")
    found = loss.distance_map(x, x)
    assert found.is_meta
    assert found.shape == (N, 1, H, W)


def test_shows_where(backend):
    y = torch.randn(1, C, H, W)
    x = y.clone()
    x[:, :, :32, :32] += 5 * torch.randn(1, C, 32, 32)
    found = GenericPerceptualLoss(C, widths=NARROW, backend=backend).distance_map(x, y)
    assert found[..., :32, :32].mean() > 10 * found[..., 64:].mean()
    assert (found[..., 80:] == 0).all()


def test_a_mask(backend):
    loss = GenericPerceptualLoss(C, widths=NARROW, backend=backend)
    x, y = torch.randn(2, N, C, H, W)
    mask = torch.zeros(N, 1, H, W, dtype=torch.bool)
    x[~mask.expand_as(x)] = torch.nan
    assert (loss.distance_map(x, y, mask) == 0).all()


@pytest.mark.parametrize("teacher", [False, True])
def test_of_a_segmentation(backend, teacher):
    """Of the perceptual term, without its weight; logits are resized, ignored pixels left out."""
    total = SegmentationLoss(C, widths=NARROW, gpl_weight=0.3, backend=backend)
    labels = torch.randint(C, (N, H, W))
    labels[:, :40] = 255
    logits = torch.randn(N, C, H // 2, W // 2)
    full = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
    given = torch.randn(N, C, H, W) if teacher else None
    found = total.distance_map(logits, labels, teacher=given)
    own = total.gpl.distance_map(full, labels if given is None else given)
    assert found.shape == (N, 1, H, W)
    assert error(found, own) < 1e-5


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_of_labels_of_elements(backend, mode):
    """An ignored element is 0 in both maps."""
    classes = 1 if mode == "binary" else C
    total = SegmentationLoss(classes, mode=mode, widths=NARROW, backend=backend)
    logits, labels = torch.randn(N, classes, H, W), torch.randint(2, (N, classes, H, W))
    ignored = torch.rand(N, classes, H, W) < 0.2
    found = total.distance_map(logits, labels.masked_fill(ignored, 255))
    y, t = (torch.where(ignored, 0, m) for m in (logits.sigmoid(), labels.float()))
    assert error(found, resized(at_last_level(total, y, t))) < 1e-4
    nothing = total.distance_map(logits, torch.full_like(labels, 255))
    assert torch.equal(nothing, torch.zeros(N, 1, H, W))


def test_weights_of_pixels(backend):
    """Both maps are multiplied with them: twice the weights of a network without biases are four
    times the distance."""
    loss = GenericPerceptualLoss(C, widths=NARROW, backend=backend)
    x, y, mask = torch.randn(N, C, H, W), torch.randn(N, C, H, W), torch.rand(N, H, W)
    once, twice = loss.distance_map(x, y, mask), loss.distance_map(x, y, 2 * mask)
    assert error(twice, 4 * once) < 1e-5
    a, b = (mask.unsqueeze(1) * torch.softmax(t, dim=1) for t in (x, y))
    assert error(once, resized(at_last_level(loss, a, b))) < 1e-4


def test_of_a_perceptual_loss(backend):
    net = LossNet.vgg(C, (2, 2), widths=(4, 8))
    layers = {"feature_layers": {"relu2_2": 1.0, "relu1_1": 1.0}, "style_layers": {"pool2": 1.0}}
    loss = PerceptualLoss(net, **layers, tv_weight=1.0, backend=backend)
    x, y = torch.randn(2, N, C, H, W)
    found = loss.distance_map(x, y)
    a, b = (net.features(t, ["relu2_2"])["relu2_2"] for t in (x, y))
    assert error(found, resized((a - b).square().mean(dim=1, keepdim=True))) < 1e-4
    styles = PerceptualLoss(net, {}, {"pool2": 1.0}, backend=backend)
    with pytest.raises(ValueError, match="distance_map: got no feature layer"):
        styles.distance_map(x, y)


def test_computes_in_the_losses_dtype(backend):
    loss = GenericPerceptualLoss(C, widths=NARROW, backend=backend)
    x, y = torch.randn(2, N, C, H, W)
    truth = GenericPerceptualLoss(C, widths=NARROW).distance_map(x.double(), y.double())
    assert truth.dtype == torch.float64
    half = loss.distance_map(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32
    assert error(half, truth) < 0.2
    assert error(loss.distance_map(x, y), truth) < 1e-5
