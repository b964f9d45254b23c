"""The first convolution of a listed target, labels or top-k lists, by rows of a table."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from definitions import BF16, DTYPES, FLOAT, carried, check, nchw, nhwc, odd_images, poisoned_like


def table_of(classes, kernel, c_out, dtype):
    """weight (c_out, C, K, K) and table (K * K, C, c_out)"""
    weight = (torch.randn(c_out, classes, kernel, kernel) / kernel).to(dtype)
    table = weight.permute(2, 3, 1, 0).reshape(kernel**2, classes, c_out).contiguous()
    return weight, table


def conv(dense, weight, dtype):
    return nhwc(F.conv2d(dense.to(dtype), weight.to(dtype), padding=weight.shape[-1] // 2))


def topk_case(classes, k, rest, size=(13, 27)):
    """values, indices with repeats, rest, and the dense map (N, C, H, W) they stand for."""
    values = torch.rand(2, k, *size) / k
    indices = torch.randint(0, classes, (2, k, *size))
    if k > 1:
        indices[:, 1, :4] = indices[:, 0, :4]
    per_class = torch.rand(2, *size) / classes if rest else None
    dense = torch.zeros(2, classes, *size, dtype=torch.float64)
    listed = dense.scatter(1, indices, 1.0)
    dense.scatter_add_(1, indices, values.double())
    if rest:
        dense += (1 - listed) * per_class[:, None]
    return values, indices, per_class, dense


def check_look_up(look_up, dense, weight, dtype):
    """`look_up(from_target=, taken=, …)` of the target `dense` (N, C, H, W)."""
    n, _, h, w = dense.shape
    taken = torch.rand(n, h, w) > 0.4
    taken[:, 2:11, 3:12] = True  # interiors of both kinds
    taken[:, 2:11, 12:20] = False
    q = torch.randn(n, h, w, weight.shape[0]).to(dtype)
    (z,), dz = poisoned_like(q), q.clone()
    look_up(from_target=odd_images(n), taken=taken.byte(), taken_row0=0, row0=0, z=z, dz=dz)

    def truth(work):
        mine, all_of_it = (conv(m, weight, work) for m in (dense * taken[:, None], dense))
        return carried(q.to(work) + mine, all_of_it), q.to(work) - (all_of_it - mine)

    for got, plain, exact in zip((z, dz), truth(FLOAT), truth(torch.float64), strict=True):
        check(got, plain.to(dtype), exact, dtype)
    return q, taken, z, dz


@pytest.mark.needs("label_conv_fwd")
@pytest.mark.parametrize(
    ("classes", "kernel", "c_out"), [(1, 3, 64), (19, 1, 64), (19, 3, 24), (150, 5, 70)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels(stages, dtype, classes, kernel, c_out, monkeypatch):
    if stages.name == "triton" and kernel == 5:  # by the smaller tiles it takes longest
        label_conv = importlib.import_module("gpl_fast.kernels.label_conv")
        monkeypatch.setattr(label_conv, "PIXELS", 128)
    weight, table = table_of(classes, kernel, c_out, dtype)
    labels = torch.randint(-1, classes, (2, 13, 27))
    # an interior, with or without a class
    labels[:, 2:11, 3:20] = torch.randint(-1, classes, (2, 1, 1))
    labels[0, 0, 0] = classes
    valid = torch.rand(2, 13, 27) > 0.05
    known = (labels >= 0) & (labels < classes) & valid
    at = labels.clamp(0, classes - 1)[..., None]
    dense = nchw(torch.zeros(2, 13, 27, classes).scatter(3, at, 1.0) * known[..., None])
    interior = table.double().sum(0).float()
    look_up = functools.partial(
        stages.label_conv_fwd, labels, valid=valid, table=table, interior=interior
    )
    q, taken, z, dz = check_look_up(look_up, dense, weight, dtype)

    around = F.pad(q, (0, 0, 0, 0, 2, 2), value=float("nan"))
    (strip,) = poisoned_like(around)
    look_up(
        from_target=odd_images(2), taken=taken.byte(), taken_row0=0, row0=-2, z=strip, dz=around
    )
    for part, whole in ((strip, z), (around, dz)):
        assert torch.equal(part[:, 2:15], whole)
        assert not part[:, :2].any()
        assert not part[:, 15:].any()


@pytest.mark.needs("topk_conv_fwd")
@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "k"), [(19, 4), (3, 1)])
def test_topk(stages, classes, k, dtype, rest):
    weight, table = table_of(classes, 3, 40, dtype)
    values, indices, per_class, dense = topk_case(classes, k, rest)
    valid = torch.rand(2, 13, 27) > 0.1
    dense = dense * valid[:, None]
    values = values.where(valid[:, None], torch.tensor(float("nan")))  # harmless there
    rest_table = table.double().sum(1).float() if rest else None
    look_up = functools.partial(
        stages.topk_conv_fwd, values, topk_indices=indices, topk_rest=per_class, valid=valid,
        table=table, rest_table=rest_table,
    )  # fmt: skip
    q, taken, z, dz = check_look_up(look_up, dense, weight, dtype)

    around = F.pad(q[:, 10:], (0, 0, 0, 0, 0, 2), value=float("nan"))
    (strip,) = poisoned_like(around)
    rows = taken[:, 9:].byte().contiguous()
    look_up(from_target=odd_images(2), taken=rows, taken_row0=9, row0=10, z=strip, dz=around)
    for part, whole in ((strip, z), (around, dz)):
        assert torch.equal(part[:, :3], whole[:, 10:])
        assert not part[:, 3:].any()


@pytest.mark.needs("label_conv_fwd")
def test_orders_agree_bit_for_bit(stages):
    _, table = table_of(19, 3, 24, BF16)
    labels, taken = torch.randint(-1, 19, (2, 5, 33)), (torch.rand(2, 5, 33) > 0.5).byte()
    q, found = torch.randn(2, 5, 33, 24).to(BF16), []
    for order in stages.orders.values():
        (z,), dz = poisoned_like(q), q.clone()
        with order():
            stages.label_conv_fwd(
                labels, table=table, interior=table.float().sum(0), from_target=odd_images(2),
                taken=taken, taken_row0=0, row0=0, z=z, dz=dz,
            )  # fmt: skip
        found.append(torch.stack([z, dz]))
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.needs("label_conv_fwd")
def test_no_images(stages):
    z, table = torch.empty(0, 5, 7, 8), torch.randn(9, 3, 8)
    nothing = torch.empty(0, 5, 7)
    stages.label_conv_fwd(
        nothing.long(), table=table, interior=table.sum(0), from_target=odd_images(0),
        taken=nothing.byte(), taken_row0=0, row0=0, z=z, dz=z.clone(),
    )  # fmt: skip
