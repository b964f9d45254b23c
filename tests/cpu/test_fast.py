"""The fast path's losses against the reference in float64.

Values: err(fast, float64) <= 2 err(reference in the same dtype, float64) + atol, where no reference
is luckier than one rounding. Gradients: two values that are equal but for rounding may swap as the
winners of a pooling window, and the gradient then moves as a whole. So the truth goes through the
winners and signs that the fast path saved (`saved.Walk`), which must be the definition's but for
rounding, and the bound on the gradient is that of rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ATOL, NARROW, call_of, error, every_way, value_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import peak_bytes
from policies import ARITHMETIC, decided, told_chunks
from saved import Walk, left_by, network_input, terms
from strategies import Case, case
from torch import Tensor, nn

from gpl_fast import (
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    TargetFeatures,
    TopK,
    reference,
)
from gpl_fast.fast.branch import carried
from gpl_fast.fast.grid import GRID
from gpl_fast.fast.memory import peak
from gpl_fast.fast.policy import MIB
from gpl_fast.net import weights
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# (prediction, compute_dtype)
DTYPES = [(FLOAT, None), (FLOAT, None), (FLOAT, BF16), (FLOAT, HALF), (BF16, None), (HALF, None),
          (BF16, FLOAT), (HALF, FLOAT)]  # fmt: skip
# Gradient against the truth through the same routes, and how far those are from the definition's.
ROUTED = {FLOAT: ATOL[FLOAT], BF16: 0.06, HALF: 0.01}
SLACK = {FLOAT: 1e-5, BF16: 0.02, HALF: 0.002}
RESTS = ("renormalize", "uniform", "drop")


def sliced(x: Tensor) -> Tensor:
    """The same values with no stride of 1."""
    n, c, h, w = x.shape
    view = torch.full((n, 2 * c, h, 2 * w), 9.0, dtype=x.dtype)[:, ::2, :, ::2]
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "sliced": sliced,
}


@dataclass
class How:
    """What a case adds to `strategies.Case`."""

    dtypes: tuple[torch.dtype, torch.dtype | None]
    layout: str
    rows: int | None  # of a strip; None: the plan's own choice
    masked: bool | str  # "weights": by numbers
    ignore: int | None
    target_activation: str
    rest: str
    k: int
    arithmetic: str = "float32"


hows = st.builds(
    How,
    dtypes=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    rows=st.sampled_from([None, 2, 4, 8]),
    masked=st.booleans(),
    ignore=st.sampled_from([None, 255, 0]),
    target_activation=st.sampled_from(["same", "same", "none", "sigmoid"]),
    rest=st.sampled_from(RESTS),
    k=st.integers(1, 3),
    arithmetic=st.sampled_from(ARITHMETIC),
)


def doubled(target: Any) -> Any:
    """The same target in float64, where it is floating."""
    if isinstance(target, TopK):
        return TopK(target.values.double(), target.indices, target.rest)
    return target.double() if target.is_floating_point() else target


def check_value(got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    floor = torch.finfo(dtype).eps
    assert error(got, truth) <= 2 * max(error(plain, truth), floor) + ATOL[dtype]


def check_gradient(got: Tensor, routed: Tensor, walk: Walk, dtype: torch.dtype) -> None:
    assert walk.slack <= SLACK[dtype]
    assert error(got, routed) <= ROUTED[dtype]


def coarser(*dtypes: torch.dtype | None) -> torch.dtype:
    return max((d for d in dtypes if d is not None), key=lambda d: torch.finfo(d).eps)


def reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() / (max(len(values), 1) if reduction == "mean" else 1)


# ------------------------------------------------------------------------ against float64, drawn


def drawn_target(kind: str, c: Case, how: How, loss: GenericPerceptualLoss) -> Any:
    n, channels, h, w = c.shape
    if kind == "labels":
        labels = c.labels()
        return torch.where(c.mask(0.8), labels, how.ignore) if how.ignore == 255 else labels
    if kind == "topk":
        return c.topk(how.rest, min(how.k, channels))
    if kind == "features":
        return loss.encode(c.maps(), drawn_mask(c, how))
    dense = c.maps().to(how.dtypes[0])
    if kind == "resized":
        size = (max(1, h - 1 - c.seed % 5), max(1, (w * 3) // 2 - c.seed % 7))
        return dense[:, :, :1, :1] + torch.randn(n, channels, *size, generator=c.generator)
    return LAYOUTS[how.layout](dense)


def weights_of(mask: Tensor) -> Tensor:
    """A mask of numbers that counts the same pixels: many 1, others anything."""
    m = torch.where(torch.rand(mask.shape) < 0.5, 1.0, 3 * torch.rand(mask.shape))
    return m * mask


def drawn_mask(c: Case, how: How) -> Tensor | None:
    if how.masked == "weights":
        return weights_of(c.mask())
    return c.mask() if how.masked else None


def among(mask: Tensor | None, counted: Tensor) -> Tensor:
    """The mask where pixels are counted too."""
    return counted if mask is None else torch.where(counted, mask, 0).to(mask.dtype)


def valid_pixels(kind: str, target: Any, mask: Tensor | None, ignore: int | None) -> Tensor | None:
    if kind == "features":
        return target.valid
    if kind != "labels" or ignore is None:
        return mask
    return among(mask, target != ignore)


def truth_and_routed(loss64, value: Tensor, pred: Tensor, target: Any, valid, kind: str):
    """The definition in float64 with the gradient through the routes that `value` saved: the
    values (N,), the leaf, the walk."""
    p, saved = left_by(value)
    walk, x = Walk(p, loss64.net, saved), pred.double().requires_grad_()
    e_pred = walk(network_input(p, loss64.net, x, valid))
    if kind == "features":
        e_target = {tap: e.double() for tap, e in target.features.items()}
    else:
        t = doubled(target)
        if kind == "resized":
            t = F.interpolate(t, pred.shape[2:], mode="bilinear") if len(t) else pred.double()
        mask = torch.ones(pred[:, 0].shape, dtype=torch.bool) if valid is None else valid
        e_target = loss64.encode(t, mask).features
    return terms(p, e_pred, e_target), x, walk


@settings(max_examples=45)
@given(c=case(), how=hows, wide=st.sampled_from([None] * 6 + [7, 19, 150]))
@pytest.mark.parametrize("kind", ["dense", "resized", "labels", "topk", "features"])
def test_against_float64(kind, c: Case, how: How, wide):
    if wide is not None and c.shape[1] > 1:
        c = replace(c, shape=(min(c.shape[0], 2), wide, *c.shape[2:]))
    if c.shape[1] == 1 and kind == "topk":
        how = replace(how, k=1)
    activations = {"target_activation": how.target_activation} if kind == "dense" else {}
    options = {"ignore_index": how.ignore if kind == "labels" else None, **activations}
    compute = how.dtypes[1]
    net = c.loss().net
    loss64 = c.loss(compute_dtype=torch.float64, backend="reference", **options)
    pred = LAYOUTS[how.layout](c.maps().to(how.dtypes[0]))
    target = drawn_target(kind, c, how, c.loss(**activations))
    mask = drawn_mask(c, how) if kind != "features" else None
    valid = valid_pixels(kind, target, mask, options["ignore_index"])
    loss64.net = net

    if kind == "features":
        dtype = compute or FLOAT
        stored = replace(target, features={k: e.double() for k, e in target.features.items()})
        truth, grad64 = value_and_grad(loss64, pred.double(), stored, mask)
    else:
        dtype = compute or how.dtypes[0]
        truth, grad64 = value_and_grad(loss64, pred.double(), doubled(target), mask)
    # Float16 predictions have float16 gradients: as in training, scaled to a good range.
    scale = 1 / float(grad64.abs().max()) if grad64.any() else 1.0
    plain = c.loss(compute_dtype=compute, backend="reference", **options)(pred, target, mask)

    with decided(rows=how.rows, arithmetic=how.arithmetic):
        loss = c.loss(compute_dtype=compute, backend="fast", **options)
        x = pred.detach().requires_grad_()
        value = loss(x, target, mask)
        each, x64, walk = truth_and_routed(loss64, value, pred, target, valid, kind)
        (grad,) = torch.autograd.grad(value.sum() * scale, x)
    value64 = reduced(each, c.options["reduction"])
    (routed,) = torch.autograd.grad(value64.sum() * scale, x64)

    assert error(value64.detach(), truth) < 1e-6  # the walk is the definition
    assert value.shape == truth.shape
    assert value.dtype == FLOAT
    assert grad.dtype == pred.dtype
    check_value(value.detach(), plain, truth, coarser(dtype))
    check_gradient(grad, routed, walk, coarser(dtype, pred.dtype))
    if valid is not None:
        assert not grad.masked_select((valid == 0).unsqueeze(1)).any()


# -------------------------------------------------------------------------- two ways to the same


CLOSE = {FLOAT: 5e-6, BF16: 0.03, HALF: 0.005}
few = settings(max_examples=15)


def fast(channels: int, blocks: str = "1,2", **options: Any) -> GenericPerceptualLoss:
    return GenericPerceptualLoss(channels, blocks, widths=NARROW, backend="fast", **options)


def close(got, want, tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < tolerance


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("c", [3, 19, 150])
def test_labels_are_their_one_hot_map(c, kernel):
    pred, labels = 2 * torch.randn(2, c, 13, 18), torch.randint(c, (2, 13, 18))
    labels[:, 3:7, 2:9] = 255
    hot = F.one_hot(labels.clamp(max=c - 1), c).permute(0, 3, 1, 2).float()
    got = value_and_grad(fast(c, kernel_size=kernel, ignore_index=255), pred, labels)
    plain = fast(c, kernel_size=kernel, target_activation="none")
    close(got, value_and_grad(plain, pred, hot, labels != 255), CLOSE[FLOAT])


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize(("c", "k"), [(3, 3), (19, 4), (150, 5)])
def test_topk_is_its_dense_map(c, k, rest):
    pred, teacher = 2 * torch.randn(2, c, 13, 18), torch.randn(2, c, 13, 18).softmax(dim=1)
    top = TopK(*teacher.topk(k, dim=1), rest)
    dense = torch.zeros_like(teacher).scatter(1, top.indices, top.values)
    total = top.values.sum(dim=1, keepdim=True)
    if rest == "renormalize":
        dense = dense / total
    elif rest == "uniform" and k < c:
        dense = torch.where(dense > 0, dense, (1 - total) / (c - k))
    got = value_and_grad(fast(c), pred, top)
    close(got, value_and_grad(fast(c, target_activation="none"), pred, dense), CLOSE[FLOAT])


def target_of(kind: str, pred: Tensor, loss: GenericPerceptualLoss) -> Any:
    n, c, h, w = pred.shape
    if kind == "labels":
        return torch.randint(c, (n, h, w))
    if kind == "resized":
        return torch.randn(n, c, h // 2, w + 3)
    teacher = torch.randn(n, c, h, w)
    if kind == "topk":
        return TopK(*teacher.softmax(dim=1).topk(min(2, c), dim=1), "uniform")
    return loss.encode(teacher) if kind == "features" else teacher


KINDS = ("dense", "resized", "labels", "topk", "features")


@every_way
@pytest.mark.parametrize("rows", [2, 4, 8, "images"])
@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_whole(kind, pool, rows, arithmetic, decide):
    kernel = 5 if arithmetic == "own" else 3
    loss = fast(3, "2,1,1", pool=pool, kernel_size=kernel, level_weights=(0.5, 1, 2))
    pred = 2 * torch.randn(3, 3, 29, 22)
    target, mask = target_of(kind, pred, loss), torch.rand(3, 29, 22) < 0.9
    mask = None if kind == "features" else mask
    whole = value_and_grad(loss, pred, target, mask)
    if rows == "images":
        planned, _ = left_by(loss(pred.clone().requires_grad_(), target, mask))
        decide(strip_mb=(peak(planned, (1,) * len(planned.rows), planned.rows) + 1) / MIB)
        assert left_by(loss(pred.clone().requires_grad_(), target, mask))[0].images[0] == 1
    else:
        decide(rows=rows)
    chunked = value_and_grad(loss, pred, target, mask)
    close(chunked, whole, CLOSE[FLOAT])
    again = value_and_grad(loss, pred, target, mask)
    assert all(map(torch.equal, again, chunked))  # deterministic for the same chunks


@every_way
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_chunks_of_the_total_are_the_whole(kind, rows, decide):
    total = SegmentationLoss(4, net="1,1", widths=NARROW, backend="fast", label_smoothing=0.1)
    logits, labels = torch.randn(2, 4, 23, 18), torch.randint(4, (2, 23, 18))
    labels[1, 5:12] = 255
    teacher = torch.randn(2, 4, 23, 18) if kind == "dense" else None
    whole = value_and_grad(total, logits, labels, teacher)
    decide(rows=rows)
    close(value_and_grad(total, logits, labels, teacher), whole, CLOSE[FLOAT])


@every_way
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_threads_do_not_change_a_bit(kind, dtype):
    loss = fast(5, "1,1,1")
    pred = torch.randn(2, 5, 40, 33).to(dtype)
    target = target_of(kind, pred, loss)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(value_and_grad(loss, pred, target))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@every_way
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
def test_a_prediction_equal_to_its_target_gives_zero(pool, activation, dtype, rows, decide):
    decide(rows=rows)
    loss = fast(5, "2,1", pool=pool, activation=activation, temperature=1.7, level_weights=(1, 1))
    pred = (5 * torch.randn(2, 5, 17, 14)).to(dtype)
    for target in (pred, LAYOUTS["channels_last"](pred), pred.float()):
        value, grad = value_and_grad(loss, pred, target)
        assert value == 0
        assert not grad.any()


# ------------------------------------------------------------------------------- stored features


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("c", [1, 3])
def test_a_confident_sigmoid_keeps_its_difference_to_labels(c, dtype):
    """Where 1 - y' is below the rounding of y', float32 PyTorch has no gradient left."""
    labels = torch.randint(max(c, 2), (2, 8, 10))
    one = labels.unsqueeze(1) == (1 if c == 1 else torch.arange(c).view(1, c, 1, 1))
    pred = torch.where(one, 1.0, -1.0) * (17 + 3 * torch.rand(one.shape))
    options = {"activation": "sigmoid", "pool": "avg", "kernel_size": 1}
    exact = GenericPerceptualLoss(c, "1", widths=NARROW, backend="reference", **options)
    truth = value_and_grad(exact, pred.double(), labels)
    tolerance = 1e-4 if dtype == FLOAT else 0.02
    close(value_and_grad(fast(c, "1", compute_dtype=dtype, **options), pred, labels),
          truth, tolerance)  # fmt: skip


@every_way
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("masked", [False, True])
def test_encode_is_the_reference_in_chunks(masked, dtype):
    net = LossNet.vgg(5, (2, 1), widths=(64, 40))
    target, mask = torch.randn(3, 5, 33, 26), torch.rand(3, 33, 26) > 0.2
    options = {"level_weights": (1.0, 1.0), "compute_dtype": dtype}

    def features(backend: str, target: Tensor, mask: Tensor | None, **more: Any) -> TargetFeatures:
        loss = GenericPerceptualLoss(5, net, backend=backend, **{**options, **more})
        return loss.encode(target, mask if masked else None)

    fast = features("fast", sliced(target), mask, workspace_mb=0.8)
    plain = features("reference", target, mask)
    truth = features("reference", target.double(), mask, compute_dtype=torch.float64)
    assert fast.settings == plain.settings
    for name, e in truth.features.items():
        got, same = fast.features[name], plain.features[name]
        assert (got.shape, got.dtype) == (same.shape, same.dtype)
        assert error(got, e) <= 2 * error(same, e) + ATOL[dtype]
    with pytest.raises(ValueError, match=r"workspace_mb: got 0\.1, expected at least 1"):
        features("fast", target, mask, workspace_mb=0.1)


# ----------------------------------------------------------------------------- near convergence


def peaked(c: int, raised: float, region: int) -> tuple[Tensor, Tensor]:
    """Logits of unit noise with the right class raised, and the labels, constant in squares."""
    coarse = torch.randint(c, (1, 64 // region, 64 // region))
    labels = coarse.repeat_interleave(region, dim=1).repeat_interleave(region, dim=2)
    logits = torch.randn(1, c, 64, 64)
    return logits.scatter_add(1, labels.unsqueeze(1), torch.full((1, 1, 64, 64), raised)), labels


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()))


# C, how much the right class is raised, side of the regions of one class, bound on the value's
# error
PEAKED = [
    *((19, raised, region, 0.05) for raised in (0.0, 4.0, 8.0) for region in (1, 8)),
    *((150, raised, region, 0.05) for raised in (0.0, 6.0, 10.0, 12.0) for region in (1, 8)),
    (847, 0.0, 8, 0.05),
    *((1203, 14.0, region, 0.1) for region in (1, 8)),
]


@every_way
@pytest.mark.parametrize(
    ("c", "raised", "region", "bound", "kind"),
    [
        (*drawn, kind)
        for drawn in PEAKED
        for kind in ("labels", "teacher", "one-hot", "top-k")
        if drawn[0] <= 150 or kind in ("labels", "teacher")
    ],
)
def test_bfloat16_holds_from_flat_to_peaked_maps(c, raised, region, bound, kind):
    if c == 1203:  # a draw whose cosine is 0.94 where the first layer's z' is bfloat16
        torch.manual_seed(8)
    logits, labels = peaked(c, raised, region)
    logits = logits.bfloat16().float()
    options: dict[str, str] = {}
    target: Any = labels
    if kind == "one-hot":
        target, options = reference.one_hot(labels, c, FLOAT), {"target_activation": "none"}
    elif kind == "top-k":
        target = TopK(torch.ones(1, 1, 64, 64), labels.unsqueeze(1))
    elif kind == "teacher":
        target = (logits + 0.5 * torch.randn_like(logits)).bfloat16()
    net = LossNet.vgg(c)
    exact = GenericPerceptualLoss(c, net, backend="reference", **options)
    truth, grad64 = value_and_grad(exact, logits.double(), doubled(target))
    loss = GenericPerceptualLoss(c, net, backend="fast", **options)
    got = {dtype: value_and_grad(loss, logits.to(dtype), target) for dtype in (FLOAT, BF16)}
    assert error(got[FLOAT][0], truth) < 1e-3
    assert cosine(got[FLOAT][1], grad64) >= 0.99
    assert error(got[BF16][0], truth) < bound
    assert cosine(got[BF16][1], grad64) >= 0.95


@every_way
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_bfloat16_is_as_exact_as_with_weights_rounded_one_by_one(kind, monkeypatch):
    """Noise, where carrying a tap's rounding error on gains nothing: against PyTorch's rounding."""
    for c, scale in ((5, 1.0), (19, 3.0)):
        pred = (scale * torch.randn(2, c, 37, 48)).bfloat16().float()
        target = pred + torch.randn_like(pred) if kind == "dense" else torch.randint(c, (2, 37, 48))

        def make(backend, dtype, c=c):
            net = LossNet.vgg(c, seed=2101)  # no other test's, whose weights are there already
            return GenericPerceptualLoss(c, net, backend=backend, compute_dtype=dtype)

        _, truth = value_and_grad(make("reference", None), pred.double(), doubled(target))
        _, grad = value_and_grad(make("fast", BF16), pred, target)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "rounded", lambda w, dtype: w.to(dtype))
            _, stock = value_and_grad(make("reference", BF16), pred, target)
        assert not torch.equal(stock, value_and_grad(make("reference", BF16), pred, target)[1])
        assert error(grad, truth) <= 2 * error(stock, truth)


@pytest.mark.parametrize("images", [(1, 3), (1, 2, 3), (2, 3), (1, 1, 3), (2, 2, 5)], ids=str)
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_by_segment_are_the_whole(kind, rows, images, decide, monkeypatch):
    loss = PerceptualLoss(
        LossNet.vgg(3, (2, 1, 1), NARROW), {"pool1": 1.0, "relu2_1": 0.5, "pool3": 2.0},
        {} if kind == "features" else {"pool2": 1.0}, backend="fast", reduction="none",
    )  # fmt: skip
    pred = 2 * torch.randn(5, 3, 29, 22)
    target, mask = target_of(kind, pred, loss), torch.rand(5, 29, 22) < 0.9
    mask = None if kind == "features" else mask
    whole = value_and_grad(loss, pred, target, mask)
    decide()  # a plan of its own
    told_chunks(monkeypatch, images, rows)
    chunked = value_and_grad(loss, pred, target, mask)
    planned, _ = left_by(loss(pred.clone().requires_grad_(), target, mask))
    assert planned.images[0] < planned.images[-1]
    close(chunked, whole, CLOSE[FLOAT])


def test_the_target_is_carried_only_where_it_is_near_and_constant_in_regions():
    net = LossNet.vgg(19, (1,))

    def found(logits: Tensor, dtype: torch.dtype = BF16, **target: Tensor) -> list[bool]:
        return carried(call_of(net, dtype=dtype), logits, target, 2**30).tolist()

    (near, labels), (flat, other) = peaked(19, 8.0, 8), peaked(19, 0.0, 8)
    both, all_labels = torch.cat([near, flat]), torch.cat([labels, other])
    assert found(both, labels=all_labels) == [True, False]
    assert found(both, FLOAT, labels=all_labels) == [False, False]
    assert found(both, dense=both) == [False, False]
    one_hot = 30 * reference.one_hot(all_labels, 19, FLOAT)
    assert found(both, dense=one_hot) == [True, False]
    assert found(both, dense=one_hot[..., ::2, ::2]) == [True, False]
    noise, scattered = peaked(19, 8.0, 1)
    assert found(noise, labels=scattered) == [False]
    values, indices = torch.full((2, 2, 64, 64), 0.5), all_labels.unsqueeze(1).expand(-1, 2, -1, -1)
    assert found(both, topk_values=values, topk_indices=indices) == [True, False]
    invalid = torch.ones(2, 64, 64, dtype=torch.bool)
    invalid[1] = False
    assert found(both, labels=all_labels, valid=invalid)[0]


@pytest.mark.parametrize("at_once", [0, 1, 2, 5])
def test_the_branch_is_the_same_however_many_images_are_looked_at(at_once):
    near, labels = peaked(19, 8.0, 8)
    logits = torch.cat([near, torch.randn_like(near), near])
    call = call_of(LossNet.vgg(19, (1,)), kind="labels", dtype=BF16)
    an_image = 32 * 19 * GRID[0] * GRID[1]
    target = {"labels": labels.repeat(3, 1, 1)}
    room = at_once * an_image
    most, found = peak_bytes(lambda: carried(call, logits, target, room))
    assert found.tolist() == [True, False, True]
    assert most <= max(room, an_image)


# ------------------------------------------------------------------------------ SegmentationLoss


@dataclass
class Total:
    """Options and inputs of one SegmentationLoss."""

    weighted: bool
    smoothing: float
    reduction: str
    gpl_ignore: bool | str
    temperature: float
    activation: str
    teacher: str | None
    masked: bool | str  # as of How
    nan: bool
    dtype: torch.dtype
    rows: int | None
    channels: int
    seed: int
    arithmetic: str = "float32"


totals = st.builds(
    Total,
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    gpl_ignore=st.sampled_from(["auto", True, False]),
    temperature=st.sampled_from([1.0, 1.0, 2.5]),
    activation=st.sampled_from(["softmax", "softmax", "sigmoid", "none"]),
    teacher=st.sampled_from([None, "dense", "resized", "labels", "topk", "features"]),
    masked=st.booleans(),
    nan=st.booleans(),
    dtype=st.sampled_from([FLOAT, FLOAT, BF16]),
    rows=st.sampled_from([None, 2, 4]),
    channels=st.sampled_from([2, 5, 19]),
    arithmetic=st.sampled_from(ARITHMETIC),
    seed=st.integers(0, 2**16),
)


@settings(max_examples=50)
@given(t=totals)
def test_total_against_float64(t: Total):
    torch.manual_seed(t.seed)
    c, size = t.channels, (2, 17, 14)
    options: dict[str, Any] = {
        "class_weight": torch.rand(c) + 0.1 if t.weighted else None,
        "gpl_weight": 0.7,
        "label_smoothing": t.smoothing,
        "gpl_ignore": t.gpl_ignore,
        "net": "1,1",
        "widths": NARROW,
        **{name: getattr(t, name) for name in ("reduction", "temperature", "activation")},
    }
    labels = torch.randint(c, size)
    labels[:, 3:9, 2:8] = 255
    mask = torch.rand(size) < 0.8 if t.masked else None
    if t.masked == "weights":
        mask = weights_of(mask)
    counted = labels != 255 if mask is None else (labels != 255) & (mask > 0)
    leaves = t.gpl_ignore is True or (t.gpl_ignore == "auto" and t.teacher is None)
    valid = among(mask, counted) if leaves else mask
    logits = 2 * torch.randn(size[0], c, *size[1:])
    if t.nan and leaves:
        logits = torch.where(counted.unsqueeze(1), logits, float("nan"))
    logits = logits.to(t.dtype)
    fast_total = SegmentationLoss(c, backend="fast", **options)
    teacher = None if t.teacher is None else target_of(t.teacher, logits, fast_total)
    if t.teacher == "features":
        teacher = fast_total.encode(torch.randn(logits.shape), valid)
    # Stored features are float32: what the network computes in is theirs.
    dtype = FLOAT if t.teacher == "features" else t.dtype

    exact = SegmentationLoss(c, backend="reference", compute_dtype=torch.float64, **options)
    plain = SegmentationLoss(c, backend="reference", **options)(logits, labels, teacher, mask)
    x = logits.double().requires_grad_()
    same_kind = teacher if t.teacher in (None, "features") else doubled(teacher)
    parts = exact(x, labels, same_kind, mask, return_parts=True)
    with decided(rows=t.rows, arithmetic=t.arithmetic):
        leaf = logits.detach().requires_grad_()
        value = fast_total(leaf, labels, teacher, mask)
        walk = None
        kind, target = t.teacher or "labels", teacher
        if teacher is None:
            target = torch.where(counted, labels, -1)
            if not leaves:  # an ignored label is then a zero map
                kind = "dense"
                target = F.one_hot(target.clamp(min=0), c).permute(0, 3, 1, 2)
                target = (target * counted.unsqueeze(1)).double()
        exact_gpl = GenericPerceptualLoss(
            c, exact.net, activation=t.activation, temperature=t.temperature,
            target_activation="none" if teacher is None else "same", ignore_index=-1,
            compute_dtype=torch.float64,
        )  # fmt: skip
        each, x64, walk = truth_and_routed(exact_gpl, value, logits, target, valid, kind)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
    truth = sum(parts.values()).detach()
    gpl = 0.7 * reduced(each, t.reduction)
    assert error(gpl.detach(), parts["loss_gpl"].detach()) < 1e-6
    (routed,) = torch.autograd.grad(gpl.sum(), x64)
    (ce_grad,) = torch.autograd.grad(parts["loss_ce"].sum(), x)
    assert value.shape == truth.shape
    check_value(value.detach(), plain, truth, dtype)
    check_gradient(grad, routed + ce_grad, walk, coarser(dtype, t.dtype))


# -------------------------------------------------------------------------------- PerceptualLoss


def sequential(pool=nn.MaxPool2d) -> LossNet:
    """Biases, mean and std, a convolution without ReLU, a rest after the last pool."""
    torch.manual_seed(5)
    chain = nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 8, 5, padding=2), nn.ReLU(),
        pool(2), nn.Conv2d(8, 11, 3, padding=1), nn.Conv2d(11, 6, 1), nn.ReLU(), pool(2),
        nn.Conv2d(6, 7, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    for m in chain:
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.bias, std=0.2)
    return LossNet.from_sequential(chain, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


NETS = {
    "max": sequential,
    "avg": lambda: sequential(nn.AvgPool2d),
    "adapter": lambda: sequential().with_input_adapter(3, seed=2),
}
TAPS = {
    "conv": ({"conv1_1": 1.0, "conv2_1": 0.5}, {}),
    "relu": ({"relu1_2": 1.0, "relu3_1": 2.0}, {}),
    "pool": ({"pool1": 1.0, "pool2": 0.1}, {}),
    "conv, relu, pool": ({"conv1_2": 1.0, "relu1_2": 1.0, "pool1": 1.0}, {}),
    "style": ({}, {"relu1_2": 2.0, "pool1": 3.0}),
    "both": ({"relu2_2": 1.0}, {"conv1_1": 0.3, "relu1_2": 2.0, "relu2_2": 4.0, "pool2": 1.0}),
    "a layer for both": ({"pool1": 1.0}, {"pool1": 5.0}),
}


def three_way(make, dtype: torch.dtype, pred: Tensor, *args: Any, **kwargs: Any) -> None:
    """The rule for value and gradient where no winner can be in doubt."""
    truth = value_and_grad(make("reference"), pred.double(), *map(_double, args), **kwargs)
    plain = value_and_grad(make("reference"), pred, *args, **kwargs)
    got = value_and_grad(make("fast"), pred, *args, **kwargs)
    for a, b, t in zip(got, plain, truth, strict=True):
        assert a.dtype == b.dtype
        assert error(a, t) <= 2 * error(b, t) + ATOL[dtype]


def _double(x: Any) -> Any:
    return doubled(x) if isinstance(x, Tensor | TopK) else x


@every_way
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("taps", TAPS)
def test_perceptual_family(taps, net, rows, decide):
    decide(rows=rows)
    features, styles = TAPS[taps]
    made = NETS[net]()
    pred, target = torch.rand(2, 2, 3, 21, 18)

    def make(backend, **options):
        return PerceptualLoss(made, features, styles, 0.3, backend=backend, **options)

    three_way(make, FLOAT, pred, target)
    three_way(make, FLOAT, pred, target, None, torch.rand(2, 21, 18) < 0.8)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize(
    "style", [None, (2, 3, 13, 30), (1, 3, 21, 18), (1, 3, 30, 9), "features"], ids=str
)
def test_style_targets(style, rows, decide):
    decide(rows=rows)
    made = sequential()
    layers = {"relu1_2": 2.0, "relu2_2": 4.0}
    pred, target = torch.rand(2, 2, 3, 21, 18)

    def make(backend, **options):
        return PerceptualLoss(made, {"relu2_2": 1.0}, layers, backend=backend, **options)

    if style == "features":
        style = make("reference").encode(torch.rand(1, 3, 15, 16))
    elif style is not None:
        style = torch.rand(style)
    three_way(make, FLOAT, pred, target, style)
    three_way(make, FLOAT, pred, make("reference").encode(target), style)


@every_way
@pytest.mark.parametrize("kind", ["labels", "topk"])
@pytest.mark.parametrize("net", ["max", "adapter"])
def test_looked_up_targets_behind_biases_and_normalisation(net, kind):
    made = NETS[net]()
    pred, teacher = torch.randn(2, 2, 3, 21, 18)
    target = teacher.argmax(dim=1) if kind == "labels" else TopK(*teacher.softmax(1).topk(2, dim=1))

    def make(backend):
        return PerceptualLoss(
            made, {"pool2": 1.0}, {"relu1_2": 1.0}, activation="softmax", backend=backend
        )

    three_way(make, FLOAT, pred, target)
    three_way(make, FLOAT, pred, target, None, torch.rand(2, 21, 18) < 0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_stride_two_levels_and_style(kind):
    """A stride-2 layer's output is its ReLU's: one tap, not two."""
    net = LossNet.vgg(3, (2, 1), (6, 7), pool="stride")
    pred = torch.randn(2, 3, 17, 14)

    def make(backend):
        features, styles = {"down1": 1.0, "relu2_1": 1.0, "down2": 1.0}, {"down1": 3.0}
        styles = {} if kind == "features" else styles
        return PerceptualLoss(net, features, styles, activation="softmax", backend=backend)

    three_way(make, FLOAT, pred, target_of(kind, pred, make("reference")))


@every_way
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_perceptual_family_in_half_precision(dtype):
    """Average pools: no winner to lose, so the gradient too is the definition's but for rounding
    of signs near zero."""
    made = sequential(nn.AvgPool2d)
    pred, target = torch.rand(2, 2, 3, 42, 36)
    layers = {"relu1_2": 2.0, "pool1": 3.0}

    def run(backend, dtype):
        loss = PerceptualLoss(made, {"pool2": 1.0}, layers, backend=backend, compute_dtype=dtype)
        return value_and_grad(loss, pred, target)

    (truth, grad64), (plain, grad_plain) = run("reference", None), run("reference", dtype)
    value, grad = run("fast", dtype)
    check_value(value, plain, truth, dtype)
    assert error(grad, grad64) < 2 * error(grad_plain, grad64) + ATOL[dtype]


# ------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("scale", [1e-6, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("levels", [None, (1 / 4, 1 / 2, 1)])
def test_float16_chain_neither_underflows_nor_overflows(scale, reduction, levels):
    """The incoming gradient enters in float32 alone, at the chain's end."""
    loss = fast(5, "1,1,1", compute_dtype=HALF, level_weights=levels, reduction=reduction)
    pred, target = torch.randn(2, 3, 5, 33, 34)
    _, unit = value_and_grad(loss, pred, target)
    assert unit.any()
    factor = torch.tensor([1.0, 1e-3, 1.0] if reduction == "none" else [1.0] * 3) * scale
    g = factor if reduction == "none" else factor[0]
    _, grad = value_and_grad(lambda x: loss(x, target) * g, pred)
    for got, at_one, f in zip(grad, unit, factor, strict=True):
        assert error(got, f.double() * at_one) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_an_incoming_gradient_of_zero_or_minus_one(kind):
    loss, pred = fast(3, compute_dtype=HALF, reduction="none"), torch.randn(3, 3, 9, 10)
    target = target_of(kind, pred, loss)
    _, grad = value_and_grad(loss, pred, target)
    factor = torch.tensor([0.0, -1.0, 2.0])
    _, got = value_and_grad(lambda x: loss(x, target) * factor, pred)
    assert not got[0].any()
    assert torch.equal(got, factor.view(3, 1, 1, 1) * grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_images(kind, reduction):
    loss, pred = fast(3, reduction=reduction), torch.randn(0, 3, 9, 10)
    value, grad = value_and_grad(loss, pred, target_of(kind, pred, loss))
    assert value.shape == ((0,) if reduction == "none" else ())
    assert not value.any()
    assert grad.shape == pred.shape


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_valid_is_zero_and_connected(kind, rows, decide):
    decide(rows=rows)
    loss, pred = fast(3), torch.full((2, 3, 9, 10), float("nan"))
    nothing = torch.zeros(2, 9, 10, dtype=torch.bool)
    if kind == "features":
        target, nothing = loss.encode(torch.randn(pred.shape), nothing), None
    else:
        target = target_of(kind, pred, loss)
    value, grad = value_and_grad(loss, pred, target, nothing)
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(pred))


def test_an_empty_image_among_others():
    loss, pred = fast(3, ignore_index=255, reduction="none"), torch.randn(3, 3, 9, 10)
    labels = torch.randint(3, (3, 9, 10))
    whole, grad_whole = value_and_grad(loss, pred, labels)
    pred[1], labels[1] = float("inf"), 255
    value, grad = value_and_grad(loss, pred, labels)
    assert value[1] == 0
    assert not grad[1].any()
    for i in (0, 2):
        assert torch.equal(value[i], whole[i])
        assert torch.equal(grad[i], grad_whole[i])
