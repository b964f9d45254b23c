"""The binary cross-entropy of logits (N, C, H, W) with labels of single elements, and the gradient
that is added to dx."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from definitions import BF16, DTYPES, FLOAT, HALF, LAYOUTS, check, layout, poisoned

FWD = pytest.mark.needs("binary_ce_fwd")
BWD = pytest.mark.needs("binary_ce_bwd")
# (C, (H, W)): a tile and a rest, one row, one class, several tiles, many classes
SIZES = [(19, (13, 27)), (3, (1, 5)), (1, (7, 33)), (2, (2, 300)), (150, (3, 27)), (70, (1, 32))]
OPTIONS = [
    {}, {"class_weight": True, "pos_weight": True}, {"label_smoothing": 0.1},
    {"class_weight": True, "pos_weight": True, "label_smoothing": 0.3, "ce_mask": True},
]  # fmt: skip


def labels_of(n, c, h, w):
    return torch.randint(3, (n, c, h, w)).byte()


def chosen(options, n, c, h, w):
    made = {"class_weight": torch.rand(c), "pos_weight": torch.rand(c) * 5,
            "ce_mask": torch.rand(n, h, w) * 2, "label_smoothing": 0.0}  # fmt: skip
    return {name: made[name] if value is True else value for name, value in options.items()}


def elements(
    work, x, labels, class_weight=None, pos_weight=None, label_smoothing=0.0, ce_mask=None
):
    """PyTorch's losses (N, C, H, W) in the dtype `work`, 0 where an element does not count; what
    counts."""
    counts = (labels != 2).to(work)
    y = (labels == 1).to(work) * (1 - label_smoothing) + label_smoothing / 2
    of = [None if w is None else w.to(work).view(-1, 1, 1) for w in (class_weight, pos_weight)]
    loss = F.binary_cross_entropy_with_logits(
        x.to(work).where(labels != 2, torch.zeros((), dtype=work)), y, weight=of[0],
        pos_weight=of[1], reduction="none",
    )  # fmt: skip
    if ce_mask is not None:
        counts = counts * ce_mask.to(work).unsqueeze(1)
    return loss * counts, counts


def forward(stages, x, labels, strip=None, **options):
    n, _, h, _ = x.shape
    rows = poisoned(n, h, 2, dtype=torch.float64)
    row0, count = strip or (0, h)
    stages.binary_ce_fwd(x, labels=labels, row0=row0, rows=count, ce_rows=rows, **options)
    return rows


def backward(stages, x, labels, dx, strip=None, clear=False, ce_scale="own", **options):
    n, _, h, _ = x.shape
    row0, count = strip or (0, h)
    scale = torch.linspace(0.5, 1.5, n) if isinstance(ce_scale, str) else ce_scale
    stages.binary_ce_bwd(
        x, labels=labels, row0=row0, rows=count, dx=dx, clear=clear, ce_scale=scale, **options
    )
    return dx


@FWD
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("classes", "size"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_rows_against_float64(stages, dtype, classes, size, options):
    for kind in LAYOUTS:
        x = layout((4 * torch.randn(2, classes, *size)).to(dtype), kind)
        labels, how = labels_of(*x.shape), chosen(options, *x.shape)
        rows = forward(stages, x, labels, **how)
        truth, plain = (elements(work, x, labels, **how) for work in (torch.float64, FLOAT))
        for i in range(2):
            check(rows[..., i], plain[i].sum(dim=(1, 3)), truth[i].sum(dim=(1, 3)), FLOAT)


@FWD
def test_losses_are_exact_relative_to_themselves(stages):
    """Of a logit of any size: log(1 + e) of a small e is not rounded to that of 1."""
    x = torch.cat([torch.linspace(-100, 100, 201), torch.linspace(-3, 3, 55)]).view(1, 1, -1, 1)
    for label in (0, 1):
        labels = torch.full_like(x, label, dtype=torch.uint8)
        ours = forward(stages, x, labels)[0, :, 0]
        wide = (-x if label else x).double().flatten()
        truth = wide.clamp(min=0) + (-wide.abs()).exp().log1p()  # PyTorch's own cancels
        normal = truth > 1e-37
        assert ((ours - truth) / truth)[normal].abs().max() < 8e-6  # of e^−100 most is exp's
        near = normal & (x.flatten().abs() < 20)
        assert ((ours - truth) / truth)[near].abs().max() < 2e-6
        assert (ours[~normal] <= 1e-37).all()


INFINITE = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38]).view(1, 1, 1, 4)


@FWD
def test_infinite_logits_of_the_right_sign_cost_nothing(stages):
    labels = (INFINITE > 0).byte()
    assert torch.equal(forward(stages, INFINITE, labels), torch.tensor([[[0.0, 4.0]]]).double())


@BWD
def test_infinite_logits_have_gradients_of_zero_and_one(stages):
    x, labels = INFINITE, (INFINITE > 0).byte()
    assert not backward(stages, x, labels, torch.zeros_like(x)).any()
    wrong = backward(stages, x, 1 - labels, torch.zeros_like(x), ce_scale=torch.ones(1))
    assert torch.equal(wrong.flatten(), torch.tensor([1.0, -1.0, 1.0, -1.0]))


@BWD
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("classes", "size"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_float64(stages, dtype, classes, size, options):
    for kind in LAYOUTS:
        x = layout((4 * torch.randn(2, classes, *size)).to(dtype), kind)
        before = layout(torch.randn(x.shape).to(dtype), LAYOUTS[LAYOUTS.index(kind) - 1])
        labels, how = labels_of(*x.shape), chosen(options, *x.shape)
        found = backward(stages, x, labels, before.clone(), **how)
        assert found.stride() == before.clone().stride()
        plain, truth = (
            before.to(work) + definition(work, x, labels, **how) for work in (FLOAT, torch.float64)
        )
        check(found, plain.to(dtype), truth, dtype)


def definition(work, x, labels, **options):
    """By autograd, in the dtype `work`; each image has its own scale."""
    v = x.detach().to(work).requires_grad_()
    loss = elements(work, v, labels, **options)[0].sum(dim=(1, 2, 3))
    return torch.autograd.grad((loss * torch.linspace(0.5, 1.5, len(x)).to(work)).sum(), v)[0]


@BWD
def test_what_does_not_count_is_left_or_cleared(stages):
    """NaN there too: in the logits it is not looked at, in dx it is what the caller asks for."""
    for kind in LAYOUTS:
        x = layout(torch.randn(2, 5, 4, 37), kind)
        labels = labels_of(*x.shape)
        ignored = labels == 2
        x[ignored] = float("nan")
        before = torch.randn_like(x)
        before[ignored] = 7.0
        left = backward(stages, x, labels, before.clone())
        cleared = backward(stages, x, labels, before.clone(), clear=True)
        alone = backward(stages, x, labels, before.clone(), clear=True, ce_scale=None)
        assert (left[ignored] == 7).all()
        assert not left.isnan().any()
        assert not cleared[ignored].any()
        assert torch.equal(cleared[~ignored], left[~ignored])
        assert not alone[ignored].any()
        assert torch.equal(alone[~ignored], before[~ignored])
        poison = before.where(~ignored, torch.tensor(float("nan")))
        assert torch.equal(backward(stages, x, labels, poison, clear=True), cleared)


@FWD
def test_nan_that_does_not_count_is_not_in_the_sums(stages):
    x = torch.randn(2, 5, 4, 37)
    labels = labels_of(*x.shape)
    expected = forward(stages, x, labels)
    assert torch.equal(forward(stages, x.masked_fill(labels == 2, float("nan")), labels), expected)


@FWD
@BWD
def test_strips_equal_the_whole(stages):
    x = torch.randn(2, 19, 11, 35)
    labels, how = labels_of(*x.shape), chosen(OPTIONS[-1], *x.shape)
    rows, whole = forward(stages, x, labels, **how), torch.full((2, 11, 2), float("nan")).double()
    before = torch.randn_like(x)
    dx, all_dx = before.clone(), backward(stages, x, labels, before.clone(), **how)
    for r0 in range(0, 11, 4):
        count = min(4, 11 - r0)
        part = forward(stages, x, labels, strip=(r0, count), **how)
        whole[:, r0 : r0 + count] = part[:, r0 : r0 + count]
        assert part[:, :r0].isnan().all()
        assert part[:, r0 + count :].isnan().all()
        backward(stages, x, labels, dx, strip=(r0, count), **how)
    assert torch.equal(whole, rows)
    assert torch.equal(dx, all_dx)


@BWD
def test_strips_of_the_gradient(stages):
    for kind in LAYOUTS:
        x = layout(torch.randn(2, 7, 11, 35), kind)
        labels, before = labels_of(*x.shape), torch.randn_like(x)
        dx = before.clone()
        whole = backward(stages, x, labels, before.clone(), clear=True)
        for r0 in range(0, 11, 4):
            backward(stages, x, labels, dx, strip=(r0, min(4, 11 - r0)), clear=True)
            assert torch.equal(dx[:, :, r0 + 4 :], before[:, :, r0 + 4 :])
        assert torch.equal(dx, whole)


@FWD
@BWD
def test_orders_and_layouts_agree_bit_for_bit(stages):
    x = torch.randn(2, 19, 9, 70)
    labels, how = labels_of(*x.shape), chosen(OPTIONS[-1], *x.shape)
    before = torch.randn_like(x)
    rows, dx = None, None
    for order in stages.orders.values():
        for kind in LAYOUTS:
            with order():
                now = forward(stages, layout(x, kind), labels, **how)
                d = backward(stages, layout(x, kind), labels, layout(before.clone(), kind), **how)
            rows, dx = (now, d) if rows is None else (rows, dx)
            assert torch.equal(now, rows)
            assert torch.equal(d, dx)


@BWD
def test_orders_of_the_gradient_agree_bit_for_bit(stages):
    for kind in LAYOUTS:
        x = layout(torch.randn(2, 40, 3, 70).to(BF16), kind)
        labels, before = labels_of(*x.shape), torch.randn(x.shape).to(BF16)
        found = []
        for order in stages.orders.values():
            with order():
                found.append(backward(stages, x, labels, layout(before.clone(), kind), clear=True))
        assert all(torch.equal(f, found[0]) for f in found)


@BWD
def test_an_image_of_a_batch_equals_it_alone(stages):
    x = torch.randn(3, 5, 4, 20)[1:]  # begins in the middle of memory
    labels = labels_of(3, 5, 4, 20)[1:]
    scale = torch.linspace(0.5, 1.5, 3)
    both = backward(stages, x, labels, torch.zeros_like(x), ce_scale=scale[1:])
    for i in range(2):
        one = backward(
            stages,
            x[i : i + 1],
            labels[i : i + 1],
            torch.zeros_like(x[:1]),
            ce_scale=scale[1 + i :][:1],
        )
        assert torch.equal(one[0], both[i])


@FWD
@BWD
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 0), (2, 3, 0, 5)])
def test_empty(stages, shape):
    x = torch.zeros(shape, dtype=HALF)
    forward(stages, x, labels_of(*shape))
    backward(stages, x, labels_of(*shape), torch.zeros_like(x))


@pytest.mark.only("cpu", "cuda")
@FWD
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": torch.zeros(2, 3, 4, 6, dtype=torch.uint8)}, "labels must have the shape"),
        ({"labels": torch.zeros(2, 3, 4, 5)}, "labels must be"),
        ({"class_weight": torch.ones(2)}, "class_weight must have the shape"),
        ({"pos_weight": torch.ones(3).double()}, "pos_weight must be"),
        ({"ce_mask": torch.ones(2, 4, 4)}, "ce_mask must have the shape"),
        ({"ce_rows": torch.ones(2, 4, 2)}, "ce_rows must be"),
        ({"rows": -1}, "rows must not be negative"),
    ],
)
def test_refused(stages, changes, said):
    arguments = {"labels": torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "row0": 0, "rows": 4,
                 "ce_rows": torch.ones(2, 4, 2).double()} | changes  # fmt: skip
    with pytest.raises(RuntimeError, match=said):
        stages.binary_ce_fwd(torch.zeros(2, 3, 4, 5), **arguments)
