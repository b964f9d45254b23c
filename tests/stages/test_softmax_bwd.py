"""The gradient of logits (N, C, H, W) from dy (N, H, W, c_pad), Eq. (5), and of a cross-entropy."""

from __future__ import annotations

import operators
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
    check,
    layout,
    poisoned_like,
)
from extremes import LOWEST, TEMPERATURES, by_kind, logits_of_every_kind
from saved import log_sum_exp

pytestmark = pytest.mark.needs("softmax_bwd")
# (C, (H, W)): a tile and a rest, one row, a part of a tile, several tiles, a chunk of channels and
# a rest, several chunks, more than Triton's kernel holds
SIZES = [
    (19, (13, 27)), (3, (1, 5)), (1, (7, 33)), (19, (2, 300)), (150, (3, 27)), (257, (1, 32)),
    (1300, (1, 9)),
]  # fmt: skip


def gradient(stages, x, dy, *, activation=SOFTMAX, temperature=1.0, valid=None, labels=None,
             weight=None, smoothing=0.0, strip=None, dx=None, ce_scale=None,
             ce_mask=None):  # fmt: skip
    """dx in x's dtype; each image has its own scale."""
    n, _, h, _ = x.shape
    row0, rows = strip or (0, h)
    dx = poisoned_like(x)[0] if dx is None else dx
    options = {"lse": log_sum_exp(x, temperature).float()}
    if dy is not None:
        options |= {"dy": dy, "scale": scales(n)[0]}
    if labels is not None:
        options |= {
            "ce_labels": labels, "class_weight": weight, "label_smoothing": smoothing,
            "ce_scale": scales(n)[1] if ce_scale is None else ce_scale, "ce_mask": ce_mask,
        }  # fmt: skip
        if activation != SOFTMAX or temperature != 1.0:
            options["ce_lse"] = log_sum_exp(x).float()
    stages.softmax_bwd(
        x, activation=activation, temperature=temperature, row0=row0, rows=rows, dx=dx,
        valid=valid, **options,
    )  # fmt: skip
    return dx


def scales(n):
    return torch.linspace(0.5, 1.5, n), torch.linspace(2, 1, n)


def definition(work, x, dy, *, activation=SOFTMAX, temperature=1.0, valid=None, labels=None,
               weight=None, smoothing=0.0, ce_mask=None):  # fmt: skip
    """By autograd, in the dtype `work`."""
    v = x.to(work).nan_to_num().requires_grad_()
    scale, ce_scale = (s.to(work) for s in scales(len(x)))
    total = v.sum() * 0
    if dy is not None:
        g = dy[..., : x.shape[1]].permute(0, 3, 1, 2).to(work).nan_to_num()
        g = g if valid is None else g * valid[:, None]
        y = activate(v, activation, temperature)
        total = total + (y * (g * scale.view(-1, 1, 1, 1))).sum()
    if labels is not None:
        known = labels.where((labels >= 0) & (labels < x.shape[1]), torch.tensor(-1))
        ce = F.cross_entropy(
            v, known, None if weight is None else weight.to(work), ignore_index=-1,
            reduction="none", label_smoothing=smoothing,
        )  # fmt: skip
        ce = ce if ce_mask is None else ce * ce_mask
        total = total + (ce * ce_scale.view(-1, 1, 1)).sum()
    return torch.autograd.grad(total, v)[0]


def by_definition(x, dy, **how):
    """(PyTorch's in float32, the truth)"""
    return definition(FLOAT, x, dy, **how), definition(torch.float64, x, dy, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "size"), SIZES)
