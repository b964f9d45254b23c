"""Logits (N, C, H, W) to the map that enters the network, its δ, log-sum-exps and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from definitions import (
    BF16,
    DTYPES,
    FLOAT,
    HALF,
    LAYOUTS,
    NONE,
    SIGMOID,
    SOFTMAX,
    activate,
    carried,
    check,
    layout,
    nchw,
    nhwc,
    odd_images,
    poisoned,
)
from extremes import KINDS, LOWEST, TEMPERATURES, by_kind, logits_of_every_kind
from saved import log_sum_exp
from test_look_up import topk_case

pytestmark = pytest.mark.needs("softmax_pack_fwd")
# odd rows and columns, one row, more than one tile of pixels
SIZES = ((13, 27), (1, 5), (7, 33), (2, 300))
MANY = 1300  # more than Triton's kernel holds


def pack(stages, x, *, target=None, elements=None, labels=None, topk=None, valid=None,
         activation=SOFTMAX, target_activation=None, temperature=1.0, ce=None, ce_mask=None,
         strip=None, core=None, c_pad=None, dtype=FLOAT):  # fmt: skip
    """(y, delta, lse, ce_lse, ce_rows), the maps (N, rows, W, c_pad).

    A listed target leaves `taken` in delta's place, no target nothing.
    """
    n, c, h, w = x.shape
    row0, rows = strip or (0, h)
    core0, core_rows = core or (row0, rows)
    own_lse = activation != SOFTMAX or temperature != 1.0
    shape = (n, rows, w, c_pad or c)
    y = poisoned(*shape, dtype=dtype)
    delta = poisoned(*shape, dtype=dtype) if target is not None else None
    taken = poisoned(n, rows, w, dtype=torch.uint8) if labels is not None or topk else None
    lse, ce_lse = poisoned(n, h, w), poisoned(n, h, w)
    ce_rows = poisoned(n, h, 2, dtype=torch.float64)
    options = dict(zip(("topk_values", "topk_indices", "topk_rest"), topk or (), strict=False))
    options["ce_mask"] = ce_mask
    if ce is not None:
        options |= dict(zip(("ce_labels", "class_weight", "label_smoothing"), ce, strict=True))
    stages.softmax_pack_fwd(
        x, activation=activation,
        target_activation=activation if target_activation is None else target_activation,
        temperature=temperature, row0=row0, rows=rows, core0=core0, core_rows=core_rows,
        valid=valid, target=target, elements=elements, from_target=odd_images(n), labels=labels,
        y=y, delta=delta, taken=taken, lse=lse, ce_lse=ce_lse if own_lse else None,
        ce_rows=ce_rows, **options,
    )  # fmt: skip
    return y, delta if taken is None else taken, lse, ce_lse, ce_rows


# ----------------------------------------------------------------------------------- dense targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("classes", "size"),
    [
        *((c, size) for c in (19, 1, 3) for size in SIZES),
        (150, (3, 35)),
        (600, (1, 9)),
        (MANY, (1, 5)),
    ],
)
def test_dense(stages, classes, size, dtype):
    for activation, temperature, kind, x_dtype in [
        (SOFTMAX, 1.0, "nchw", FLOAT),
        (SOFTMAX, 2.5, "channels_last", BF16),
        (SIGMOID, 1.0, "sliced", HALF),
        (NONE, 3.0, "channels_last", FLOAT),
        (SIGMOID, 0.5, "nchw", BF16),
        (SOFTMAX, 1.0, "sliced", FLOAT),
    ]:
        x, t = (layout((3 * torch.randn(2, classes, *size)).to(x_dtype), kind) for _ in range(2))
        c_pad = classes + 5 if temperature != 1.0 else classes
        how = {"activation": activation, "temperature": temperature}
        y, delta, lse, _, _ = pack(stages, x, target=t, c_pad=c_pad, dtype=dtype, **how)
        y64, p64 = (activate(v.double(), *how.values()) for v in (t, x))
        y32, p32 = (activate(v.float(), *how.values()) for v in (t, x))
        plain = carried(nhwc(p32), nhwc(y32)).to(dtype)
        check(y[..., :classes], plain, carried(nhwc(p64), nhwc(y64)), dtype)
        check(delta[..., :classes], nhwc(p32 - y32).to(dtype), nhwc(p64 - y64), dtype)
        assert not y[..., classes:].any()
        assert not delta[..., classes:].any()
        if activation == SOFTMAX:
            plain = temperature * (x.float() / temperature).logsumexp(1)
            check(lse, plain, log_sum_exp(x, temperature), FLOAT)


@pytest.mark.parametrize("activation", [NONE, SOFTMAX, SIGMOID])
def test_equal_inputs_give_zero(stages, activation):
    x = 20 * torch.randn(2, 19, 7, 33)
    for temperature in (1.0, 0.7):
        how = {"activation": activation, "temperature": temperature}
        assert not pack(stages, x, target=x.clone(), **how)[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_activations(stages, dtype):
    x, t = torch.randn(2, 3, 7, 9), torch.rand(2, 3, 7, 9)
    y, delta, *_ = pack(stages, x, target=t, target_activation=NONE, dtype=dtype)
    assert torch.equal(y[1], nhwc(t)[1].to(dtype))
    check(y[0], nhwc(x.softmax(1))[0].to(dtype), nhwc(x.double().softmax(1))[0], dtype)
    truth = nhwc(x.double().softmax(1) - t)
    check(delta, nhwc(x.softmax(1) - t).to(dtype), truth, dtype)


def test_a_target_that_is_taken_as_it_is_has_no_temperature(stages):
    x, t = torch.randn(2, 3, 5, 17), torch.rand(2, 3, 5, 17)
    for activation in (SOFTMAX, SIGMOID):
        how = {"target": t, "target_activation": NONE, "temperature": 3.0}
        y, delta, *_ = pack(stages, x, activation=activation, **how)
        assert torch.equal(y[1], nhwc(t)[1])
        truth = nhwc(activate(x.double(), activation, 3.0) - t)
        check(delta, truth.float(), truth, FLOAT)
    # without activations both are divided
    _, delta, *_ = pack(stages, x, target=t, activation=NONE, temperature=3.0)
    check(delta, nhwc((x - t) / 3), nhwc((x.double() - t) / 3), FLOAT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("classes", "size"), [(19, (13, 27)), (1, (7, 33)), (3, (2, 300)), (MANY, (1, 5))]
)
def test_labels_of_elements(stages, classes, size, dtype):
    """Of uint8: 1 where they are 1, and both maps 0 where `elements` are 2, whatever is there."""
    rows, columns = size
    whole = torch.randint(3, (2, classes, rows + 3, columns)).byte()
    labels = whole[:, :, 2 : rows + 2]  # a strip of taller images
    valid = torch.rand(2, *size) < 0.8
    how = {"activation": SIGMOID, "target_activation": NONE, "dtype": dtype, "c_pad": classes + 5}
    for kind, temperature in (("nchw", 1.0), ("channels_last", 2.5), ("sliced", 0.5)):
        x = layout(3 * torch.randn(labels.shape), kind)
        p64, y64 = activate(x.double(), SIGMOID, temperature), (labels == 1).double()
        for mask in (None, valid):
            keep = torch.ones_like(p64)
            keep = keep if mask is None else keep * mask[:, None]
            for elements in (None, labels):
                kept = keep if elements is None else keep * (elements != 2)
                hidden = x.masked_fill(kept == 0, float("nan"))
                y, delta, *_ = pack(stages, hidden, target=labels, elements=elements, valid=mask,
                                    temperature=temperature, **how)  # fmt: skip
                p, t = nhwc(p64 * kept), nhwc(y64 * kept)
                check(y[..., :classes], carried(p, t).to(dtype), carried(p, t), dtype)
                check(delta[..., :classes], (p - t).to(dtype), p - t, dtype)
                assert not y[..., classes:].any()
                assert not delta[..., classes:].any()
                assert not delta[..., :classes][nhwc(kept) == 0].any()


def test_elements_beside_a_floating_target(stages):
    x, t = torch.randn(2, 5, 7, 33), torch.randn(2, 5, 7, 33)
    elements = torch.randint(3, x.shape).byte()
    ignored = elements == 2
    hidden = (v.masked_fill(ignored, float("nan")) for v in (x, t))
    found = pack(stages, next(hidden), target=next(hidden), elements=elements, activation=SIGMOID)
    wanted = pack(stages, x, target=t, activation=SIGMOID)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(a, b.masked_fill(nhwc(ignored), 0))


def test_without_target_it_is_the_activation(stages):
    x = torch.randn(2, 19, 5, 17)
    y, *_ = pack(stages, x)
    check(y, nhwc(x.softmax(1)), nhwc(x.double().softmax(1)), FLOAT)


# ---------------------------------------------------------------------------------- listed targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 19, 150])
def test_labels(stages, classes, dtype):
    x, labels = 3 * torch.randn(2, classes, 13, 27), torch.randint(-1, classes, (2, 13, 27))
    labels[0, 0, 0] = classes + 7  # out of range: like no class
    y, taken, *_ = pack(stages, x, labels=labels, dtype=dtype)
    known = (labels >= 0) & (labels < classes)
    onehot = F.one_hot(labels.where(known, 0), classes) * known[..., None]
    truth, plain = nhwc(x.double().softmax(1)), nhwc(x.softmax(1))
    assert torch.equal(taken.bool(), (truth * onehot).sum(-1) > 0.5)
    assert taken.any()
    assert known[taken == 0].any()
    taken = taken[..., None] * onehot
    check(y, (plain - taken).to(dtype), truth - taken, dtype)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(("classes", "k"), [(3, 1), (19, 4), (150, 5)])
def test_topk(stages, classes, k, rest):
    x = 3 * torch.randn(2, classes, 13, 27)
    *lists, dense = topk_case(classes, k, rest)
    for dtype in DTYPES:
        y, taken, *_ = pack(stages, x, topk=lists, dtype=dtype)
        truth = x.double().softmax(1)
        nearer = (truth - dense).square().sum(1) - truth.square().sum(1)
        sure = nearer.abs() > 1e-6
        assert torch.equal(taken.bool()[sure], nearer[sure] < 0)
        assert 0 < taken.sum() < taken.numel()
        part = taken[:, None] * dense
        check(y, nhwc(x.softmax(1) - part.float()).to(dtype), nhwc(truth - part), dtype)


def test_lists_of_many_classes(stages):
    x, labels = torch.randn(1, MANY, 1, 6), torch.randint(0, MANY, (1, 1, 6))
    x[..., ::2].scatter_(1, labels[:, None, :, ::2], 12.0)
    onehot, truth = F.one_hot(labels, MANY), nhwc(x.double().softmax(1))
    truth[:, :, ::2] -= onehot[:, :, ::2]
    as_list = (torch.ones(1, 1, 1, 6), labels[:, None])
    for target in ({"labels": labels}, {"topk": as_list}):
        y, taken, *_ = pack(stages, x, **target)
        assert taken.flatten().tolist() == [1, 0] * 3
        torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.against_cpu
def test_taken_has_the_operators_bits_where_the_halves_are_clear(stages, cpu):
    x, labels = 3 * torch.randn(2, 19, 13, 27), torch.randint(-1, 20, (2, 13, 27))
    probability = x.softmax(1).gather(1, labels.clamp(0, 18).unsqueeze(1)).squeeze(1)
    clear = (probability - 0.5).abs() > 1e-5
    ours, wanted = (pack(who, x, labels=labels, c_pad=32)[1] for who in (stages, cpu))
    assert torch.equal(ours[clear], wanted[clear])


# ------------------------------------------------------------------------- masks, NaN and extremes


def test_invalid_pixels_are_exactly_zero(stages):
    x, t = torch.randn(2, 19, 13, 27), torch.randn(2, 19, 13, 27)
    valid = torch.rand(2, 13, 27) > 0.3
    bad = ~valid[:, None].expand_as(x)
    x[bad], t[bad] = float("nan"), float("nan")
    for target in ({"target": t}, {"labels": torch.randint(0, 19, (2, 13, 27))}, {}):
        for out in pack(stages, x, valid=valid, **target)[:2]:
            assert out is None or (not out[~valid].any() and out.isfinite().all())


def test_nan_in_a_valid_pixel_stays(stages):
    x = torch.randn(1, 19, 3, 17)
    x[0, 4, 1, 9] = float("nan")
    y, _, lse, *_ = pack(stages, x)
    assert y[0, 1, 9].isnan().all()
    assert y.isnan().sum() == 19
    assert lse[0, 1, 9].isnan()


@pytest.mark.parametrize("classes", [150, MANY])
@pytest.mark.parametrize("first", [float("nan"), -float("inf")])
def test_a_block_of_classes_without_a_number(stages, first, classes):
    """What the first classes are, the last ones must not forget: kernels look at them by blocks."""
    x = torch.randn(1, classes, 1, 5)
    x[:, :64, :, 2] = first
    x[:, 3, :, 2] = float("nan") if first != first else -float("inf")
    c_pad = classes + 10
    y, _, lse, *_ = pack(stages, x, c_pad=c_pad)
    torch.testing.assert_close(y[..., :classes], nhwc(x.softmax(1)), equal_nan=True)
    torch.testing.assert_close(lse, x.logsumexp(1), equal_nan=True)
    assert not y[..., classes:].any()


@pytest.mark.parametrize("classes", [19, MANY])
def test_a_pixel_without_a_finite_logit(stages, classes):
    """As PyTorch's softmax: NaN; its neighbours are as they were."""
    x = torch.randn(1, classes, 1, 5)
    x[..., 2] = -float("inf")
    y, _, lse, *_ = pack(stages, x)
    torch.testing.assert_close(y, nhwc(x.softmax(1)), equal_nan=True)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(lse[..., others], x.logsumexp(1)[..., others])


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
def test_extreme_logits(stages, scale):
    x = scale * torch.randn(1, 19, 3, 17)
    x[0, 3, 0, 0] = -float("inf")
    y, _, lse, *_ = pack(stages, x)
    torch.testing.assert_close(y, nhwc(x.softmax(1)), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(lse, x.logsumexp(1))


def check_kinds(ours, plain, truth):
    """`check` of each kind of pixels, (N, H, W, C)."""
    for o, p, t in by_kind(nchw(ours), nchw(plain), nchw(truth)):
        check(o, p, t, FLOAT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [3, 19])
def test_any_temperature(stages, classes, temperature):
    x, t = (logits_of_every_kind(2, classes, 3, 36) for _ in range(2))
    y, delta, lse, *_ = pack(stages, x, target=t, temperature=temperature)
    p64, t64 = (activate(v.double(), SOFTMAX, temperature) for v in (x, t))
    p32, t32 = (activate(v, SOFTMAX, temperature) for v in (x, t))
    check_kinds(y, carried(nhwc(p32), nhwc(t32)), carried(nhwc(p64), nhwc(t64)))
    check_kinds(delta, nhwc(p32 - t32), nhwc(p64 - t64))
    assert (delta[:, :, 2::4] == 0).all()  # uniform minus uniform
    if temperature < 1e30:  # beyond, it stops where sums would overflow
        torch.testing.assert_close(lse.double(), log_sum_exp(x, temperature), rtol=1e-6, atol=1e-6)
    assert (lse >= x.amax(1)).all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3, 3.0])
