"""Floating masks: the weight m of each pixel multiplies both maps, and its cross-entropy.

The definition is m times the activated maps, compared as they are; the fast path is held to it in
float64 as in test_fast.py. A mask of 0 and 1 has the bits of the bool one, whoever computes.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_fast
import torch
import torch.nn.functional as F
from cases import NARROW, agree, make_target, value_and_grad
from pairwise import covering
from strategies import Case
from torch import Tensor, nn

from gpl_fast import (
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    TopK,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
KINDS = ("dense", "resized", "labels", "topk", "features")
SHAPE = N, C, H, W = 2, 5, 17, 22


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights(*size: int) -> Tensor:
    return test_fast.weights_of(torch.rand(size) < 0.8)


def generic(backend: str, **options: Any) -> GenericPerceptualLoss:
    return GenericPerceptualLoss(C, "1,1", widths=NARROW, backend=backend, **options)


# --------------------------------------------------------------------------- the definition


def by_hand(pred: Tensor, target: Any, m: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Both maps, activated and multiplied, (N, C, H, W) float64."""
    if kind == "labels":
        y = F.one_hot(target, C).permute(0, 3, 1, 2)
    elif kind == "topk":
        total = target.values.double().sum(dim=1, keepdim=True)
        y = torch.zeros(SHAPE).double().scatter_add(1, target.indices, target.values / total)
    else:
        y = target.double().softmax(dim=1)
    return tuple(t.double() * m.unsqueeze(1) for t in (pred.softmax(dim=1), y))


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, BF16, HALF], ids=dtype_id)
@pytest.mark.parametrize("option", ["weights-reference"])
def test_both_maps_are_multiplied(option, dtype, kind):
    m, pred = weights(N, H, W), 2 * torch.randn(SHAPE).double()
    loss = generic("reference", compute_dtype=dtype)
    given = make_target("dense" if kind == "features" else kind, SHAPE)
    target = loss.encode(given, m) if kind == "features" else given
    plain = GenericPerceptualLoss(
        C, loss.net, activation="none", backend="reference", compute_dtype=dtype
    )
    x = pred.clone().requires_grad_()
    got = loss(x, target, None if kind == "features" else m)
    prediction, y = by_hand(x, given, m, kind)
    want = plain(prediction, y)
    for a, b in zip(
        (got, *torch.autograd.grad(got, x)), (want, *torch.autograd.grad(want, x)), strict=True
    ):
        scale = float(b.detach().abs().max())
        bound = 1e-5 if dtype in (torch.float64, FLOAT) else 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=bound * scale)


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features", "teacher"])
@pytest.mark.parametrize("option", ["weights-reference-float64"])
def test_gradcheck(option, kind):
    pred, m = torch.randn(1, C, 6, 7).double(), weights(1, 6, 7)
    given = make_target("dense" if kind in ("features", "teacher") else kind, (1, C, 6, 7))
    loss = generic("reference")
    if kind == "teacher":
        total = SegmentationLoss(
            C, net=loss.net, label_smoothing=0.1, class_weight=torch.rand(C), backend="reference"
        )
        labels = torch.randint(C, (1, 6, 7))
        labels[:, :2] = 255

        def call(x: Tensor) -> Tensor:
            return total(x, labels, given.double(), m)

    else:
        target = loss.encode(given.double(), m) if kind == "features" else given
        target = target.double() if kind == "dense" else target

        def call(x: Tensor) -> Tensor:
            return loss(x, target, m)

    assert torch.autograd.gradcheck(call, pred.requires_grad_())