def test_against_float64(stages, classes, size, dtype):
    for activation, temperature, kind, x_dtype, extra in [
        (SOFTMAX, 1.0, "nchw", FLOAT, 0),
        (SOFTMAX, 2.5, "channels_last", BF16, 5),
        (SIGMOID, 2.0, "sliced", HALF, 3),
        (NONE, 3.0, "channels_last", FLOAT, -classes % 8),
        (SOFTMAX, 0.5, "sliced", FLOAT, 0),
        (SOFTMAX, 0.5, "nchw", HALF, 0),
    ]:
        x = layout((3 * torch.randn(2, classes, *size)).to(x_dtype), kind)
        dy = torch.randn(2, *size, classes + extra).to(dtype)
        dy[..., classes:] = float("nan")  # padding is not read as classes
        how = {"activation": activation, "temperature": temperature}
        plain, truth = by_definition(x, dy, **how)
        check(gradient(stages, x, dy, **how), plain.to(x_dtype), truth, FLOAT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [3, 19])
def test_any_temperature(stages, classes, temperature):
    x, dy = logits_of_every_kind(2, classes, 2, 40), torch.randn(2, 2, 40, classes)
    ours = gradient(stages, x, dy, temperature=temperature)
    for case in by_kind(ours, *by_definition(x, dy, temperature=temperature)):
        check(*case, FLOAT)


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3])
@pytest.mark.parametrize("activation", [NONE, SIGMOID])
def test_any_temperature_of_the_other_activations(stages, activation, temperature):
    x, dy = 3 * torch.randn(1, 3, 5, 16), torch.randn(1, 5, 16, 3)
    x[0, :, 0] = torch.tensor([0.0, LOWEST, -LOWEST])[:, None]
    dx = gradient(stages, x, dy, activation=activation, temperature=temperature)
    assert not dx.isnan().any()
    if activation == SIGMOID:
        assert not dx[0, 1:, 0].any()  # saturated: 0 · 1 / T


@pytest.mark.parametrize("classes", [19, 3, 600, 1300])
@pytest.mark.parametrize(
    ("activation", "temperature"), [(SOFTMAX, 1.0), (SOFTMAX, 2.0), (NONE, 1.0), (SIGMOID, 1.0)]
)
def test_cross_entropy_and_invalid_pixels(stages, activation, temperature, classes):
    """NaN is harmless where neither loss counts the pixel."""
    for weight, smoothing, dense in [
        (None, 0.0, True), (torch.rand(classes), 0.2, True), (torch.rand(classes), 0.0, False)
    ]:  # fmt: skip
        x, labels = 3 * torch.randn(2, classes, 2, 37), torch.randint(-1, classes, (2, 2, 37))
        labels[0, 0, 0] = classes + 3
        valid, dy = torch.rand(2, 2, 37) > 0.3, torch.randn(2, 2, 37, classes)
        dead = ~valid & (labels < 0)
        x[dead[:, None].expand_as(x)] = float("nan")
        dy[~valid] = float("nan")
        how = {
            "activation": activation, "temperature": temperature, "labels": labels,
            "weight": weight, "smoothing": smoothing, "valid": valid,
        }  # fmt: skip
        given = dy if dense else None
        ours = gradient(stages, x, given, **how)
        check(ours, *by_definition(x, given, **how), FLOAT)
        assert not ours.permute(0, 2, 3, 1)[dead].any()