def test_any_temperature_of_listed_targets(stages, temperature):
    x = logits_of_every_kind(2, 19, 3, 36)
    labels = torch.randint(0, 19, (2, 3, 36))
    values, indices = torch.rand(2, 2, 3, 36), torch.randint(0, 19, (2, 2, 3, 36))
    listed = nhwc(torch.zeros(2, 19, 3, 36).scatter_add_(1, indices, values))
    truth, plain = (nhwc(activate(v, SOFTMAX, temperature)) for v in (x.double(), x))
    for target, dense in (
        ({"labels": labels}, F.one_hot(labels, 19)),
        ({"topk": (values, indices)}, listed),
    ):
        y, taken, *_ = pack(stages, x, temperature=temperature, **target)
        part = taken[..., None] * dense
        check_kinds(y, plain - part, truth - part)
        nearer = (truth - dense).square().sum(-1) < truth.square().sum(-1) - 1e-4
        assert taken.bool()[nearer].all()


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3])
@pytest.mark.parametrize("activation", [NONE, SIGMOID])
def test_any_temperature_of_the_other_activations(stages, activation, temperature):
    x = 3 * torch.randn(1, 3, 5, 16)
    x[0, :, 0] = torch.tensor([0.0, LOWEST, -LOWEST])[:, None]
    y, *_ = pack(stages, x, activation=activation, temperature=temperature)
    assert not y.isnan().any()
    assert (y[0, 0, :, 0] == (0.5 if activation == SIGMOID else 0)).all()
    if activation == SIGMOID:
        check(y, y, nhwc(activate(x.double(), SIGMOID, temperature)), FLOAT)


