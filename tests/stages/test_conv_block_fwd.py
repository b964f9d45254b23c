"""`conv_block_fwd` against float64: convolution of both branches, ReLU, pool, code, Σ δ².

The bound is err(ours, float64) <= 2 err(PyTorch in float32, rounded to the dtype, float64) + atol;
codes and masks are float64's wherever the two best candidates differ by more than rounding.
"""

from __future__ import annotations

from dataclasses import replace

import pairwise
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from conv_block_forward import POOLS, Case, Inputs, check_all, inputs, run
from definitions import BF16, FLOAT, HALF, poisoned_like
from torch import Tensor

from gpl_fast.net.weights import padded_channels
from gpl_fast.tiles import Tile

pytestmark = pytest.mark.needs("conv_block_fwd")

FACTORS = {
    "dtype": (FLOAT, BF16, HALF),
    "kernel": (1, 3, 5, 7),
    "pool": ("max", "avg", "none", "stride"),
    "form": ("plain", "diff", "labels", "topk", "topk and rest"),
    "size": ((13, 27), (33, 65), (7, 1000)),
    "c": (1, 3, 19, 150, 1003),
    "from_target": (False, True),
    "c_out": (16, 24, 21),
    "descriptors": (False, True),
}


def excluded(case: pairwise.Case) -> bool:
    """A first convolution has stride 1, as has one by descriptors; a plain map has no branch."""
    listed = case.get("form") in ("labels", "topk", "topk and rest")
    return (
        (case.get("pool") == "stride" and (listed or case.get("descriptors") is True))
        or (case.get("c_out") == 21 and case.get("descriptors") is True)
        or (case.get("form") == "plain" and case.get("from_target") is True)
    )


def cost(case: pairwise.Case) -> float:
    """Megabytes of a and δ that the taps read."""
    h, w = case.get("size", (1, 1))
    maps = 2 if case.get("form") == "diff" else 1
    return h * w * case.get("kernel", 1) ** 2 * padded_channels(case.get("c", 1)) * maps / 2e5


COVERING = pairwise.covering(FACTORS, excluded, cost)


def test_every_pair_occurs():
    met = set().union(*map(pairwise.pairs_of, COVERING))
    pairs = pairwise.all_pairs(FACTORS, excluded)
    assert pairs <= met
    for a, of_a in FACTORS.items():
        for b, of_b in FACTORS.items():
            if a < b:
                open_pairs = sum(not excluded({a: v, b: w}) for v in of_a for w in of_b)
                assert open_pairs == sum({p[0][0], p[1][0]} == {a, b} for p in pairs)
                assert open_pairs >= len(of_a) * len(of_b) - 3


def name(case: pairwise.Case) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case.values())


@pytest.mark.parametrize("drawn", COVERING, ids=name)
def test_against_float64(stages, drawn):
    case = Case(**drawn)
    given = inputs(case)
    check_all(case, given, run(stages, case, given))


# ------------------------------------------------------------------------------------ corners

PLAIN = Case(BF16, 3, "max", "diff", (13, 27), 19, None, 24, False)
SHIPPED = Tile(8, 16, 32, 16, 8, 3, False)  # the table's pixels, cut to these channels

