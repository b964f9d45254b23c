"""What PyTorch and numpy say in other words is taken, and what is not says the way out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import agree
from torch import nn

from gpl_fast import LPIPS, LossNet, PerceptualLoss, SegmentationLoss, functional

N, C, SIZE = 2, 5, (18, 20)


def batch(classes=C):
    return torch.randn(N, classes, *SIZE), torch.randint(0, classes, (N, *SIZE))


# ------------------------------------------------------------------------------------- divisors


def test_a_divisor_is_of_the_batch_also_where_an_image_weighs_nothing(backend):
    x, y = batch()
    y[0] = 0
    weight = torch.tensor([0.0, 1, 1, 1, 1])
    loss = SegmentationLoss(
        C, net="1", class_weight=weight, label_smoothing=0.2, gpl_weight=0, backend=backend
    )
    want = F.cross_entropy(x, y, weight, label_smoothing=0.2)
    torch.testing.assert_close(loss(x, y), want)
    counts = loss.count(y)
    torch.testing.assert_close(loss(x, y, normalizer=counts), want)
    pieces = [loss(x[i : i + 1], y[i : i + 1], normalizer=counts) for i in range(N)]
    torch.testing.assert_close(sum(pieces), want)
    grads = []
    for words in ({}, {"normalizer": counts}):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(loss(leaf, y, **words), leaf)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (np.array([10.0, 2.0]), (10, 2)),
        (np.array([10, 2]), (10, 2)),
        (np.array(10.0), 10),
        ((10, None), 10),
        ((torch.tensor(10), None), 10),
    ],
)
def test_normalizers_in_other_words(given, same):
    x, y = batch()
    loss = SegmentationLoss(C, net="1")
    assert torch.equal(loss(x, y, normalizer=given), loss(x, y, normalizer=same))
    assert loss(x, y, normalizer=given) != loss(x, y, normalizer=11)


def test_a_compiled_graph_looks_at_counts():
    x, y = batch()
    loss = SegmentationLoss(C, net="1")
    step = torch.compile(loss, backend="eager", fullgraph=True)
    agree([step(x, y, normalizer=torch.tensor(9.0))], [loss(x, y, normalizer=9)])
    with pytest.raises(ValueError, match=r"normalizer: got -9\.0"):
        step(x, y, normalizer=torch.tensor(-9.0))


# ----------------------------------------------------------------------------- weights and labels


@pytest.mark.parametrize("what", ["pos_weight", "class_weight"])
@pytest.mark.parametrize(
    "given",
    [2.5, np.float32(2.5), np.array(2.5), torch.tensor(2.5), torch.full((C, 1, 1), 2.5),
     torch.full((1, C, 1, 1), 2.5), np.full((C, 1, 1), 2.5)],
    ids=["number", "numpy", "array", "tensor", "C11", "1C11", "array-C11"],
)  # fmt: skip
def test_weights_as_pytorch_broadcasts_them(what, given, backend):
    x, _ = batch()
    y = torch.randint(0, 2, x.shape)
    words = {"pos_weight": "pos_weight", "class_weight": "weight"}
    want = F.binary_cross_entropy_with_logits(x, y.float(), **{words[what]: torch.tensor(2.5)})
    loss = SegmentationLoss(
        C, mode="multilabel", net="1", gpl_weight=0, backend=backend, **{what: given}
    )
    torch.testing.assert_close(loss(x, y), want)
    by_function = functional.segmentation_loss(
        x, y, loss.net, mode="multilabel", gpl_weight=0, backend=backend, **{what: given}
    )
    assert torch.equal(by_function, loss(x, y))


def test_different_weights_keep_their_classes():
    x, _ = batch()
    y, weight = torch.randint(0, 2, x.shape), torch.rand(C, 1, 1) * 3
    want = F.binary_cross_entropy_with_logits(x, y.float(), pos_weight=weight)
    loss = SegmentationLoss(C, mode="multilabel", net="1", gpl_weight=0, pos_weight=weight)
    torch.testing.assert_close(loss(x, y), want)
    one = SegmentationLoss(1, mode="binary", net="1", gpl_weight=0, pos_weight=3)
    want = F.binary_cross_entropy_with_logits(
        x[:, :1], y[:, :1].float(), pos_weight=torch.tensor(3.0)
    )
    torch.testing.assert_close(one(x[:, :1], y[:, 0]), want)


def test_numbers_that_change_between_calls_of_a_compiled_step():
    x, y = torch.randn(N, C, *SIZE), torch.randint(0, 2, (N, C, *SIZE))
    net = LossNet.vgg(C, (1,))

    def step(number):
        return functional.segmentation_loss(
            x, y, net, mode="multilabel", pos_weight=number, normalizer=10 * number,
        )  # fmt: skip

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for number in (2.0, 3.5, 4.25):
        torch.testing.assert_close(compiled(number), step(number))


@pytest.mark.parametrize("given", [True, "3", -1.0, [1.0, 2.0], torch.ones(C, 2), torch.ones(1)])
def test_other_weights_are_refused(given):
    with pytest.raises(ValueError, match=r"pos_weight: got .*\(5,\)"):
        SegmentationLoss(C, mode="multilabel", net="1", pos_weight=given)
    with pytest.raises(ValueError, match="class_weight: got"):  # which F.cross_entropy refuses too
        SegmentationLoss(C, net="1", class_weight=2.0)


@pytest.mark.parametrize("given", [np.array([255, 7]), torch.tensor([255, 7])])
def test_ignored_labels_as_arrays(given):
    x, y = batch()
    y[:, :3], y[:, 3] = 255, 7
    loss = SegmentationLoss(C, net="1", ignore_index=given)
    assert loss.gpl.options.ignore_index == (255, 7)
    assert torch.equal(loss(x, y), SegmentationLoss(C, net=loss.net, ignore_index=(255, 7))(x, y))
    for other in (given * 1.5, given.reshape(1, 2), given > 0):
        with pytest.raises(ValueError, match="ignore_index: got"):
            SegmentationLoss(C, net="1", ignore_index=other)


# ---------------------------------------------------------------------------------------- encode


def test_encode_names_unknown_layers(backend):
    net, t = LossNet.vgg(3, (1,)), torch.rand(N, 3, *SIZE)
    with pytest.raises(ValueError, match=r"relu9_1.*relu1_1"):
        functional.encode(t, net, ["relu1_1", "relu9_1"], activation="none", backend=backend)
    with pytest.raises(ValueError, match=r"got 'relu1_1', expected.*use \['relu1_1'\]"):
        functional.encode(t, net, "relu1_1", activation="none", backend=backend)
    functional.encode(t, net, ["relu1_1"], activation="none", backend=backend)
    smooth = PerceptualLoss(net, {}, tv_weight=1.0, backend=backend)
    with pytest.raises(ValueError, match="got no layer that is compared"):
        smooth.encode(t)


# ------------------------------------------------------------------------------------- ways out


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_multi_hot_teacher_is_told_to_be_floating(dtype):
    x, _ = batch()
    y = torch.randint(0, 2, x.shape)
    loss = SegmentationLoss(C, mode="multilabel", net="1")
    with pytest.raises(ValueError, match=r"^teacher: .*teacher\.float\(\)") as caught:
        loss(x, y, teacher=y.to(dtype))
    assert "argmax" not in str(caught.value)
    advised = SegmentationLoss(C, mode="multilabel", net=loss.net, target_activation="none")
    torch.testing.assert_close(advised(x, y, teacher=y.to(dtype).float()), advised(x, y))


def test_two_channels_in_mode_binary_are_told_another_mode():
    x, y = batch(2)
    with pytest.raises(ValueError, match=r"'multiclass'.*'multilabel'.*num_classes = 2"):
        SegmentationLoss(1, mode="binary", net="1")(x, y)
    assert SegmentationLoss(2, net="1")(x, y).isfinite()
    assert SegmentationLoss(2, mode="multilabel", net="1")(x, F.one_hot(y).movedim(-1, 1)) > 0


@pytest.mark.parametrize(
    ("mask", "message", "advised"),
    [
        (lambda m: m[0], r"mask\.expand\(2, -1, -1\)", lambda m: m[0].expand(N, -1, -1)),
        (lambda m: m[:1], r"mask\.expand\(2, -1, -1\)", lambda m: m[:1].expand(N, -1, -1)),
        (
            lambda m: m[:1, None],
            r"mask\.expand\(2, -1, -1, -1\)",
            lambda m: m[:1, None].expand(N, -1, -1, -1),
        ),
        (
            lambda m: m[:, None].repeat(1, C, 1, 1),
            r"mask\.all\(dim=1\)",
            lambda m: m[:, None].repeat(1, C, 1, 1).all(dim=1),
        ),
        (
            lambda m: m[:, None].repeat(1, C, 1, 1).float(),
            r"mask\.amin\(dim=1\)",
            lambda m: m[:, None].repeat(1, C, 1, 1).float().amin(dim=1),
        ),
    ],
)
def test_masks_of_other_shapes(mask, message, advised):
    x, y = batch()
    keep, loss = torch.rand(N, *SIZE) > 0.3, SegmentationLoss(C, net="1")
    with pytest.raises(ValueError, match=f"^mask: .*{message}"):
        loss(x, y, mask=mask(keep))
    assert loss(x, y, mask=advised(keep)).isfinite()
    with pytest.raises(ValueError, match=r"mask\.unsqueeze\(0\)"):
        loss(x[:1], y[:1], mask=keep[0])


def test_ratios_are_of_the_parts_that_there_are(backend):
    net = LossNet.vgg(3, (1,))
    x, t = torch.rand(N, 3, *SIZE), torch.rand(N, 3, *SIZE)
    smooth = PerceptualLoss(net, {}, tv_weight=1.0, backend=backend).explain(x, t, ratio=True)
    assert smooth.ratio == {}
    assert "of one part: no ratio" in str(smooth)
    words = {"style_layers": {"relu1_1": 1.0}, "tv_weight": 0.5, "backend": backend}
    leaf = x.clone().requires_grad_()
    parts = PerceptualLoss(net, {}, **words)(leaf, t, return_parts=True)
    style, tv = (
        torch.autograd.grad(parts[k], leaf, retain_graph=True)[0].norm()
        for k in ("loss_style", "loss_tv")
    )
    found = PerceptualLoss(net, {}, **words).explain(x, t, ratio=True)
    assert found.ratio == {"loss_tv": pytest.approx(float(tv / style), rel=1e-3)}


# ---------------------------------------------------------------------------------------- images


def narrow_alexnet():
    """The sizes of AlexNet's first layers, which no chain has."""
    parts = (
        nn.Conv2d(3, 4, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
    )
    return LossNet.from_module(nn.Sequential(*parts), ["1", "4"])


@pytest.mark.parametrize("size", [4, 8, 20])
def test_images_that_are_too_small_for_a_module(size):
    loss = LPIPS(narrow_alexnet())
    x, y = torch.rand(2, N, 3, size, size)
    for call in (loss, loss.explain, loss.distance_map, LPIPS(loss.net, spatial=True)):
        with pytest.raises(ValueError, match=rf"\({size}, {size}\).*use larger images") as caught:
            call(x, y)
        assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="use larger images"):
        loss.encode(y)
    x, y = torch.rand(2, N, 3, 64, 64)
    assert loss(x, y) > 0
    # After the refusal the next pass is a new one.
    assert loss.explain(x, y).flops > 0