def chain(adapter: bool) -> LossNet:
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    net = LossNet.from_sequential(layers, mean=(0.4, -0.5, 0.6), std=(0.2, 0.3, 0.25))
    return net.with_input_adapter(C, seed=2) if adapter else net


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_after_adapter_mean_and_std(backend, adapter):
    """m ((A y − mean) / std), not (A m y − mean) / std."""
    net, m = chain(adapter), weights(N, H, W)
    c = C if adapter else 3
    pred, target = torch.rand(N, c, H, W), torch.rand(N, c, H, W)
    got = value_and_grad(PerceptualLoss(net, {"pool2": 1.0}, backend=backend), pred, target, mask=m)
    bare = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    for layer, name in ((bare[0], "conv1_1"), (bare[3], "conv2_1")):
        layer.weight.data, layer.bias.data = net.weights[name], net.weights[f"{name}.bias"]
    plain = PerceptualLoss(
        LossNet.from_sequential(bare.double()), {"pool2": 1.0}, backend="reference"
    )
    x = pred.double().requires_grad_()

    def entering(y: Tensor) -> Tensor:
        if adapter:
            y = F.conv2d(y, net.weights["adapter"].double())
        mean, std = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (net.mean, net.std))
        return m.unsqueeze(1) * ((y - mean) / std)

    want = plain(entering(x), entering(target.double()))
    agree(got, (want.detach().float(), torch.autograd.grad(want, x)[0].float()), 2e-5)


def test_a_network_of_any_module():
    module = nn.Sequential(nn.Conv2d(C, 4, 3, padding=1), nn.Tanh())
    net = LossNet.from_module(module, {"out": "1"}, in_channels=C)
    m, pred, target = weights(N, H, W), torch.randn(SHAPE), torch.randn(SHAPE)
    loss = PerceptualLoss(net, {"out": 1.0})
    got = loss(pred, target, mask=m)
    want = loss(pred * m.unsqueeze(1), target * m.unsqueeze(1))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_the_value_grows_with_the_square_of_the_weights(backend):
    loss, pred, target, m = (
        generic(backend),
        torch.randn(SHAPE),
        torch.randn(SHAPE),
        weights(N, H, W),
    )
    torch.testing.assert_close(loss(pred, target, 2 * m), 4 * loss(pred, target, m))


def test_total_variation_counts_pairs():
    net, m = LossNet.vgg(3, (1,), widths=NARROW), weights(N, H, W)
    loss = PerceptualLoss(net, {"relu1_1": 1.0}, tv_weight=1.0)
    pred, target = torch.randn(N, 3, H, W), torch.randn(N, 3, H, W)
    parts = [loss(pred, target, mask=mask, return_parts=True) for mask in (m, m > 0)]
    assert torch.equal(parts[0]["loss_tv"], parts[1]["loss_tv"])
    assert not torch.equal(parts[0]["loss_feature"], parts[1]["loss_feature"])


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_resized_target_is_its_weighted_mean(backend):
    """``Σ b m t / Σ b m``; a pixel has the weight of its nearest source."""
    own = torch.randn(N, C, 9, 30)
    m = weights(N, 9, 30)
    own[(m == 0).unsqueeze(1).expand_as(own)] = float("nan")
    pred = torch.randn(SHAPE)
    loss = generic(backend, target_activation="same")
    got = value_and_grad(loss, pred, own, m)
    mean, total = (
        F.interpolate(t.double(), (H, W), mode="bilinear")
        for t in (own.nan_to_num() * m.unsqueeze(1), m.unsqueeze(1))
    )
    near = F.interpolate(m.unsqueeze(1), (H, W), mode="nearest-exact").squeeze(1)
    resized = (mean / total).where(near.unsqueeze(1) > 0, torch.tensor(0.0).double())
    agree(got, value_and_grad(loss, pred, resized.float(), near), 2e-5)