CORNERS = {
    "one column": replace(PLAIN, size=(13, 1), pool="none"),
    "one column, nothing after the pool": replace(PLAIN, size=(13, 1)),
    "one row, nothing after the pool": replace(PLAIN, size=(1, 27), form="labels"),
    "one pixel": replace(PLAIN, size=(1, 1), pool="none", kernel=7, form="topk and rest"),
    "bias": replace(PLAIN, bias=True, c_out=21),
    "bias of a list": replace(PLAIN, bias=True, form="labels", pool="avg", dtype=FLOAT),
    "bias, plain": replace(PLAIN, bias=True, form="plain", pool="none", dtype=HALF),
    "one channel out": replace(PLAIN, c_out=1),
    "nine channels out": replace(PLAIN, c_out=9, pool="avg", form="topk"),
    "stride 2 of odd sizes": replace(PLAIN, size=(13, 28), pool="stride", kernel=5),
    "many programs": replace(PLAIN, tile=SHIPPED),
    "many programs, descriptors": replace(PLAIN, tile=replace(SHIPPED, descriptors=True)),
    "many programs, average": replace(PLAIN, pool="avg", dtype=FLOAT, tile=SHIPPED),
    "many programs, labels": replace(PLAIN, form="labels", tile=SHIPPED),
    "many programs, stride 2": replace(PLAIN, pool="stride", tile=SHIPPED, c_out=21),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(stages, corner):
    case = CORNERS[corner]
    given = inputs(case, images=2)
    check_all(case, given, run(stages, case, given))


@pytest.mark.parametrize("form", ["diff", "labels"])
def test_tf32(stages, form):
    """What TF32 drops is dropped from the operands beforehand; the rest is float32."""
    case = replace(PLAIN, dtype=FLOAT, form=form)
    given = inputs(case, images=2, precision="tf32")
    check_all(case, given, run(stages, case, given, allow_tf32=True))
    given.a += 2**-13  # lost in the product
    lossy = run(stages, case, given, allow_tf32=True)
    assert not torch.equal(lossy.y, run(stages, case, given).y)


@pytest.mark.parametrize("form", ["diff", "labels"])
def test_descriptors_and_tiles_do_not_change_a_bit(stages, form):
    case = replace(PLAIN, form=form)
    given = inputs(case, images=2, quarters=True)
    tried = [Tile(16, 32, 16, 32, 4, 1, False), Tile(8, 16, 32, 16, 4, 1, True)]
    first, second = (run(stages, replace(case, tile=tile), given) for tile in tried)
    for a, b in ((first.y, second.y), (first.delta, second.delta), (first.code, second.code)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("pool", "form"),
    [("max", "plain"), ("max", "diff"), ("max", "labels"), ("max", "topk and rest"),
     ("avg", "diff"), ("none", "diff"), ("none", "labels")],
)  # fmt: skip
def test_strips_equal_the_whole(stages, pool, form):
    """Strips with their halo, whose first and last rows lie outside the image."""
    case = replace(PLAIN, pool=pool, form=form, size=(14, 9), c=3, c_out=8)
    given, p, (h, w) = inputs(case, images=2, quarters=True), 1, (14, 9)
    whole = run(stages, case, given)
    step = 1 if pool == "none" else 2
    for r0, r1 in ((0, 6), (6, 14)):
        lo, hi = r0 - 2, r1 + 2  # rows of the convolution: as if another one followed
        maps = [
            None if m is None else F.pad(m, (0, 0, 0, 0, 8, 8))[:, 8 + lo - p : 8 + hi + p]
            for m in (given.a, given.d)
        ]
        part, target = replace(case, size=(hi - lo, w)), given.target
        if target is not None:
            taken = F.pad(target.taken, (0, 0, 8, 8), value=77)[:, 8 + lo - p : 8 + hi + p]
            target = replace(target, taken=taken.contiguous(), taken_row0=lo - p)
        strip = Inputs(
            maps[0].contiguous(), None if maps[1] is None else maps[1].contiguous(), given.weight,
            None, given.from_target, target, None,
        )  # fmt: skip
        a, b = max(lo, 0), min(hi, h)
        options = {}
        if pool != "max":  # a mask has the image's rows alone
            options["code"] = torch.full((2, b - a, w, 1), 255, dtype=torch.uint8)
        got = run(stages, part, strip, pad_h=0, row0=lo, image_rows=h, **options)
        inside, rows = slice((a - lo) // step, (b - lo) // step), slice(a // step, b // step)
        assert torch.equal(got.y[:, inside], whole.y[:, rows])
        for out in (got.y, got.delta):
            if out is not None:
                assert not out[:, : inside.start].any()
                assert not out[:, inside.stop :].any()
        if form != "plain":
            assert torch.equal(got.delta[:, inside], whole.delta[:, rows])
        if pool == "max":
            assert torch.equal(got.code[:, inside], whole.code[:, rows])
        else:
            assert torch.equal(got.code, whole.code[:, a:b])


@pytest.mark.parametrize("pool", ["max", "avg", "none"])
def test_rows_of_larger_images(stages, pool):
    """Every map may be rows of a taller one; its other rows are left alone."""
    case = replace(PLAIN, pool=pool)
    given = inputs(case, images=3)
    want = run(stages, case, given)

    def inner(t: Tensor, fill) -> tuple[Tensor, Tensor]:
        outer = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), fill, dtype=t.dtype)
        return outer, outer[:, 2:-1]

    a, d = (inner(t, float("nan"))[1].copy_(t) for t in (given.a, given.d))
    outs = [inner(want.y, 7.0), inner(want.delta, 7.0), inner(want.code, 77)]
    y, delta, code = (view for _, view in outs)
    given = replace(given, a=a, d=d)
    got = run(stages, case, given, y=y, delta=delta, code=code)
    assert torch.equal(got.partial, want.partial)
    for (outer, view), expected in zip(outs, (want.y, want.delta, want.code), strict=True):
        assert torch.equal(view, expected)
        assert (outer[:, :2] == outer[0, 0, 0, 0]).all()
        assert (outer[:, -1:] == outer[0, 0, 0, 0]).all()