def test_a_cross_entropy_of_weight_0_has_no_gradient(stages):
    x, labels = logits_of_every_kind(2, 19, 2, 40), torch.randint(0, 19, (2, 2, 40))
    for temperature in (0.3, 1.0):
        how = {"labels": labels, "temperature": temperature, "smoothing": 0.1}
        dx = gradient(stages, x, None, **how, ce_scale=torch.tensor([0.0, 1.0]))
        assert (dx[0] == 0).all()
        assert dx[1].any()
        assert (gradient(stages, x, None, **how, weight=torch.zeros(19)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_strips_give_the_same_bits(stages, dtype):
    """`dtype` is that of the logits."""
    x, dy = torch.randn(2, 22, 7, 64).to(dtype), torch.randn(2, 7, 64, 24).to(BF16)
    valid, labels = torch.rand(2, 7, 64) > 0.2, torch.randint(-1, 22, (2, 7, 64))
    how = {"valid": valid, "labels": labels, "smoothing": 0.1}
    whole = gradient(stages, x, dy, **how)
    for kind in LAYOUTS:
        for dx_kind in LAYOUTS:
            dx = layout(torch.full_like(x, float("nan")), dx_kind)
            assert torch.equal(gradient(stages, layout(x, kind), dy, dx=dx, **how), whole)
    (dx,) = poisoned_like(x)
    for row0, rows in ((0, 3), (3, 2), (5, 2)):
        strip = dy[:, row0 : row0 + rows].contiguous()
        gradient(stages, x, strip, strip=(row0, rows), dx=dx, **how)
        assert dx[:, :, row0 + rows :].isnan().all()
    assert torch.equal(dx, whole)
    around = F.pad(dy, (0, 0, 0, 0, 2, 2), value=float("nan"))[:, 1:6]
    part = gradient(stages, x, around.contiguous(), strip=(-1, 5), **how)
    assert torch.equal(part[:, :, :4], whole[:, :, :4])
    assert part[:, :, 4:].isnan().all()


@pytest.mark.parametrize("classes", [19, 1300])
def test_orders_agree_bit_for_bit(stages, classes):
    """Also of channels that are taken in chunks."""
    x, dy = torch.randn(2, classes, 2, 45), torch.randn(2, 2, 45, classes)
    labels, weight = torch.randint(-1, classes, (2, 2, 45)), torch.rand(classes)
    found = []
    for order in stages.orders.values():
        with order():
            found.append(gradient(stages, x, dy, labels=labels, weight=weight, smoothing=0.1))
    assert all(torch.equal(dx, found[0]) for dx in found)


@pytest.mark.parametrize("classes", [90, 257])
def test_layouts_give_the_same_bits_of_chunks(stages, classes):
    x, dy = torch.randn(1, classes, 2, 45), torch.randn(1, 2, 45, classes)
    whole = gradient(stages, x, dy)
    for kind in LAYOUTS:
        assert torch.equal(gradient(stages, layout(x, kind), dy, dx=layout(x, kind) * 0), whole)


@pytest.mark.only("cuda")
@pytest.mark.parametrize("kind", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bank_conflicts(stages, dtype, kind):
    """128 bytes of a warp's accesses to shared memory take one pass over the banks."""
    emulation = operators.load()
    emulation.count_shared(True)
    # More than 32 side by side would not be counted together: some lanes have more than others.
    for classes in (3, 13, 19, 32) if kind == "channels_last" else (3, 19, 40, 64, 152, 264):
        x = layout(torch.randn(1, classes, 3, 40), kind)
        gradient(stages, x, torch.randn(1, 3, 40, -(-classes // 8) * 8).to(dtype))
        counted = emulation.counters()
        assert counted["shared_phases"] == counted["shared"] > 0, classes
    emulation.count_shared(False)


@pytest.mark.only("cuda")
@pytest.mark.parametrize("classes", [8, 150, 512, 2000])
def test_shared_memory_of_every_gpu(stages, classes):
    """99 KiB are enough for all of them."""
    emulation = operators.load()
    emulation.play(86)
    try:
        for kind in ("nchw", "channels_last"):
            x, dy = torch.randn(1, classes, 1, 33), torch.randn(1, 1, 33, classes)
            check(gradient(stages, layout(x, kind), dy), *by_definition(x, dy), FLOAT)
    finally:
        emulation.play(80)


@pytest.mark.only("cpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_gradient_is_written_past_the_cache(stages, dtype):
    h = 960 // dtype.itemsize * 2
    x, dy = torch.randn(1, 19, h, 512).to(dtype), torch.randn(1, h, 512, 19)
    assert x.nbytes > 16 * 2**20
    whole = gradient(stages, x, dy)
    for rows in (slice(0, 9), slice(h - 10, h)):
        small = gradient(stages, x[:, :, rows].contiguous(), dy[:, rows].contiguous())
        assert torch.equal(whole[:, :, rows], small)


def test_no_images(stages):
    assert gradient(stages, torch.empty(0, 3, 4, 5), torch.empty(0, 4, 5, 3)).shape == (0, 3, 4, 5)