# ----------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize(("activation", "temperature"), [(SOFTMAX, 1.0), (SOFTMAX, 2.0), (NONE, 1)])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (True, 0.2)])
def test_cross_entropy(stages, weighted, smoothing, activation, temperature):
    """Sums of each row and of the weights counted there, and the log-sum-exp for the backward."""
    x, labels = 3 * torch.randn(2, 19, 13, 27), torch.randint(-1, 19, (2, 13, 27))
    x[:, :, 4, 4], labels[:, 4, 4] = float("nan"), -1  # not counted: harmless
    weight = torch.rand(19) if weighted else None
    how = {"activation": activation, "temperature": temperature}
    *_, lse, ce_lse, rows = pack(stages, x, ce=(labels, weight, smoothing), **how)
    kw = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
    truth = F.cross_entropy(x.double(), labels, weight.double() if weighted else None, **kw)
    torch.testing.assert_close(rows[..., 0], truth.sum(-1), rtol=1e-6, atol=1e-5)
    counted = labels >= 0
    each = weight[labels.clamp(min=0)].double() if weighted else torch.ones(labels.shape).double()
    torch.testing.assert_close(rows[..., 1], (each * counted).sum(-1))
    own = activation != SOFTMAX or temperature != 1.0
    torch.testing.assert_close((ce_lse if own else lse)[counted], x.logsumexp(1)[counted])