# ---------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("teacher", [None, "dense", "labels", "topk", "features"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gpl_weight", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_cross_entropy_by_hand(backend, gpl_weight, reduction, teacher):
    """``Σ m w ℓ / Σ m w``, with label smoothing as PyTorch has it, whatever the teacher leaves
    out."""
    logits, labels, m = 2 * torch.randn(SHAPE), torch.randint(C, (N, H, W)), weights(N, H, W)
    labels[:, 3:6] = 255
    logits[(m == 0).unsqueeze(1).expand_as(logits)] = float("nan")
    for smoothing, weight in ((0.0, None), (0.2, torch.rand(C) + 0.1)):
        loss = SegmentationLoss(
            C, net="1", widths=NARROW, class_weight=weight, label_smoothing=smoothing,
            gpl_weight=gpl_weight, reduction=reduction,
            backend=backend if gpl_weight else "auto",
        )  # fmt: skip
        x = logits.clone().requires_grad_()
        target = None if teacher is None else make_target(teacher, SHAPE, loss)
        if teacher == "labels":
            target[:, 9:] = 255
        if teacher == "features":
            target = loss.encode(torch.randn(SHAPE), m)
        got = loss(x, labels, target, m, return_parts=True)["loss_ce"]
        y = logits.nan_to_num().double().requires_grad_()
        each = m * F.cross_entropy(
            y, labels, None if weight is None else weight.double(), ignore_index=255,
            label_smoothing=smoothing, reduction="none",
        )  # fmt: skip
        w = torch.ones(C) if weight is None else weight
        norm = m * w[labels.clamp(max=C - 1)] * (labels != 255)
        dims = (0, 1, 2) if reduction == "mean" else (1, 2)
        want = each.sum(dims) / norm.double().sum(dims)
        want = want.sum() if reduction == "sum" else want
        grads = [torch.autograd.grad(v.sum(), t)[0] for v, t in ((got, x), (want, y))]
        agree((got.detach(), grads[0]), (want.detach().float(), grads[1].float()))


# ------------------------------------------------------------------------- the bits of a bool mask


def ids_of(case: dict[str, Any]) -> str:
    return "-".join(
        str(v) if not isinstance(v, torch.dtype) else dtype_id(v) for v in case.values()
    )


BITS = covering(
    {
        "kind": KINDS,
        "backend": ("reference", "fast"),
        "dtype": (FLOAT, BF16, HALF),
        "activation": ("softmax", "sigmoid", "none"),
        "net": ("1,1", "adapter"),
        "ignore": (None, 255),
    },
    lambda c: c.get("kind", "labels") != "labels" and c.get("ignore") is not None,
    lambda c: 0.0,
)


@pytest.mark.parametrize("case", BITS, ids=ids_of)
def test_zeros_and_ones_have_a_bool_masks_bits(case):
    kind, net = case["kind"], case["net"]
    net = chain(adapter=True) if net == "adapter" else LossNet.vgg(C, (1, 1), widths=NARROW)
    loss = GenericPerceptualLoss(
        C, net, activation=case["activation"], target_activation="same", backend=case["backend"],
        compute_dtype=case["dtype"], ignore_index=case["ignore"],
    )  # fmt: skip
    mask = torch.rand(N, H, W) < 0.7
    mask[:, :9, :9] = True
    pred, own = torch.randn(SHAPE), mask
    given = torch.randn(N, C, 9, 30) if kind == "resized" else make_target(kind, SHAPE, loss)
    if kind == "labels":
        given[:, :9, :9] = 2
        given[:, 12:, 12:] = case["ignore"] or 0
    if kind == "resized":
        own = torch.rand(N, 9, 30) < 0.7
    if kind == "features":
        dense = torch.randn(SHAPE)
        stored = [loss.encode(dense, m) for m in (mask, mask.float())]
        for a, b in zip(*(s.features.values() for s in stored), strict=True):
            assert torch.equal(a, b)
        found = [value_and_grad(loss, pred, s) for s in stored]
        found.append(value_and_grad(loss, pred, stored[1], mask))  # they are the same mask
    else:
        # beside it any floating dtype, and a plane of its own
        masks = (own, own.float(), own.double().unsqueeze(1), own.bfloat16())
        found = [value_and_grad(loss, pred, given, m) for m in masks]
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("teacher", [None, "dense", "topk", "features"])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_of_the_total_too(backend, teacher):
    loss = SegmentationLoss(C, net="1,1", widths=NARROW, backend=backend, label_smoothing=0.1)
    labels, logits = torch.randint(C, (N, H, W)), torch.randn(SHAPE)
    labels[:, 3:6] = 255
    mask = torch.rand(N, H, W) < 0.7
    found = []
    dense = torch.randn(SHAPE)
    for m in (mask, mask.float()):
        given = None
        if teacher == "features":
            given = loss.encode(dense, m)
        elif teacher is not None:
            given = dense if teacher == "dense" else TopK(*dense.softmax(1).topk(2, dim=1))
        found.append(value_and_grad(loss, logits, labels, given, m))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------- against float64


