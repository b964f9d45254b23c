"""The oracle itself: against plain Python loops, against finite differences, and its precision."""

from __future__ import annotations

from types import SimpleNamespace

import plain
import pytest
import torch
import torch.nn.functional as F
from cases import HALF_BOUND, NARROW, error, value_and_grad
from torch import nn

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, TopK
from gpl_fast import reference as ref

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
RESTS = ["renormalize", "uniform", "drop"]
KINDS = ["dense", "resized", "labels", "topk", "features"]


@pytest.fixture(autouse=True)
def only_the_reference(monkeypatch):
    monkeypatch.setenv("GPL_FAST_BACKEND", "reference")


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=DOUBLE), rtol=1e-11, atol=1e-13)


def maps(*shape, dtype=DOUBLE):
    return 2 * torch.randn(*shape, dtype=dtype)


def make_target(kind, loss, shape, mask=None):
    """A float64 target of that kind for predictions of `shape`."""
    n, c, h, w = shape
    if kind == "labels":
        return torch.randint(0, c, (n, h, w))
    if kind == "topk":
        values = torch.rand(n, 2, h, w, dtype=DOUBLE) / 2
        return TopK(values, torch.randint(0, c, (n, 2, h, w)), "uniform")
    dense = maps(n, c, h + 3, w - 1) if kind == "resized" else maps(*shape)
    return loss.encode(dense, mask) if kind == "features" else dense


# ------------------------------------------------------------------------------ against plain loops


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_activation(activation, temperature):
    x = maps(1, 4, 3, 2)
    expected = plain.activate(x[0].numpy(), activation, temperature)
    close(ref.activate(x, activation, temperature)[0], expected)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
def test_every_layer_of_a_net(kernel, pool):
    net = LossNet.vgg(2, (1, 2), (3, 2), kernel, pool, seed=3)
    x = maps(1, 2, 7, 6)  # 7 floors at the first pool: 3, and again: 1
    expected = plain.features(x[0].numpy(), net)
    got = net.features(x, net.layer_names)
    assert list(got) == list(net.layer_names)
    for name in net.layer_names:
        close(got[name][0], expected[name])
    assert got[net.levels[-1]].shape[2:] == ((2, 2) if pool == "stride" else (1, 1))


def test_biases_and_a_rest_block():
    chain = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)
    )
    net = LossNet.from_sequential(chain)
    x = maps(1, 2, 5, 4)
    close(net.features(x, ["conv2_1"])["conv2_1"][0], plain.features(x[0].numpy(), net)["conv2_1"])


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_is_equation_1(pool, reduction):
    weights = (0.25, 1.5)
    loss = GenericPerceptualLoss(
        3,
        "1,1",
        widths=(4, 2),
        pool=pool,
        level_weights=weights,
        temperature=1.5,
        reduction=reduction,
    )
    pred, target = maps(2, 3, 6, 5), maps(2, 3, 6, 5)
    samples = []
    for x, t in zip(pred.numpy(), target.numpy(), strict=True):
        a, b = (plain.features(plain.activate(v, "softmax", 1.5), loss.net) for v in (x, t))
        levels = zip(weights, loss.net.levels, strict=True)
        samples.append(sum(w * plain.distance(a[name], b[name]) for w, name in levels))
    expected = {"none": samples, "mean": sum(samples) / 2, "sum": sum(samples)}[reduction]
    close(loss(pred, target), expected)


def test_default_is_the_last_level_and_mse_of_the_features():
    loss = GenericPerceptualLoss(3, "1,1", widths=(4, 2), activation="none")
    pred, target = maps(2, 3, 9, 8), maps(2, 3, 9, 8)
    e_pred, e_target = (loss.net.features(y, ["pool2"])["pool2"] for y in (pred, target))
    close(loss(pred, target), F.mse_loss(e_pred, e_target))


def test_mask_by_definition():
    """Both maps are 0 at pixels that are not valid, after the activation."""
    loss = GenericPerceptualLoss(3, "1", widths=(4,))
    pred, target, mask = maps(1, 3, 5, 6), maps(1, 3, 5, 6), torch.rand(1, 5, 6) < 0.6
    a, b = (plain.activate(v[0].numpy(), "softmax") * mask[0].numpy() for v in (pred, target))
    a, b = (plain.features(y, loss.net)["pool1"] for y in (a, b))
    close(loss(pred, target, mask), plain.distance(a, b))


