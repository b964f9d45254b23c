"""The saved-tensor contract of docs/math.md, section 4: what is kept, what is in it, what it
costs, and both halves apart."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import ATOL, NARROW, call_of, error, every_way, value_and_grad
from saved import Walk, fast_node, left_by, log_sum_exp, network_input, terms, unpack_code
from torch import Tensor, nn

import gpl_fast
from gpl_fast import (
    LPIPS,
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    TopK,
)
from gpl_fast.fast import operator
from gpl_fast.fast.backward import Backward
from gpl_fast.fast.chunk import Chunk
from gpl_fast.fast.forward import Forward
from gpl_fast.fast.plan import Plan
from gpl_fast.net.weights import Weights
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
N, C, H, W = 2, 5, 19, 22
POOLS = ("max", "avg", "stride")


def gpl(**options):
    options = {"net": "2,1", "widths": NARROW, **options}
    return GenericPerceptualLoss(C, backend="fast", **options)


def family(**options):
    net = LossNet.vgg(C, (2, 1), NARROW)
    styles = {"relu1_2": 2.0, "pool1": 1.0}
    return PerceptualLoss(net, {"conv1_2": 1.0, "pool2": 1.0}, styles, backend="fast", **options)


def total(**options):
    return SegmentationLoss(C, net="2,1", widths=NARROW, backend="fast", **options)


def inputs(kind, c=C, h=H, w=W):
    """Prediction and target; some labels are 255."""
    pred, teacher = 2 * torch.randn(2, N, c, h, w)
    if kind == "labels":
        labels = torch.randint(c, (N, h, w))
        labels[:, 2:5, 3:9] = 255
        return pred, labels
    return pred, TopK(*teacher.softmax(1).topk(2, dim=1)) if kind == "topk" else teacher


MASK = torch.arange(N * H * W).view(N, H, W) % 7 != 0
WEIGHTS = MASK * torch.linspace(0.1, 3.0, N * H * W).view(N, H, W)

# A loss, the target's kind, further arguments, and what is kept besides prediction and contract.
VALID = ((N, H, W), torch.bool)
WEIGHED = ((N, H, W), FLOAT)
KEPT = {
    "dense": (gpl, "dense", (), []),
    "mask": (gpl, "dense", (MASK,), [VALID]),
    "labels": (lambda: gpl(ignore_index=255), "labels", (), [VALID]),
    "topk": (gpl, "topk", (), []),
    "sigmoid": (lambda: gpl(activation="sigmoid"), "dense", (), []),
    "avg": (lambda: gpl(pool="avg", level_weights=(1, 2)), "dense", (), []),
    "stride": (lambda: gpl(pool="stride", level_weights=(1, 2)), "topk", (MASK,), [VALID]),
    "bfloat16": (lambda: gpl(compute_dtype=BF16), "dense", (), []),
    "weights": (gpl, "dense", (WEIGHTS,), [WEIGHED]),
    "weights, labels": (lambda: gpl(ignore_index=255), "labels", (WEIGHTS,), [WEIGHED]),
    "weights, topk": (gpl, "topk", (WEIGHTS,), [WEIGHED]),
    "family": (family, "dense", (), []),
    "total": (total, "labels", (), [VALID, ((N, H, W), torch.int16)]),
    # One map serves both terms.
    "weights, total": (total, "labels", (None, WEIGHTS), [WEIGHED, ((N, H, W), torch.int16)]),
    "weights, total, teacher": (
        total, "labels", (torch.randn(N, C, H, W), WEIGHTS), [WEIGHED, ((N, H, W), torch.int16)],
    ),
    "weights, total, topk teacher": (
        total, "labels", (TopK(*torch.rand(N, C, H, W).softmax(1).topk(2, dim=1)), WEIGHTS),
        [WEIGHED, ((N, H, W), torch.int16)],
    ),
    "weighted total": (
        lambda: total(class_weight=[1, 2, 3, 4, 5], temperature=2.0, gpl_ignore=False),
        "labels", (), [((N, H, W), torch.int16), ((C,), FLOAT)],
    ),
}  # fmt: skip


def seen_by_hooks(loss, pred, *args):
    """The value and every tensor that its graph keeps, but numbers for each image."""
    kept = []
    x = pred.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = loss(x, *args)
    weights = {t.data_ptr() for t in loss.net.cached_tensors()}
    assert not weights & {t.data_ptr() for t in kept}
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1
    assert all(t.shape == x.shape for t in kept if t.data_ptr() == x.data_ptr())
    return value, [t for t in kept if t.data_ptr() != x.data_ptr() and t.numel() > N]


def described(tensors):
    return sorted((str(dtype), tuple(shape)) for shape, dtype in tensors)


@pytest.mark.parametrize("name", KEPT)
def test_hooks_see_the_contract_and_nothing_else(name):
    make, kind, args, besides = KEPT[name]
    pred, target = inputs(kind)
    value, kept = seen_by_hooks(make(), pred, target, *args)
    planned, saved = left_by(value)
    want = [*planned.saved().values(), *besides]
    assert described((t.shape, t.dtype) for t in kept) == described(want)
    assert all(t.is_contiguous() for t in saved.values())
    assert planned.bytes_saved() == sum(t.nbytes for t in saved.values())
    assert planned.bytes_saved() == sum(planned.bytes_saved_by_layer().values())
    storages = {t.untyped_storage().data_ptr(): t for t in saved.values()}
    assert len(storages) == len(saved)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in saved.values())  # no hidden rest


def holds_tensor(x):
    if isinstance(x, dict):
        return any(map(holds_tensor, (*x.keys(), *x.values())))
    if isinstance(x, list | tuple | set):
        return any(map(holds_tensor, x))
    return isinstance(x, Tensor) or (hasattr(x, "__dict__") and holds_tensor(vars(x)))


@pytest.mark.parametrize("name", KEPT)
def test_nothing_is_kept_beside_the_saved_tensors(name):
    make, kind, args, _ = KEPT[name]
    pred, target = inputs(kind)
    node = fast_node(make()(pred.requires_grad_(), target, *args))
    attributes = {k: v for k, v in vars(node).items() if k != "metadata"}
    assert isinstance(attributes.pop("weights"), Weights)  # constants: whoever has this network's
    assert attributes
    assert not holds_tensor(attributes)


def test_without_a_gradient_nothing_is_kept():
    pred, target = inputs("dense")
    made = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t) or t, lambda t: t):
        for value in (gpl()(pred, target), family()(pred, target)):
            assert not value.requires_grad
        with torch.no_grad():
            assert not gpl()(pred.requires_grad_(), target).requires_grad
    assert made == []


# --------------------------------------------------------------------------- what is in them


def reference_made(planned, net, pred, target, dtype):
    """All of `Plan.saved` by plain PyTorch in `dtype`, and G' − G and φ' of style taps."""
    with torch.no_grad():
        x, t = pred.to(dtype), target.to(dtype)
        walk = Walk(planned, net)
        e_target = walk(network_input(planned, net, t, None))
        e_pred = walk(network_input(planned, net, x, None))
        made = dict(walk.made)
        if planned.call.activation == "softmax":
            made["lse"] = log_sum_exp(x, planned.call.temperature)
        for tap, _ in planned.call.features:
            made[f"diff.{tap}"] = (e_pred[tap] - e_target[tap]).permute(0, 2, 3, 1)
        for tap, _ in planned.call.styles:
            made[f"phi.{tap}"] = e_pred[tap].permute(0, 2, 3, 1)
            flat = [e[tap].flatten(2) for e in (e_pred, e_target)]
            a, b = (f @ f.transpose(1, 2) / e_pred[tap][0].numel() for f in flat)
            made[f"gram.{tap}"] = a - b
    return {name: made[name].to(kind).contiguous() for name, (_, kind) in planned.saved().items()}


SAVING = {
    **{pool: lambda pool=pool, **o: gpl(pool=pool, **o) for pool in POOLS},
    "levels": lambda **o: gpl(net="2,2,1", level_weights=(1, 0.5, 2), temperature=2.0, **o),
    "stride levels": lambda **o: gpl(pool="stride", level_weights=(1, 2), **o),
    "sigmoid": lambda **o: gpl(activation="sigmoid", kernel_size=5, **o),
    "family": family,
}


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", SAVING)
def test_what_the_forward_saves_is_the_references(name, rows, decide):
    decide(rows=rows)
    loss, (pred, target) = SAVING[name](), inputs("dense")
    planned, saved = left_by(loss(pred.requires_grad_(), target))
    made = reference_made(planned, loss.net, pred.detach(), target, torch.float64)
    assert list(saved) == list(made)
    for key, want in made.items():
        got = saved[key]
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if got.dtype == torch.uint8:  # rounding may swap two equal values, hardly ever here
            assert (got != want).double().mean() < 1e-3
        else:
            assert error(got, want.double()) < ATOL[FLOAT]
    walk = Walk(planned, loss.net, saved)
    walk(network_input(planned, loss.net, pred.detach().double(), None))
    assert walk.slack < 1e-6


def whole_numbers(pool):
    """A network whose arithmetic is exact in every dtype: ties everywhere, decided by the rule."""
    layers = [nn.Conv2d(C, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 7, 1), nn.ReLU(), pool,
              nn.Conv2d(7, 3, 3, padding=1), nn.ReLU(), pool]  # fmt: skip
    for m in layers:
        if isinstance(m, nn.Conv2d):
            m.weight.data = (torch.randn(m.weight.shape) * 0.4).round().clamp(-1, 1)
            m.bias.data = torch.randint(-1, 2, m.bias.shape).float()
    return LossNet.from_sequential(nn.Sequential(*layers))


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)], ids=("max", "avg"))
def test_ties_and_zeros_bit_by_bit(pool, dtype, rows, decide):
    decide(rows=rows)
    net = whole_numbers(pool)
    features = {"conv1_1": 1.0, "relu1_2": 1.0, "pool1": 1.0}
    if dtype == FLOAT:
        features |= {"relu2_1": 1.0, "pool2": 1.0}
    loss = PerceptualLoss(net, features, backend="fast", compute_dtype=dtype)
    pred, target = torch.randint(0, 2, (2, N, C, H, W)).float()
    planned, saved = left_by(loss(pred.clone().requires_grad_(), target))
    made = reference_made(planned, net, pred, target, torch.float64)
    for key, want in made.items():
        assert torch.equal(saved[key], want), key
    if pool.__class__ is nn.MaxPool2d:
        code = unpack_code(saved["code.pool1"], 7)
        assert set(code.unique().tolist()) == {0, 1, 2, 3, 4}
    if dtype == FLOAT:
        oracle = PerceptualLoss(net, features, backend="reference")
        got, want = (value_and_grad(f, pred, target) for f in (loss, oracle))
        assert error(got[0], want[0]) < 1e-6
        assert error(got[1], want[1]) < 1e-6


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 3.0])
def test_log_sum_exp_of_both_terms(activation, temperature):
    loss = total(activation=activation, temperature=temperature)
    logits, labels = inputs("labels")
    logits = 8 * logits
    _, saved = left_by(loss(logits.requires_grad_(), labels))
    x = logits.detach()
    assert ("lse" in saved) == (activation == "softmax")
    assert ("ce_lse" in saved) == (activation != "softmax" or temperature != 1.0)
    valid = labels != 255
    for name, t in (("lse", temperature), ("ce_lse", 1.0)):
        if name in saved:
            assert error(saved[name][valid], log_sum_exp(x, t)[valid]) < 1e-6


# ------------------------------------------------------------------------------ both halves apart


def halves(loss, pred, target):
    """Plan, targets and weights by name, as the walks take them."""
    planned, _ = left_by(loss(pred.clone().requires_grad_(), target))
    return planned, {"dense": target}, operator._packs(planned.call, pred)


@every_way
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", SAVING)
def test_backward_reads_reference_made_tensors(name, rows, decide):
    decide(rows=rows)
    loss, (pred, target) = SAVING[name](), inputs("dense")
    planned, _, packs = halves(loss, pred, target)
    made = reference_made(planned, loss.net, pred, target, torch.float64)
    g = torch.tensor([[1.0, -2.0], [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]])  # of each image
    got = Backward(planned, pred, {}, packs, made, g).run()
    nhwc = pred.contiguous(memory_format=torch.channels_last)
    got_nhwc = Backward(planned, nhwc, {}, packs, made, g).run()
    assert got_nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got_nhwc, got)

    x = pred.double().requires_grad_()
    walk = Walk(planned, loss.net)
    with torch.no_grad():
        e_target = walk(network_input(planned, loss.net, target.double(), None))
    each = terms(planned, walk(network_input(planned, loss.net, x, None)), e_target)
    (want,) = torch.autograd.grad(each, x, g[0].double())
    assert error(got, want) < ATOL[FLOAT]


@pytest.mark.parametrize("name", SAVING)
def test_forward_alone(name):
    """`keep` changes what is kept and not a bit of the terms."""
    loss, (pred, target) = SAVING[name](), inputs("dense")
    planned, tensors, packs = halves(loss, pred, target)
    terms_kept, saved = Forward(planned, pred, tensors, packs, True).run()
    terms_alone, _ = Forward(planned, pred, tensors, packs, False).run()
    assert torch.equal(terms_kept, terms_alone)
    made = reference_made(planned, loss.net, pred, target, torch.float64)
    for key in made:
        if made[key].dtype != torch.uint8:
            assert error(saved[key], made[key].double()) < ATOL[FLOAT]


# ------------------------------------------------------------------------------- poisoned memory


def poison(monkeypatch):
    """Memory holds NaN, or every bit set, when it is taken: what is not written shows, and what is
    still read shows too."""

    def filled(make):
        def wrapped(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else -1 % 256)

        return wrapped

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(Chunk, "take", filled(Chunk.take))


POISONED = {
    "dense": (lambda: gpl(level_weights=(1, 1)), "dense", ()),
    "mask": (gpl, "dense", (MASK,)),
    "labels": (lambda: gpl(ignore_index=255), "labels", ()),
    "topk": (gpl, "topk", (MASK,)),
    "features": (gpl, "features", ()),
    "avg": (lambda: gpl(pool="avg", kernel_size=5), "labels 0", ()),
    "stride": (lambda: gpl(pool="stride", level_weights=(1, 1)), "topk", ()),
    "bfloat16": (lambda: gpl(compute_dtype=BF16), "dense", ()),
    "l1": (lambda: gpl(criterion="l1", level_weights=(1, [1] * 8)), "dense", ()),
    "normalized": (lambda: gpl(normalize_features=True, compute_dtype=HALF), "topk", (MASK,)),
    "normalized, features": (lambda: gpl(normalize_features=True), "features", ()),
    "spatial": (lambda: LPIPS(LossNet.vgg(C, (2, 1)), spatial=True, backend="fast"), "dense", ()),
    "spatial, float16": (
        lambda: LPIPS(LossNet.vgg(C, (2, 1)), spatial=True, backend="fast", compute_dtype=HALF),
        "dense",
        (MASK,),
    ),
    "family": (family, "dense", (None, MASK)),
    "weights": (gpl, "topk", (WEIGHTS,)),
    "weights, total": (total, "labels", (None, WEIGHTS)),
    "total": (lambda: total(class_weight=[1, 2, 3, 4, 5], temperature=2.0), "labels", ()),
}


@every_way
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", POISONED)
def test_walks_write_all_that_they_read(name, rows, decide, monkeypatch):
    decide(rows=rows)
    make, kind, args = POISONED[name]
    loss, (pred, target) = make(), inputs(kind.split()[0])
    if kind == "labels 0":
        target = target.clamp(max=C - 1)
    if kind == "features":
        target = loss.encode(target)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = pred.contiguous(memory_format=layout)
        value, grad = value_and_grad(loss, x, target, *args)
        _, saved = left_by(loss(x.requires_grad_(), target, *args))
        with monkeypatch.context() as patch:
            poison(patch)
            assert torch.empty(2).isnan().all()
            again, grad_again = value_and_grad(loss, x, target, *args)
            _, saved_again = left_by(loss(x.requires_grad_(), target, *args))
        assert torch.equal(again, value)
        assert torch.equal(grad_again, grad)
        for key in saved:
            assert torch.equal(saved[key], saved_again[key]), key


# ------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize(
    "name",
    ["dense", "labels", "topk", "l1", "normalized", "spatial", "family", "total", "weights, total"],
)
def test_opcheck(name, monkeypatch):
    """Schema, fake kernels and tracing of the two operators on the arguments of a real call."""
    make, kind, args = POISONED[name]
    pred, target = inputs(kind)
    calls = {}
    operators = torch.ops.gpl_fast

    class Recorder:
        def __getattr__(self, op):
            if op not in ("perceptual_fwd", "perceptual_bwd"):
                return getattr(operators, op)

            def call(*arguments):
                calls[op] = arguments
                return getattr(operators, op)(*arguments)

            return call

    monkeypatch.setattr(torch.ops, "gpl_fast", Recorder())
    loss = make()  # held: its network is not among the arguments
    value_and_grad(loss, pred, target, *args)
    monkeypatch.undo()
    assert set(calls) == {"perceptual_fwd", "perceptual_bwd"}
    for op, called in calls.items():
        arguments = [
            a.detach() if isinstance(a, Tensor)
            else [t.detach() for t in a] if isinstance(a, list | tuple) else a
            for a in called
        ]  # fmt: skip
        torch.library.opcheck(getattr(operators, op).default, arguments)


# --------------------------------------------------------------------------------------- budgets


def kept_bytes(loss, pred, *args):
    _, kept = seen_by_hooks(loss, pred, *args)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("c", [19, 847])
@pytest.mark.parametrize("kind", ["dense", "labels", "total", "total, teacher"])
def test_25_bytes_a_pixel_whatever_the_classes(kind, c):
    options = {"net": LossNet.vgg(c), "backend": "fast", "ignore_index": 65535}
    make = SegmentationLoss if kind.startswith("total") else GenericPerceptualLoss
    pred, target = torch.randn(1, c, 64, 64), torch.randn(1, c, 64, 64)
    labels = torch.randint(c, (1, 64, 64))
    labels[:, :5] = 65535
    args = {"dense": (target,), "total, teacher": (labels, target)}.get(kind, (labels,))
    pixels = 64 * 64
    # codes 8 + 4 + 2 + 1 + 1/4, diff 2, lse 4; valid 1, labels of the cross-entropy 2
    besides = {"dense": 0, "labels": 1, "total": 3, "total, teacher": 2}[kind]
    assert kept_bytes(make(c, **options), pred, *args) == (21.25 + besides) * pixels
    assert 21.25 + besides <= 25


def planned_bytes(
    net, features, styles=None, dtype=FLOAT, activation="softmax", size=(1, 64, 96)
):  # fmt: skip
    """Bytes a pixel of an input of N, H, W."""
    styles = tuple((styles or {}).items())
    call = call_of(net, features, styles=styles, activation=activation, dtype=dtype)
    return Plan(call, *size).bytes_saved() / math.prod(size)


LEVELS = {f"pool{b}": 1.0 for b in range(1, 6)}
JOHNSON = dict.fromkeys(("relu1_2", "relu2_2", "relu3_3", "relu4_3"), 1.0)


def test_stated_budgets():
    vgg16, vgg19 = LossNet.vgg(3, (2, 2, 3, 3, 3)), LossNet.vgg(19, (2, 2, 4, 4, 4))
    one, many = LossNet.vgg(19), LossNet.vgg(847)
    codes, masks = 8 + 4 + 2 + 1 + 1 / 4, 8 + 4 + 3 * 2 + 3 * 1 + 3 / 4
    levels = 16 + 8 + 4 + 2 + 1 / 2  # elements of the pools a pixel
    # The taps sit before their pools: a mask beside each code, and no pool after the last.
    taps, tap_masks = 64 + 32 + 16 + 8, 8 + 8 + 4 + 4 + 3 * 2 + 3 * 1
    last = {"pool5": 1.0}
    for dtype, diff in ((FLOAT, 4), (BF16, 2)):
        for net in (one, many):
            for size in ((1, 64, 96), (4, 512, 512)):
                assert planned_bytes(net, last, dtype=dtype, size=size) == 4 + codes + diff / 2
        assert planned_bytes(vgg19, last, dtype=dtype) == 4 + codes + masks + diff / 2
        assert planned_bytes(one, LEVELS, dtype=dtype) == 4 + codes + diff * levels
        johnson = planned_bytes(vgg16, JOHNSON, dtype=dtype, activation="none")
        assert johnson == 8 + 4 + 2 + tap_masks + diff * taps
        grams = 4 * sum(c * c for c in (64, 128, 256, 512)) / (64 * 96)
        for features, elements in (({}, taps), ({"relu2_2": 1.0}, taps + 32)):
            johnson = planned_bytes(vgg16, features, JOHNSON, dtype=dtype, activation="none")
            assert johnson == pytest.approx(8 + 4 + 2 + tap_masks + diff * elements + grams)


def test_the_johnson_taps_cost_what_is_planned():
    net = LossNet.vgg(3, (2, 2, 3, 3, 3))
    loss = PerceptualLoss(net, {"relu2_2": 1.0}, JOHNSON, backend="fast")
    pred, target = torch.rand(2, 1, 3, 32, 32)
    value, kept = seen_by_hooks(loss, pred, target)
    assert sum(t.nbytes for t in kept) == left_by(value)[0].bytes_saved()


# ------------------------------------------------------------------------------------------ calls


def test_a_step_makes_few_calls_of_python():
    """Of functions in the package, as Python 3.11 counts; from 3.12 on comprehensions are none."""
    loss, labels = GenericPerceptualLoss(3), torch.randint(3, (1, 32, 32))
    x = torch.randn(1, 3, 32, 32, requires_grad=True)

    def step():
        loss(x, labels).backward()
        x.grad = None

    for _ in range(3):
        step()
    package = f"{Path(gpl_fast.__file__).parent}{os.sep}"
    calls = Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert 0 < calls.total() <= 220, calls.most_common(20)