def cost(case: dict[str, Any]) -> float:
    return 0.0


EVERY = covering(
    {
        "kind": KINDS,
        "dtype": (FLOAT, BF16, HALF),
        "layout": tuple(test_fast.LAYOUTS),
        "size": ((9, 26), (17, 22), (1, 8), (32, 12)),
        "ignore": (None, 255, 0),
        "activation": ("softmax", "sigmoid", "none"),
        "rows": (None, 4),
        "net": ("1,1", "2,1", "1"),
    },
    lambda c: (
        (c.get("kind", "labels") != "labels" and c.get("ignore") is not None)
        or (c.get("size") == (1, 8) and c.get("net") not in (None, "1"))
    ),
    cost,
)


def drawn(case: dict[str, Any]) -> tuple[str, Case, Any, None]:
    """Arguments of `test_against_float64` in test_fast.py."""
    small = case["size"] == (1, 8)
    described = Case(
        shape=(2, 5, *case["size"]),
        net={"net": case["net"], "kernel_size": 3, "pool": "stride" if small else "max"},
        options={
            "activation": case["activation"], "temperature": 1.0, "level_weights": None,
            "reduction": "none",
        },
        channels_last=False,
        seed=3,
    )  # fmt: skip
    how = test_fast.How(
        (FLOAT, case["dtype"]), case["layout"], case["rows"], "weights", case["ignore"], "same",
        "uniform", 3,
    )  # fmt: skip
    return case["kind"], described, how, None


def fast_id(case: dict[str, Any]) -> str:
    rest = "-".join(str(v) for k, v in case.items() if k not in ("kind", "dtype"))
    return f"weights-cpu-{dtype_id(case['dtype'])}-{case['kind']}-{rest}"


@pytest.mark.parametrize("case", EVERY, ids=fast_id)
def test_against_float64(case):
    test_fast.test_against_float64.hypothesis.inner_test(*drawn(case))