def test_adapter_then_normalisation_then_zeroing():
    net = LossNet.from_sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()), mean=(0.2, 0.3), std=(0.5, 2.0)
    ).with_input_adapter(4)
    y, valid = maps(1, 4, 3, 4), torch.rand(1, 3, 4) < 0.6
    expected = plain.conv(y[0].numpy(), net.weights["adapter"].numpy())
    for c, (mean, std) in enumerate([(0.2, 0.5), (0.3, 2.0)]):
        expected[c] = (expected[c] - mean) / std * valid[0].numpy()
    close(net.network_input(y, valid)[0], expected)


@pytest.mark.parametrize("size", [(5, 7), (9, 4)])
def test_dense_targets_are_resized_before_their_activation(size):
    loss = GenericPerceptualLoss(3, "1", widths=(4,))
    pred, target = maps(1, 3, 6, 6), maps(1, 3, *size)
    expected = plain.activate(plain.resize(target[0].numpy(), (6, 6)), "softmax")
    e = plain.features(expected, loss.net)["pool1"]
    e_pred = plain.features(plain.activate(pred[0].numpy(), "softmax"), loss.net)["pool1"]
    close(loss(pred, target), plain.distance(e_pred, e))


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_densification(rest, k):
    values = torch.rand(1, k, 3, 4, dtype=DOUBLE) / k
    indices = torch.stack([torch.randperm(4)[:k] for _ in range(12)], 1).view(1, k, 3, 4)
    values[0, :, 0, 0] = 0  # nothing listed has mass
    if k > 1:
        indices[0, 1] = indices[0, 0]  # duplicates add up
    got = ref.dense_topk(values, indices, rest, 4, DOUBLE)
    expected = plain.topk(values[0].numpy(), indices[0].numpy(), rest, 4)
    close(got[0], expected)
    sums = got.sum(dim=1)
    if rest == "uniform":
        close(sums, torch.ones_like(sums))
    elif rest == "renormalize":
        close(sums.flatten()[1:], torch.ones(11))
        assert not got[0, :, 0, 0].any()


def test_gram_and_style_with_another_size_or_one_image():
    a, b = maps(2, 3, 4, 5), maps(1, 3, 2, 6)
    grams = [torch.from_numpy(plain.gram(e.numpy())) for e in (*a, *b)]
    close(ref.gram(a), torch.stack(grams[:2]))
    close(ref.style_distance(a, b), torch.stack([(g - grams[2]).square().sum() for g in grams[:2]]))


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_total_variation(share):
    y, valid = maps(2, 3, 4, 5), torch.rand(2, 4, 5) < share
    pairs = zip(y.numpy(), valid.numpy(), strict=True)
    close(ref.total_variation(y, valid), [plain.total_variation(*pair) for pair in pairs])
    y = torch.where(valid.unsqueeze(1), y, float("nan"))
    assert ref.total_variation(y, valid).isfinite().all()


@pytest.mark.parametrize("size", [(1, 5), (4, 1), (1, 1)])
def test_total_variation_without_neighbours(size):
    y = maps(2, 3, *size)
    rows, cols = (y.diff(dim=d).square().flatten(1) for d in (2, 3))
    expected = [sum(float(d[n].mean()) for d in (rows, cols) if d.shape[1]) for n in range(2)]
    close(ref.total_variation(y), expected)


def test_perceptual_loss_is_the_sum_of_its_parts():
    net = LossNet.vgg(3, (1, 2), (4, 5))
    feature, style = {"relu2_2": 0.7, "conv1_1": 0.2}, {"relu1_1": 2.0, "pool2": 3.0}
    loss = PerceptualLoss(net, feature, style, tv_weight=0.3, return_parts=True)
    pred, target, image = maps(2, 3, 8, 9), maps(2, 3, 8, 9), maps(1, 3, 5, 6)
    parts = loss(pred, target, style_target=image)
    a, b, s = (net.features(y, net.layer_names) for y in (pred, target, image))
    for name, weights, distance, other in [
        ("loss_feature", feature, ref.feature_distance, b),
        ("loss_style", style, ref.style_distance, s),
    ]:
        expected = sum(w * distance(a[k], other[k]) for k, w in weights.items())
        close(parts[name], expected.mean())
    close(parts["loss_tv"], 0.3 * ref.total_variation(pred).mean())
    whole = PerceptualLoss(net, feature, style, tv_weight=0.3)(pred, target, style_target=image)
    close(whole, sum(parts.values()))