def test_other_errors_of_a_module_stay_its_own():
    class Broken(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("broken on purpose")

    net = LossNet.from_module(nn.Sequential(Broken(3, 4, 3)), ["0"])
    with pytest.raises(RuntimeError, match="broken on purpose"):
        functional.encode(torch.rand(N, 3, 8, 8), net, ["0"], activation="none")


def test_lpips_says_how_images_are_given():
    loss = LPIPS(LossNet.vgg(3, (1,)))
    x, y = torch.rand(2, N, 3, *SIZE)
    expand = r"x\.expand\(-1, 3, -1, -1\)"
    cases = [
        ((x[:, :1], y), f"^prediction: .*{expand}"),
        ((x, y[:, :1]), f"^target: .*{expand}"),
        ((x, (255 * y[:, :1]).byte()), f"^target: .*{expand}"),
        ((x[:, 0], y), r"^prediction: .*x\.unsqueeze\(1\)\.expand\(-1, 3, -1, -1\)"),
        ((x, y[:, 0]), r"^target: .*x\.unsqueeze\(1\)\.expand\(-1, 3, -1, -1\)"),
        ((x[0], y), r"^prediction: .*\.unsqueeze\(0\)"),
        ((x.movedim(1, -1), y), r"^prediction: .*\.permute\(0, 3, 1, 2\)"),
        ((x, torch.rand(N, 4, *SIZE)), r"^target: .*without alpha"),
    ]
    for given, message in cases:
        for call in (loss, loss.explain, loss.distance_map):
            with pytest.raises(ValueError, match=message) as caught:
                call(*given)
            for word in ("num_classes", "in_channels", "label", "teacher"):
                assert word not in str(caught.value)
    with pytest.raises(ValueError, match=expand):
        loss.encode(y[:, :1])
    with pytest.raises(TypeError, match=r"^target: got torch\.uint8.*/ 127\.5 - 1"):
        loss(x, (255 * y).byte())
    assert loss(x[:, :1].expand(-1, 3, -1, -1), y) > 0
    assert loss(x, y[:, 0].unsqueeze(1).expand(-1, 3, -1, -1)) > 0