@pytest.mark.every_case
@pytest.mark.parametrize("pool", ["max", "avg", "none"])
@pytest.mark.parametrize("form", ["diff", "plain"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
def test_the_same_z_gives_the_operators_bits(stages, cpu, dtype, form, pool):
    """The 1 x 1 identity: z is the map itself, so that all that follows must be the operators'."""
    case = replace(PLAIN, dtype=dtype, kernel=1, c=16, c_out=32, form=form, pool=pool)
    given = inputs(case, images=2, quarters=True)  # with ties everywhere
    given.weight = torch.eye(32).to(dtype)
    got = run(stages, case, given)
    y, delta, code = poisoned_like(got.y, got.y, got.code)
    kind = {"mask": code} if pool == "none" else {"pool": POOLS[pool], "code": code}
    name = "relu" if pool == "none" else "relu_pool"
    if form == "plain":
        getattr(cpu, f"{name}_fwd")(given.a, y=y, **kind)
    else:
        of_both = {"dz": given.d, "from_target": given.from_target, "delta": delta}
        getattr(cpu, f"{name}_diff_fwd")(given.a, y=y, **of_both, **kind)
        assert torch.equal(got.delta, delta)
    assert torch.equal(got.y, y)
    assert torch.equal(got.code, code)


def test_the_look_up_is_the_operators(stages, cpu):
    case = replace(PLAIN, dtype=FLOAT, form="labels", c=19, c_out=24)
    given = inputs(case, images=2)
    given.a = torch.zeros_like(given.a)  # z is what the look-up adds alone
    got, target = run(stages, case, given), given.target
    z, dz = (torch.zeros(2, *case.size, case.c_out) for _ in range(2))
    cpu.label_conv_fwd(
        target.labels, table=target.table, interior=target.interior, valid=target.valid,
        from_target=given.from_target, taken=target.taken, taken_row0=0, row0=0, z=z, dz=dz,
    )  # fmt: skip
    y, delta, code = poisoned_like(got.y, got.delta, got.code)
    cpu.relu_pool_diff_fwd(
        z, dz=dz, from_target=given.from_target, pool=0, y=y, delta=delta, code=code
    )
    for a, b in ((got.y, y), (got.delta, delta), (got.code, code)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("left_out", ["y", "delta", "code", "reduce"])
def test_what_is_not_asked_for_changes_nothing_else(stages, left_out):
    given = inputs(PLAIN, images=2)
    whole = run(stages, PLAIN, given)
    option = {left_out: False if left_out == "reduce" else None}
    part = run(stages, PLAIN, given, **option)
    for field in ("y", "delta", "code", "partial"):
        got, want = getattr(part, field), getattr(whole, field)
        missing = field == left_out.replace("reduce", "partial")
        assert got is None if missing else torch.equal(got, want)


def test_orders_agree_bit_for_bit(stages):
    case = replace(PLAIN, tile=SHIPPED)
    given, found = inputs(case, images=2), []
    for order in stages.orders.values():
        with order():
            found.append(run(stages, case, given))
    for other in found[1:]:
        for name in ("y", "delta", "code", "partial"):
            assert torch.equal(getattr(other, name), getattr(found[0], name))