def test_total_variation_alone_ignores_nan_that_the_mask_leaves_out():
    loss = PerceptualLoss(LossNet.vgg(2, (1,), (4,)), {}, tv_weight=1.0)
    pred, mask = maps(1, 2, 6, 6), torch.rand(1, 6, 6) < 0.7
    expected = value_and_grad(loss, pred, pred, mask=mask)
    pred = torch.where(mask.unsqueeze(1), pred, float("nan"))
    assert all(map(torch.equal, value_and_grad(loss, pred, pred, mask=mask), expected))


# ------------------------------------------------------------------------------------ cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_pytorchs(smoothing, weighted):
    logits, labels = maps(3, 4, 5, 6), torch.randint(-1, 4, (3, 5, 6))
    weight = torch.rand(4, dtype=DOUBLE) if weighted else None
    options = {"weight": weight, "ignore_index": -1, "label_smoothing": smoothing}
    total, norm = ref.cross_entropy(logits, labels, weight, smoothing)
    close(total.sum() / norm.sum(), F.cross_entropy(logits, labels, **options))
    pairs = zip(logits, labels, strict=True)
    singles = [F.cross_entropy(x[None], y[None], **options) for x, y in pairs]
    close(total / norm, torch.stack(singles))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("images", [0, 2])
def test_cross_entropy_of_nothing_is_zero(reduction, images):
    total = SegmentationLoss(
        3, gpl_weight=0, label_smoothing=0.1, reduction=reduction, class_weight=[1, 2, 3]
    )
    labels = torch.full((images, 32, 33), 255)
    value, grad = value_and_grad(total, torch.full((images, 3, 32, 33), float("nan")), labels)
    assert value.shape == ((images,) if reduction == "none" else ())
    assert not value.any()
    assert not grad.any()


def test_cross_entropy_of_classes_with_weight_zero_is_zero():
    total = SegmentationLoss(2, gpl_weight=0, class_weight=[0.0, 1.0])
    assert total(torch.randn(1, 2, 32, 32), torch.zeros(1, 32, 32).long()) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("teacher", [False, True])
def test_segmentation_total_is_equation_2(reduction, teacher):
    options = {"net": "1,1", "widths": (4, 3), "reduction": reduction}
    total = SegmentationLoss(
        3, gpl_weight=0.3, ce_weight=0.5, class_weight=[1.0, 2.0, 0.5], **options
    )
    logits, labels, mask = (
        maps(2, 3, 8, 7),
        torch.randint(0, 3, (2, 8, 7)),
        torch.rand(2, 8, 7) < 0.8,
    )
    labels[0, :3, :3] = 255
    other = maps(2, 3, 8, 7) if teacher else None
    parts = total(logits, labels, other, mask, return_parts=True)
    counted = torch.where(mask, labels, 255)
    options_ce = {"weight": torch.tensor([1, 2, 0.5], dtype=DOUBLE), "ignore_index": 255}
    if reduction == "mean":
        ce = F.cross_entropy(logits, counted, **options_ce)
    else:
        pairs = zip(logits, counted, strict=True)
        ce = torch.stack([F.cross_entropy(x[None], y[None], **options_ce) for x, y in pairs])
        ce = ce.sum() if reduction == "sum" else ce
    gpl = GenericPerceptualLoss(3, ignore_index=255, **options)
    close(parts["loss_ce"], 0.5 * ce)
    close(parts["loss_gpl"], 0.3 * gpl(logits, other if teacher else labels, mask))
    close(total(logits, labels, other, mask), parts["loss_ce"] + parts["loss_gpl"])


@pytest.mark.parametrize("gpl_ignore", ["auto", True, False])
@pytest.mark.parametrize("teacher", [False, True])
def test_whether_ignored_labels_leave_the_perceptual_term(gpl_ignore, teacher):
    total = SegmentationLoss(
        3, ce_weight=0, gpl_weight=1, gpl_ignore=gpl_ignore, net="1", widths=(4,)
    )
    logits, labels = maps(1, 3, 6, 6), torch.randint(0, 3, (1, 6, 6))
    ignored = torch.rand(1, 6, 6) < 0.3
    labels[ignored] = 255
    _, grad = value_and_grad(total, logits, labels, maps(1, 3, 6, 6) if teacher else None)
    leaves = gpl_ignore is True or (gpl_ignore == "auto" and not teacher)
    gone = grad.abs().sum(dim=1)[ignored] == 0
    assert gone.all() if leaves else not gone.any()


def test_smaller_logits_are_resized_to_the_labels():
    total = SegmentationLoss(3, net="1", widths=(4,))
    logits, labels = maps(2, 3, 5, 6), torch.randint(0, 3, (2, 9, 12))
    full = F.interpolate(logits, size=(9, 12), mode="bilinear", align_corners=False)
    close(total(logits, labels), total(full, labels))