@pytest.mark.parametrize(("classes", "width"), [(19, 150), (150, 67), (MANY, 35)])
def test_cross_entropy_of_rows_of_several_tiles(stages, classes, width):
    """In a strip, of which the rows of the core alone are written."""
    x, labels = 3 * torch.randn(2, classes, 3, width), torch.randint(-1, classes, (2, 3, width))
    for weight, smoothing in ((None, 0.0), (torch.rand(classes), 0.1)):
        how = {"ce": (labels, weight, smoothing), "strip": (0, 3), "core": (1, 1)}
        rows = pack(stages, x, **how)[-1]
        kw = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
        weights = torch.ones(classes) if weight is None else weight
        truth = F.cross_entropy(x.double(), labels, weights.double(), **kw).sum(-1)
        count = (weights[labels.clamp(min=0)].double() * (labels >= 0)).sum(-1)
        torch.testing.assert_close(rows[:, 1, 0], truth[:, 1], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(rows[:, 1, 1], count[:, 1])
        assert rows[:, ::2].isnan().all()


def test_cross_entropy_of_padded_and_large_logits(stages):
    """Of a pixel without any class it is log C; smoothing meets no sum of lowest numbers."""
    x = logits_of_every_kind(2, 19, 3, 36)
    labels = torch.randint(0, 19, (2, 3, 36))
    labels[:, :, 1::4] = 0  # a class that is not padded
    for smoothing in (0.0, 0.1):
        kw = {"label_smoothing": smoothing, "reduction": "none"}
        for first, kind in enumerate(KINDS):
            one, of_one = x[..., first::4].contiguous(), labels[..., first::4].contiguous()
            *_, rows = pack(stages, one, ce=(of_one, None, smoothing))
            truth = F.cross_entropy(one.double(), of_one, **kw)
            torch.testing.assert_close(rows[..., 0], truth.sum(-1), rtol=1e-6, atol=1e-5)
            if kind == "all classes padded":
                torch.testing.assert_close(truth, torch.full_like(truth, 19).log())


@pytest.mark.parametrize(
    ("activation", "temperature"), [(SOFTMAX, 1.0), (SOFTMAX, 3.0), (NONE, 1.0)]
)
def test_without_a_backward_the_cross_entropy_leaves_no_lse(stages, activation, temperature):
    x, labels = torch.randn(2, 19, 5, 17), torch.randint(0, 19, (2, 5, 17))
    how = {"activation": activation, "temperature": temperature}
    want = pack(stages, x, ce=(labels, None, 0.1), **how)[-1]
    rows = poisoned(2, 5, 2, dtype=torch.float64)
    stages.softmax_pack_fwd(
        x, target_activation=activation, row0=0, rows=5, core0=0, core_rows=5, ce_labels=labels,
        label_smoothing=0.1, ce_rows=rows, **how,
    )  # fmt: skip
    assert torch.equal(rows, want)


# ------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_equal_the_whole(stages, dtype):
    """Rows outside the image are zeros; log-sum-exps and cross-entropy are of the core alone."""
    x, t = torch.randn(2, 19, 13, 27), torch.randn(2, 19, 13, 27)
    labels, valid = torch.randint(-1, 19, (2, 13, 27)), torch.rand(2, 13, 27) > 0.2
    how = {"target": t, "valid": valid, "ce": (labels, None, 0.1), "dtype": dtype}
    whole = pack(stages, x, **how)
    for core0, core_rows in ((0, 5), (5, 4), (9, 4)):
        row0, rows = core0 - 2, core_rows + 4
        part = pack(stages, x, strip=(row0, rows), core=(core0, core_rows), **how)
        for r in range(rows):
            for a, b in zip(whole[:2], part[:2], strict=True):
                inside = 0 <= row0 + r < 13
                expected = a[:, row0 + r] if inside else torch.zeros_like(b[:, r])
                assert torch.equal(b[:, r], expected)
        core = slice(core0, core0 + core_rows)
        assert torch.equal(part[2][:, core], whole[2][:, core])
        assert torch.equal(part[4][:, core], whole[4][:, core])
        outside = torch.cat([part[2][:, :core0], part[2][:, core0 + core_rows :]], 1)
        assert outside.isnan().all()


def test_layouts_give_the_same_bits(stages):
    x, t = torch.randn(2, 19, 7, 33), torch.randn(2, 19, 7, 33)
    first, *others = (pack(stages, layout(x, kind), target=layout(t, kind))[:3] for kind in LAYOUTS)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_orders_agree_bit_for_bit(stages):
    x, t = torch.randn(2, 19, 20, 64), torch.randn(2, 19, 20, 64)
    labels, found = torch.randint(-1, 19, (2, 20, 64)), []
    for order in stages.orders.values():
        with order():
            dense = pack(stages, x, target=t, ce=(labels, None, 0.1))
            found.append([*(dense[i] for i in (0, 1, 2, 4)), *pack(stages, x, labels=labels)[:2]])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_no_images(stages):
    x = torch.empty(0, 19, 5, 7)
    y, delta, *_ = pack(stages, x, target=x)
    assert y.numel() == delta.numel() == 0
