"""Masks of numbers, the weights of pixels: every stage that takes a mask, against its definition in
float64, and with 0 and 1 the bits of a bool mask."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import call_of
from conv_block_backward import Block, Logits
from conv_block_forward import Case, definition, inputs, run
from definitions import (
    BF16,
    DTYPES,
    FLOAT,
    NONE,
    SIGMOID,
    SOFTMAX,
    activate,
    carried,
    check,
    nhwc,
    odd_images,
    poisoned_like,
    same_bits,
)
from test_branch import decided
from test_branch import inputs as of_branch
from test_conv_block_fwd import PLAIN
from test_look_up import check_look_up, table_of, topk_case
from test_softmax_bwd import by_definition, gradient
from test_softmax_pack import pack

from gpl_fast import LossNet

SIZE = (13, 27)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: f"weights-{str(d)[6:]}")


def weights(*size: int) -> torch.Tensor:
    """Some 0, some 1 beside each other, some anything."""
    m = 3 * torch.rand(size)
    m = torch.where(torch.rand(size) < 0.2, 0.0, m)
    m[..., : size[-1] // 2] = torch.where(m[..., : size[-1] // 2] > 0, 1.0, 0.0)
    return m


def listed_case(kind: str, classes: int, *size: int):
    """What `pack` takes of a target of a kind, and its dense map (N, C, H, W) float64."""
    if kind == "topk":
        *lists, dense = topk_case(classes, 2, True, size[1:])
        return {"topk": lists}, dense
    if kind == "labels":
        labels = torch.randint(-1, classes, size)
        at = labels.clamp(min=0)[:, None]
        dense = torch.zeros(size[0], classes, *size[1:]).scatter(1, at, 1.0)
        return {"labels": labels}, dense.double() * (labels >= 0)[:, None]
    dense = torch.rand(size[0], classes, *size[1:])
    return {"target": dense, "target_activation": NONE}, dense.double()


# --------------------------------------------------------------------------------- softmax_pack_fwd


@pytest.mark.needs("softmax_pack_fwd")
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
@of_dtypes
def test_maps_are_multiplied(stages, dtype, kind):
    m = weights(2, *SIZE)
    for activation in (SOFTMAX, SIGMOID):
        x = 3 * torch.randn(2, 5, *SIZE)
        x[(m == 0)[:, None].expand_as(x)] = float("nan")
        target, dense = listed_case(kind, 5, 2, *SIZE)
        y, other, *_ = pack(stages, x, valid=m, activation=activation, dtype=dtype, **target)
        of_target = nhwc(dense) * m[..., None]

        def prediction(work, x=x, activation=activation):
            p = nhwc(activate(x.nan_to_num().to(work), activation))
            return torch.where(m[..., None] > 0, p * m[..., None], 0)

        if kind == "dense":
            plain, truth = prediction(FLOAT), prediction(torch.float64)
            check(y, carried(plain, of_target.float()).to(dtype), carried(truth, of_target), dtype)
            check(other, (plain - of_target.float()).to(dtype), truth - of_target, dtype)
        else:
            taken = other[..., None] * of_target
            truth = prediction(torch.float64) - taken
            check(y, (prediction(FLOAT) - taken.float()).to(dtype), truth, dtype)
            assert not other[m == 0].any()
            assert other.any()
        assert not y[m == 0].any()


@pytest.mark.needs("softmax_pack_fwd")
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
@of_dtypes
def test_maps_have_the_bits_of_a_bool_mask(stages, dtype, kind):
    x, valid = 3 * torch.randn(2, 19, *SIZE), torch.rand(2, *SIZE) > 0.3
    target, _ = listed_case(kind, 19, 2, *SIZE)
    for activation, temperature in ((SOFTMAX, 1.0), (SOFTMAX, 2.5), (SIGMOID, 1.0), (NONE, 3.0)):
        how = {"activation": activation, "temperature": temperature, "dtype": dtype, **target}
        found = [pack(stages, x, valid=v, **how) for v in (valid, valid.float())]
        for got, want in zip(*found, strict=True):
            assert got is None or same_bits(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.needs("softmax_pack_fwd")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_is_weighted(stages, temperature):
    x, labels, m = (
        3 * torch.randn(2, 19, *SIZE),
        torch.randint(-1, 19, (2, *SIZE)),
        weights(2, *SIZE),
    )
    for weight, smoothing in ((None, 0.0), (torch.rand(19), 0.2)):
        how = {"ce": (labels, weight, smoothing), "temperature": temperature}
        rows = pack(stages, x, ce_mask=m, **how)[-1]
        kw = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
        each = torch.ones(19) if weight is None else weight
        truth = F.cross_entropy(x.double(), labels, each.double(), **kw) * m
        torch.testing.assert_close(rows[..., 0], truth.sum(-1), rtol=1e-6, atol=1e-5)
        count = each[labels.clamp(min=0)].double() * (labels >= 0) * m
        torch.testing.assert_close(rows[..., 1], count.sum(-1))
        ones = pack(stages, x, ce_mask=torch.ones_like(m), **how)[-1]
        assert same_bits(ones, pack(stages, x, **how)[-1])


# ----------------------------------------------------------------------------------- the look-ups


def look_up_case(stages, kind: str, dtype: torch.dtype, valid: torch.Tensor):
    """The look-up, the dense map that it adds, weighted, and the weight of the convolution."""
    weight, table = table_of(5, 3, 40, dtype)
    if kind == "labels":
        labels = torch.randint(-1, 5, (2, *SIZE))
        labels[:, 2:11, 3:20] = 3  # an interior
        known = labels.clamp(min=0)[:, None]
        dense = torch.zeros(2, 5, *SIZE, dtype=torch.float64).scatter(1, known, 1.0)
        dense *= (labels >= 0)[:, None]
        look_up = functools.partial(
            stages.label_conv_fwd, labels, valid=valid, table=table,
            interior=table.double().sum(0).float(),
        )  # fmt: skip
    else:
        values, indices, rest, dense = topk_case(5, 2, kind == "topk and rest")
        look_up = functools.partial(
            stages.topk_conv_fwd, values, topk_indices=indices, topk_rest=rest, valid=valid,
            table=table, rest_table=None if rest is None else table.double().sum(1).float(),
        )  # fmt: skip
    return look_up, dense * valid[:, None], weight


@pytest.mark.needs("label_conv_fwd", "topk_conv_fwd")
@pytest.mark.parametrize("kind", ["labels", "topk", "topk and rest"])
@of_dtypes
def test_looked_up_rows_are_multiplied(stages, dtype, kind):
    m = weights(2, *SIZE)
    m[:, 2:11, 3:20] = 1.0  # as an interior it takes one row
    m[1, 2:11, 3:20] = 0.7
    m[1, 5, 7] = 2.0  # but not here
    check_look_up(*look_up_case(stages, kind, dtype, m), dtype)


@pytest.mark.needs("label_conv_fwd", "topk_conv_fwd")
@pytest.mark.parametrize("kind", ["labels", "topk", "topk and rest"])
@of_dtypes
def test_looked_up_rows_have_the_bits_of_a_bool_mask(stages, dtype, kind):
    valid = torch.rand(2, *SIZE) > 0.1
    valid[:, 2:11, 3:20] = True
    look_up, *_ = look_up_case(stages, kind, dtype, valid)
    q, taken, found = torch.randn(2, *SIZE, 40).to(dtype), torch.rand(2, *SIZE) > 0.4, []
    taken[:, 2:11, 3:20] = True
    for v in (valid, valid.float()):
        (z,), dz = poisoned_like(q), q.clone()
        look_up(
            from_target=odd_images(2), taken=taken.byte(), taken_row0=0, row0=0, z=z, dz=dz, valid=v
        )
        found.append(torch.stack([z, dz]))
    assert same_bits(*found)


@pytest.mark.needs("conv_block_fwd")
@pytest.mark.parametrize("form", ["labels", "topk", "topk and rest"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["weights-float32", "weights-bfloat16"])
def test_of_a_whole_step(stages, dtype, form):
    case: Case = replace(PLAIN, dtype=dtype, form=form, c=19, c_out=24)
    given = inputs(case, images=2)
    valid = given.target.valid
    of_bool = run(stages, case, given)
    given.target = replace(given.target, valid=valid.float())
    for name in ("y", "delta", "code", "partial"):
        assert same_bits(getattr(run(stages, case, given), name), getattr(of_bool, name))
    m = torch.where(valid, weights(*valid.shape), 0)
    given.target, given.dense = replace(given.target, valid=m), given.dense * m[:, None]
    got, plain, truth = (
        run(stages, case, given),
        *(definition(case, given, t) for t in (dtype, torch.float64)),
    )
    for name in ("y", "delta"):
        check(getattr(got, name), getattr(plain, name), getattr(truth, name), dtype)


# ------------------------------------------------------------------------------------ backward


@pytest.mark.needs("softmax_bwd")
@pytest.mark.parametrize("activation", [SOFTMAX, SIGMOID, NONE])
@of_dtypes
def test_gradient_of_logits(stages, dtype, activation):
    for temperature, dense, classes in ((1.0, True, 19), (2.0, True, 150), (1.0, False, 19)):
        x, dy = 3 * torch.randn(2, classes, 2, 37), torch.randn(2, 2, 37, classes).to(dtype)
        m, labels = weights(2, 2, 37), torch.randint(-1, classes, (2, 2, 37))
        labels[m == 0] = -1
        x[(m == 0)[:, None].expand_as(x)] = float("nan")
        dy[m == 0] = float("nan")
        how = {"activation": activation, "temperature": temperature, "valid": m}
        ce = {"labels": labels, "weight": torch.rand(classes), "smoothing": 0.2, "ce_mask": m}
        for more in (ce, {}) if dense else (ce,):
            given = dy if dense else None
            ours = gradient(stages, x, given, **how, **more)
            check(ours, *by_definition(x, given, **how, **more), FLOAT)
            assert not ours.permute(0, 2, 3, 1)[m == 0].any()


@pytest.mark.needs("softmax_bwd")
def test_gradient_of_logits_has_the_bits_of_a_bool_mask(stages):
    x, dy = 3 * torch.randn(2, 19, 3, 37), torch.randn(2, 3, 37, 19)
    valid, labels = torch.rand(2, 3, 37) > 0.3, torch.randint(-1, 19, (2, 3, 37))
    for activation in (SOFTMAX, SIGMOID, NONE):
        for ce in ({}, {"labels": labels, "smoothing": 0.1}):
            want = gradient(stages, x, dy, activation=activation, valid=valid, **ce)
            ones = {"ce_mask": torch.ones(2, 3, 37)} if ce else {}
            got = gradient(stages, x, dy, activation=activation, valid=valid.float(), **ce, **ones)
            assert same_bits(got, want)


@pytest.mark.needs("conv_block_bwd", "conv_block_logits_bwd")
@pytest.mark.parametrize("activation", [SOFTMAX, SIGMOID, NONE])
@pytest.mark.parametrize("classes", [3, 19, 257])
def test_gradient_of_logits_in_a_block(stages, classes, activation):
    block = Block(n=2, c_in=classes, h=9, w=13)
    for how in (
        {},
        {"cross_entropy": True, "class_weight": True, "label_smoothing": 0.1, "temperature": 2.0},
    ):
        logits = Logits(block, activation, masked=True, weighted=True, **how)
        ours = logits.run(stages)
        if not how:
            assert not ours[(logits.valid == 0)[:, None].expand_as(ours)].any()
            logits.x = logits.x.nan_to_num(0.0)
        logits.check(ours)


@pytest.mark.needs("conv_block_bwd", "conv_block_logits_bwd")
def test_a_block_has_the_bits_of_a_bool_mask(stages):
    logits = Logits(Block(n=2, c_in=19, h=9, w=13), masked=True, cross_entropy=True)
    want = logits.run(stages)
    logits.valid, logits.ce_mask = logits.valid.float(), torch.ones(2, 9, 13)
    assert same_bits(logits.run(stages), want)


# -------------------------------------------------------------------------------- carry_target_fwd


@pytest.mark.needs("carry_target_fwd")
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_the_branch_does_not_depend_on_weights(stages, kind):
    x, target = of_branch(kind, (10, 5, 37, 45), masked=True)
    call = call_of(LossNet.vgg(5, (1,)), dtype=BF16, kind=kind)
    want = decided(stages, call, x, target)
    assert 0 < want.sum() < len(want)
    target["valid"] = target["valid"] * (torch.rand(10, 37, 45) + 0.1)
    assert torch.equal(decided(stages, call, x, target), want)