# ----------------------------------------------------------------------- against finite differences


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_gradcheck(kernel, pool, kind, masked):
    loss = GenericPerceptualLoss(3, "2,1", widths=(4, 3), kernel_size=kernel, pool=pool)
    mask = torch.rand(1, 5, 6) < 0.7 if masked else None
    target = make_target(kind, loss, (1, 3, 5, 6), mask)
    x = maps(1, 3, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target, mask), [x], fast_mode=True)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("levels", [(1.0, 0.0), (0.3, 2.0)])
def test_gradcheck_of_every_element(activation, levels):
    loss = GenericPerceptualLoss(
        2,
        "1,1",
        widths=(4, 3),
        activation=activation,
        level_weights=levels,
        temperature=1.5,
        reduction="none",
    )
    x, target = maps(2, 2, 5, 4).requires_grad_(), maps(2, 2, 5, 4)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), [x])


def test_gradcheck_of_the_perceptual_family():
    net = LossNet.vgg(2, (1, 1), (3, 4))
    loss = PerceptualLoss(net, {"relu2_1": 1.0}, {"relu1_1": 50.0}, tv_weight=0.1)
    x, target, style = maps(1, 2, 5, 6).requires_grad_(), maps(1, 2, 5, 6), maps(1, 2, 4, 7)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, style), [x])


def test_gradcheck_of_the_segmentation_total():
    total = SegmentationLoss(
        3, gpl_weight=1.0, class_weight=[1, 2, 3], label_smoothing=0.1, net="1", widths=(4,)
    )
    labels = torch.randint(0, 3, (2, 5, 4))
    labels[0, 1:3] = 255
    x = maps(2, 3, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total(x, labels), [x])


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_against_float64(dtype, kind):
    loss = GenericPerceptualLoss(5, "1,1,1", widths=NARROW, pool="avg")
    pred = maps(4, 5, 19, 22).to(dtype)
    target = make_target(kind, loss, pred.shape)
    value, grad = value_and_grad(loss, pred, target)
    truth, truth_grad = value_and_grad(loss, pred.double(), target)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    bound, grad_bound = HALF_BOUND[dtype]
    assert error(value, truth) < bound
    if dtype == torch.bfloat16:  # float16 gradients of a mean underflow without GradScaler
        assert error(grad, truth_grad) < grad_bound