Total = test_fast.Total
TOTALS = {
    "float32-teacher": Total(True, 0.1, "mean", "auto", 1.0, "softmax", "dense", "weights", False,
                             FLOAT, None, 5, 0),
    "float32-teacher-topk": Total(False, 0.0, "none", True, 2.5, "softmax", "topk", "weights", True,
                                  FLOAT, 4, 5, 1),
    "float32-teacher-resized": Total(False, 0.1, "sum", True, 1.0, "sigmoid", "resized", "weights",
                                     False, FLOAT, None, 19, 2),
    "float32-teacher-features": Total(False, 0.0, "mean", "auto", 1.0, "softmax", "features",
                                      "weights", False, FLOAT, 4, 5, 4),
    "float32-labels": Total(True, 0.1, "mean", "auto", 1.0, "softmax", None, "weights", True, FLOAT,
                            None, 5, 5),
    "bfloat16-teacher": Total(True, 0.0, "sum", "auto", 1.0, "softmax", "dense", "weights", False,
                              BF16, 4, 5, 6),
    "bfloat16-labels": Total(False, 0.1, "mean", False, 1.0, "softmax", None, "weights", False,
                             BF16, None, 19, 7),
    "float16-teacher": Total(False, 0.1, "mean", "auto", 1.0, "softmax", "dense", "weights", False,
                             HALF, None, 5, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", TOTALS, ids=lambda name: f"weights-cpu-{name}")
def test_total_against_float64(name):
    test_fast.test_total_against_float64.hypothesis.inner_test(TOTALS[name])


# -------------------------------------------------------------------------------- what is looked at


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_compiled(backend):
    torch._dynamo.reset()
    m, labels, x = weights(N, H, W), torch.randint(C, (N, H, W)), torch.randn(SHAPE)
    m[:, :8, :9] = 1.0
    total = SegmentationLoss(C, net="1,1", widths=NARROW, backend=backend)
    for loss, args in ((generic(backend), (torch.randn(SHAPE), m)), (total, (labels, None, m))):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        agree(value_and_grad(compiled, x, *args), value_and_grad(loss, x, *args), 1e-6)
        with pytest.raises(ValueError, match="finite ones >= 0"):
            compiled(x, *args[:-1], -m)


def test_what_nobody_looked_at_does_not_count(monkeypatch):
    """As on a GPU, where nothing looks at values unasked: what is not above 0 is selected away."""
    m = weights(N, H, W)
    wild = torch.where(
        m > 0, m, torch.tensor([-1.0, float("nan"), -float("inf")])[torch.randint(3, m.shape)]
    )
    pred, labels = torch.randn(SHAPE), torch.randint(C, (N, H, W))
    cases = [
        (loss, args)
        for backend in ("reference", "fast")
        for loss, args in (
            (generic(backend), (torch.randn(SHAPE),)),
            (generic(backend, target_activation="same"), (torch.randn(N, C, H, W + 3),)),
            (generic(backend), (labels,)),
            (generic(backend), (make_target("topk", SHAPE),)),
            (SegmentationLoss(C, net="1,1", widths=NARROW, backend=backend), (labels, None)),
        )
    ]
    want = [value_and_grad(loss, pred, *args, m) for loss, args in cases]
    monkeypatch.setattr("gpl_fast.targets.values.may_look", lambda t: False)
    for (loss, args), of_clean in zip(cases, want, strict=True):
        for a, b in zip(value_and_grad(loss, pred, *args, wild), of_clean, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_weight_beyond_float16(backend):
    """Where the network computes in it; others hold it."""
    pred, target, m = torch.randn(SHAPE), torch.randn(SHAPE), 7e4 * torch.ones(N, H, W)
    with pytest.raises(ValueError, match=r"at most 65504, float16's largest number"):
        generic(backend, compute_dtype=HALF)(pred, target, m)
    with pytest.raises(ValueError, match=r"at most 65504"):
        generic(backend, compute_dtype=HALF).encode(target, m)
    value, grad = value_and_grad(generic(backend, compute_dtype=BF16), pred, target, m)
    assert value.isfinite()
    assert grad.isfinite().all()
    value, grad = value_and_grad(generic(backend, compute_dtype=HALF), pred, target, m / 2)
    assert value.isfinite()


@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features", "total"])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_inputs_are_not_written_and_masks_get_no_gradient(backend, kind):
    m = weights(N, H, W).requires_grad_()
    pred, before = torch.randn(SHAPE).requires_grad_(), m.detach().clone()
    if kind == "total":
        loss: Any = SegmentationLoss(C, net="1,1", widths=NARROW, backend=backend)
        loss(pred, torch.randint(C, (N, H, W)), mask=m).backward()
    else:
        loss = generic(backend)
        target = (
            loss.encode(torch.randn(SHAPE), m) if kind == "features" else make_target(kind, SHAPE)
        )
        loss(pred, target, m).backward()
    assert torch.equal(m, before)
    assert m.grad is None
    assert pred.grad.any()


def test_features_remember_their_weights(tmp_path):
    loss, m, target = generic("fast"), weights(N, H, W), torch.randn(SHAPE)
    stored, pred = loss.encode(target, m), torch.randn(SHAPE)
    stored.save(tmp_path / "f.safetensors")
    again = type(stored).load(tmp_path / "f.safetensors")
    assert torch.equal(again.valid, m)
    assert again.valid.dtype == FLOAT
    want = loss(pred, stored)
    assert torch.equal(loss(pred, again), want)
    assert torch.equal(loss(pred, again, m.double()), want)  # the same mask
    assert torch.equal(loss(pred, again.to(torch.float64), m), want)
    half = again.to(BF16)
    assert torch.equal(half.valid, m)
    with pytest.raises(ValueError, match="differs from the mask the target features"):
        loss(pred, again, 2 * m)


def test_a_style_target_has_no_mask():
    net, m = LossNet.vgg(3, (1,), widths=NARROW), weights(N, H, W)
    loss = PerceptualLoss(net, {}, {"relu1_1": 1.0})
    pred, style = torch.randn(N, 3, H, W), torch.randn(1, 3, 20, 9)
    got = loss(pred, pred, style, m)
    want = loss(pred * m.unsqueeze(1), pred, style)
    torch.testing.assert_close(got, want)