@pytest.mark.parametrize("scale", [1e-6, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("levels", [None, (1 / 4, 1 / 2, 1)])
def test_float16_chain_neither_underflows_nor_overflows(scale, reduction, levels):
    options = {"net": "1,1,1", "widths": NARROW, "level_weights": levels, "reduction": reduction}
    half = GenericPerceptualLoss(5, compute_dtype=torch.float16, **options)
    pred, target = maps(3, 5, 33, 34, dtype=torch.float32), maps(3, 5, 33, 34)
    _, unit = value_and_grad(half, pred, target)
    _, truth = value_and_grad(GenericPerceptualLoss(5, **options), pred.double(), target)
    assert error(unit, truth) < HALF_BOUND[torch.float16][1]
    factor = torch.tensor([1.0, 1e-3, 1.0] if reduction == "none" else [1.0] * 3) * scale
    g = factor if reduction == "none" else factor[0]
    _, grad = value_and_grad(lambda x: half(x, target) * g, pred)
    for got, at_one, f in zip(grad, unit, factor, strict=True):
        assert error(got, f.double() * at_one) < 1e-6  # the factor enters in float32 alone


def test_float16_style_chain_at_unit_scale():
    net = LossNet.vgg(3, (1, 1), (6, 8))
    options = {"feature_layers": {"relu2_1": 1.0}, "style_layers": {"relu1_1": 5.0}}
    pred, target = maps(2, 3, 16, 17, dtype=torch.float32), maps(2, 3, 16, 17)
    half = PerceptualLoss(net, **options, compute_dtype=torch.float16)
    _, unit = value_and_grad(half, pred, target)
    _, truth = value_and_grad(PerceptualLoss(net, **options), pred.double(), target)
    assert error(unit, truth) < HALF_BOUND[torch.float16][1]
    _, grad = value_and_grad(lambda x: 1e-6 * half(x, target), pred)
    assert error(grad, 1e-6 * unit.double()) < 1e-6


def test_an_upstream_gradient_of_zero_gives_zero_in_float16():
    loss = GenericPerceptualLoss(3, "1", widths=(4,), compute_dtype=torch.float16, reduction="none")
    keep = torch.tensor([1.0, 0.0])
    _, grad = value_and_grad(lambda x: loss(x, -x.detach()) * keep, torch.randn(2, 3, 6, 6))
    assert grad[0].any()
    assert not grad[1].any()


# ------------------------------------------------------------------------------- dtypes and formats


@pytest.mark.parametrize("compute", [None, torch.float16, torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_value_and_gradient_dtypes(dtype, compute):
    loss = GenericPerceptualLoss(3, "1", widths=(4,), compute_dtype=compute)
    value, grad = value_and_grad(loss, maps(2, 3, 6, 6).to(dtype), maps(2, 3, 6, 6))
    assert value.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    assert grad.dtype == dtype
    same = torch.randn(2, 3, 6, 6, dtype=dtype)
    value, grad = value_and_grad(loss, same, same)
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("make", [GenericPerceptualLoss, SegmentationLoss])
def test_autocast_computes_float32_predictions_in_its_dtype(make):
    pred, labels = maps(2, 3, 12, 12, dtype=torch.float32), torch.randint(0, 3, (2, 12, 12))
    loss = make(3, net="1,1", widths=(4, 5))
    plain_value = loss(pred, labels)
    asked = make(3, net="1,1", widths=(4, 5), compute_dtype=torch.bfloat16)(pred, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto, auto_grad = value_and_grad(loss, pred, labels)
        half = loss(pred.half(), labels)
        override = make(3, net="1,1", widths=(4, 5), compute_dtype=torch.float32)(pred, labels)
        stored = loss(pred, loss.encode(labels)) if make is GenericPerceptualLoss else None
    assert torch.equal(auto, asked)
    assert not torch.equal(auto, plain_value)
    assert auto_grad.dtype == torch.float32
    assert torch.equal(half, loss(pred.half(), labels))
    assert torch.equal(override, plain_value)
    assert stored is None or torch.equal(stored, loss(pred, loss.encode(labels)))


def test_stored_features_are_computed_and_compared_in_float32():
    loss = GenericPerceptualLoss(3, "1,1", widths=(4, 5))
    pred, target = maps(2, 3, 12, 12), maps(2, 3, 12, 12).bfloat16()
    stored = loss.encode(target)
    assert all(e.dtype == torch.float32 for e in stored.features.values())
    value = loss(pred.bfloat16(), stored)
    assert torch.equal(value, loss(pred.bfloat16().float(), target.float()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradient_memory_format(layout):
    x = torch.randn(2, 3, 8, 6)
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.randn(2, 3, 16, 12)[:, :, ::2, ::2],
    }[layout]
    loss = GenericPerceptualLoss(3, "1", widths=(4,))
    _, grad = value_and_grad(loss, x, torch.randint(0, 3, (2, 8, 6)))
    last = layout == "channels_last"
    assert grad.is_contiguous(memory_format=torch.channels_last) == last
    assert grad.is_contiguous() != last


@pytest.mark.parametrize("compute", [None, torch.float16])
def test_double_backward_is_refused(compute):
    x, target = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 3, 8, 8)
    loss = GenericPerceptualLoss(3, "1", widths=(4,), compute_dtype=compute)
    (grad,) = torch.autograd.grad(loss(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("size", [769, 385])
@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
def test_feature_shapes_at_the_papers_crops(size, pool):
    net = LossNet.vgg(1, widths=(2, 2, 3, 3, 4), pool=pool)
    got = net.features(torch.rand(1, 1, size, size), net.layer_names)
    assert {name: tuple(e.shape[1:]) for name, e in got.items()} == net.shapes(size, size)
    last = net.shapes(size, size)[net.levels[-1]][1]
    assert last == (size // 32 if pool != "stride" else -(-size // 32))


def test_taps_come_from_one_pass_that_stops_early():
    net = LossNet.vgg(1, (1, 1), (2, 2))
    weights = dict(net.weights_on(torch.device("cpu"), torch.float32))
    del weights["conv2_1"]  # would be a KeyError if reached
    got = ref.features(torch.rand(1, 1, 4, 4), net.layers, weights, ["relu1_1", "pool1"])
    assert list(got) == ["relu1_1", "pool1"]


def test_one_chain_step_is_any_object_with_name_and_kind():
    layers = [SimpleNamespace(name="a", kind="conv"), SimpleNamespace(name="b", kind="relu")]
    x, w = maps(1, 2, 3, 4), maps(3, 2, 3, 3)
    expected = plain.relu(plain.conv(x[0].numpy(), w.numpy()))
    close(ref.features(x, layers, {"a": w}, ["b"])["b"][0], expected)
