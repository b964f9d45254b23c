"""`conv_block_fwd` against float64: convolution of both branches, ReLU, pool, code, Σ δ².

The bound is err(ours, float64) <= 2 err(PyTorch in float32, rounded to the dtype, float64) + atol;
codes and masks are float64's wherever the two best candidates differ by more than rounding.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import pairwise
import pytest
import repairs
import torch
import torch.nn.functional as F
from saved import unpack_code, unpack_mask, windows
from torch import Tensor

from gpl_fast import kernels, ops, tiles
from gpl_fast.kernels import conv_block
from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import Listed
from gpl_fast.tiles import Tile

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
ATOL = {FLOAT: 1e-6, BF16: 1e-5, HALF: 1e-6}
POOLS = {"max": 0, "avg": 1, "none": 2, "stride": 2}

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


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    kernel: int
    pool: str
    form: str
    size: tuple[int, int]
    c: int
    from_target: bool | None  # None: every other image
    c_out: int
    descriptors: bool
    bias: bool = False
    reduce: bool = True
    tile: Tile | None = None  # a large one

    @property
    def stride(self) -> int:
        return 2 if self.pool == "stride" else 1

    @property
    def out(self) -> tuple[int, int]:
        h, w = (-(-s // self.stride) for s in self.size)
        return (h // 2, w // 2) if self.pool in ("max", "avg") else (h, w)


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


# ------------------------------------------------------------------------------------- inputs


@dataclass
class Inputs:
    a: Tensor  # (N, H, W, C_in)
    d: Tensor | None
    weight: Tensor  # (K² C_in, C_out)
    bias: Tensor | None
    from_target: Tensor | None  # (N,)
    target: Listed | None
    dense: Tensor | None  # (N, C, H, W) float64, what `target` stands for


def exact(x: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """`x` in the dtype, without the bits that TF32 drops where that is how products are made."""
    if dtype == FLOAT and precision == "tf32":
        return torch.from_numpy(repairs.to_tf32(x.numpy()))
    return x.to(dtype)


def inputs(case: Case, images: int = 1, precision: str = "ieee", quarters: bool = False) -> Inputs:
    """With `quarters` all sums of products are exact, in any order."""
    h, w = case.size
    c_in, taps = padded_channels(case.c), case.kernel**2

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if quarters:
            return torch.randn(shape).mul(4).round().div(4).to(case.dtype)
        return exact(scale * torch.randn(shape), case.dtype, precision)

    a, weight = draw(images, h, w, c_in), draw(taps * c_in, case.c_out, scale=taps**-0.5)
    a[..., case.c :] = 0
    d = draw(images, h, w, c_in, scale=0.1) if case.form == "diff" else None
    bias = torch.randn(case.c_out) if case.bias else None
    branch = None
    if case.form != "plain":
        odd = torch.arange(images) % 2 == 1
        branch = odd if case.from_target is None else torch.full((images,), case.from_target)
    target, dense = None, None
    if case.form not in ("plain", "diff"):
        table = weight.view(taps, c_in, case.c_out)[:, : case.c].contiguous()
        taken = (torch.rand(images, h, w) > 0.4).byte()
        target, dense = listed(case, images, table, taken)
    return Inputs(a, d, weight, bias, branch, target, dense)


def listed(case: Case, n: int, table: Tensor, taken: Tensor) -> tuple[Listed, Tensor]:
    (h, w), c = case.size, case.c
    valid = torch.rand(n, h, w) > 0.1
    dense = torch.zeros(n, c, h, w, dtype=torch.float64)
    if case.form == "labels":
        labels = torch.randint(-1, c, (n, h, w))
        labels[:, :, : w // 2] = 0  # interiors: one row of the table for all taps
        valid[:, :, : w // 2] = True
        taken[:, :, : w // 4] = 1
        taken[:, :, w // 4 : w // 2] = 0
        labels[0, 0, -1] = c + 2
        known = (labels >= 0) & (labels < c) & valid
        dense.scatter_(1, labels.clamp(0, c - 1).unsqueeze(1), 1.0).mul_(known.unsqueeze(1))
        interior = table.double().sum(0).float()
        return Listed(table, taken, 0, labels=labels, interior=interior, valid=valid), dense
    k = min(c, 3)
    values, indices = torch.rand(n, k, h, w) / k, torch.randint(0, c, (n, k, h, w))
    dense.scatter_add_(1, indices, values.double())
    rest, rest_table = None, None
    if case.form == "topk and rest":
        rest = torch.rand(n, h, w) / c
        unlisted = torch.ones_like(dense).scatter_(1, indices, 0.0)
        dense += unlisted * rest.unsqueeze(1)
        rest_table = table.double().sum(1).float()
    dense *= valid.unsqueeze(1)
    found = Listed(
        table, taken, 0, values=values, indices=indices, rest=rest, rest_table=rest_table,
        valid=valid,
    )  # fmt: skip
    return found, dense


# -------------------------------------------------------------------------------------- truth


@dataclass
class Truth:
    prediction: Tensor  # (N, C_out, H, W): its z
    y: Tensor  # NHWC, of the carried branch
    delta: Tensor


def definition(case: Case, given: Inputs, work: torch.dtype) -> Truth:
    k, weight = case.kernel, given.weight.to(work)
    w = weight.view(k, k, -1, case.c_out).permute(3, 2, 0, 1)

    def conv(x: Tensor, channels: int) -> Tensor:
        return F.conv2d(x.to(work), w[:, :channels], None, case.stride, k // 2)

    z = conv(given.a.permute(0, 3, 1, 2), w.shape[1])
    dz = torch.zeros_like(z)
    branch = torch.zeros(len(z), 1, 1, 1, dtype=torch.bool)
    if given.from_target is not None:
        branch = given.from_target.view(-1, 1, 1, 1)
    if given.d is not None:
        dz = conv(given.d.permute(0, 3, 1, 2), w.shape[1])
    elif given.dense is not None:
        dense, taken = given.dense, given.target.taken.unsqueeze(1)
        mine, whole = conv(dense * taken, case.c), conv(dense, case.c)
        z, dz = torch.where(branch, whole, z + mine), z - (whole - mine)
    if given.bias is not None:
        z = z + given.bias.to(work).view(1, -1, 1, 1)
    prediction, target = z + dz * branch, z - dz * ~branch

    def put_out(z: Tensor) -> Tensor:
        y = z.relu()
        if case.pool == "max":
            y = windows(y).amax(dim=-1)
        elif case.pool == "avg":
            y = windows(y).mean(dim=-1)
        return y.permute(0, 2, 3, 1)

    return Truth(prediction, put_out(z), put_out(prediction) - put_out(target))


def check(got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    bound = 2 * (plain.to(dtype).double() - truth).abs().max()
    bound += ATOL[dtype] * max(1, truth.abs().max())
    assert (got.double() - truth).abs().max() <= bound


def check_code(case: Case, code: Tensor, truth: Truth, plain: Truth) -> None:
    """4-bit winners or 1-bit signs wherever float32's own error leaves them no choice."""
    z = truth.prediction
    rounding = 4 * (plain.prediction.double() - z).abs().max() + 1e-6 * z.abs().max()
    if case.pool == "max":
        candidates = torch.cat([windows(z), torch.zeros_like(windows(z)[..., :1])], dim=-1)
        best = candidates.topk(2, dim=-1)
        sure = best.values[..., 0] - best.values[..., 1] > rounding
        got, want = unpack_code(code, case.c_out), best.indices[..., 0]
        spare = code[..., -1] >> 4 if case.c_out % 2 else code[:0]
    else:
        sure, got, want = z.abs() > rounding, unpack_mask(code, case.c_out), z > 0
        spare = code[..., -1] >> case.c_out % 8 if case.c_out % 8 else code[:0]
    if sure.numel():
        assert sure.double().mean() > 0.95
    assert torch.equal(got[sure], want[sure])
    assert not spare.any()


# ---------------------------------------------------------------------------------------- run


def power(x: int) -> int:
    return 1 << (x - 1).bit_length()


def large_tile(case: Case) -> Tile:
    """As few programs and steps as Triton's limit on a tensor allows."""
    block_h, block_w = {(33, 65): (16, 128)}.get(case.size, tuple(map(power, case.size)))
    block_h, block_n = max(block_h, 2), power(max(case.c_out, 8))
    most = 2**20 // (block_h * max(block_w, 2))
    block_k = min(power(padded_channels(case.c)), most, 2**20 // block_n)
    return Tile(block_h, max(block_w, 2), block_k, block_n, 4, 1, case.descriptors)


@dataclass
class Output:
    y: Tensor | None
    delta: Tensor | None
    code: Tensor
    partial: Tensor | None


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def code_shape(case: Case, n: int, rows: int) -> tuple[int, ...]:
    if case.pool == "max":
        return n, rows // 2, case.size[1] // 2, -(-case.c_out // 2)
    return n, rows, -(-case.size[1] // case.stride), -(-case.c_out // 8)


def run(case: Case, given: Inputs, **options) -> Output:
    """In true float32 unless `allow_tf32` says otherwise."""
    n, (h, w) = len(given.a), case.out
    rows = -(-case.size[0] // case.stride)
    y = nan(n, h, w, case.c_out, dtype=case.dtype)
    out = {
        "y": y,
        "delta": None if case.form == "plain" else y.clone(),
        "code": torch.full(code_shape(case, n, rows), 255, dtype=torch.uint8),
    }
    before = [t.clone() for t in (given.a, given.weight)]
    options = {
        "pad_h": case.kernel // 2, "row0": 0, "image_rows": rows, **out,
        "reduce": case.reduce and case.form != "plain", "allow_tf32": False, **options,
    }  # fmt: skip
    partial = kernels.conv_block_fwd(
        given.a, d=given.d, weight=given.weight, bias=given.bias, from_target=given.from_target,
        target=given.target, kernel_size=case.kernel, stride=case.stride, relu=True,
        pool=POOLS[case.pool], tile=large_tile(case) if case.tile is None else case.tile, **options,
    )  # fmt: skip
    assert all(map(torch.equal, before, (given.a, given.weight)))
    return Output(options["y"], options["delta"], options["code"], partial)


def check_all(case: Case, given: Inputs, got: Output) -> None:
    truth, plain = (definition(case, given, work) for work in (torch.float64, FLOAT))
    check(got.y, plain.y, truth.y, case.dtype)
    check_code(case, got.code, truth, plain)
    if case.form != "plain":
        check(got.delta, plain.delta, truth.delta, case.dtype)
        squares = got.delta.double().square().flatten(1).sum(1)
        torch.testing.assert_close(got.partial.double().sum(1), squares, rtol=1e-6, atol=0)


def name(case: pairwise.Case) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case.values())


@pytest.mark.parametrize("drawn", COVERING, ids=name)
def test_against_float64(drawn):
    case = Case(**drawn)
    given = inputs(case)
    check_all(case, given, run(case, given))


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
def test_corners(corner):
    case = CORNERS[corner]
    given = inputs(case, images=2)
    check_all(case, given, run(case, given))


@pytest.mark.parametrize("form", ["diff", "labels"])
def test_tf32(form):
    """What TF32 drops is dropped from the operands beforehand; the rest is float32."""
    case = replace(PLAIN, dtype=FLOAT, form=form)
    given = inputs(case, images=2, precision="tf32")
    check_all(case, given, run(case, given, allow_tf32=True))
    given.a += 2**-13  # lost in the product
    lossy = run(case, given, allow_tf32=True)
    assert not torch.equal(lossy.y, run(case, given).y)


@pytest.mark.parametrize("form", ["diff", "labels"])
def test_descriptors_and_tiles_do_not_change_a_bit(form):
    case = replace(PLAIN, form=form)
    given = inputs(case, images=2, quarters=True)
    tiles = [Tile(16, 32, 16, 32, 4, 1, False), Tile(8, 16, 32, 16, 4, 1, True)]
    first, second = (run(replace(case, tile=tile), given) for tile in tiles)
    for a, b in ((first.y, second.y), (first.delta, second.delta), (first.code, second.code)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("pool", "form"),
    [("max", "plain"), ("max", "diff"), ("max", "labels"), ("max", "topk and rest"),
     ("avg", "diff"), ("none", "diff"), ("none", "labels")],
)  # fmt: skip
def test_strips_equal_the_whole(pool, form):
    """Strips with their halo, whose first and last rows lie outside the image."""
    case = replace(PLAIN, pool=pool, form=form, size=(14, 9), c=3, c_out=8)
    given, p, (h, w) = inputs(case, images=2, quarters=True), 1, (14, 9)
    whole = run(case, given)
    step = 1 if pool == "none" else 2
    for r0, r1 in ((0, 6), (6, 14)):
        lo, hi = r0 - 2, r1 + 2  # rows of the convolution: as if another one followed
        maps = [
            None if m is None else F.pad(m, (0, 0, 0, 0, 8, 8))[:, 8 + lo - p : 8 + hi + p]
            for m in (given.a, given.d)
        ]
        part, target = replace(case, size=(hi - lo, w)), given.target
        if target is not None:
            a, b = max(lo - p, 0), min(hi + p, h)
            target = replace(target, taken=target.taken[:, a:b].contiguous(), taken_row0=a)
        strip = Inputs(
            maps[0].contiguous(), None if maps[1] is None else maps[1].contiguous(), given.weight,
            None, given.from_target, target, None,
        )  # fmt: skip
        a, b = max(lo, 0), min(hi, h)
        options = {}
        if pool != "max":  # a mask has the image's rows alone
            options["code"] = torch.full((2, b - a, w, 1), 255, dtype=torch.uint8)
        got = run(part, strip, pad_h=0, row0=lo, image_rows=h, code_row0=a - lo, **options)
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
def test_rows_of_larger_images(pool):
    """Every map may be rows of a taller one; its other rows are left alone."""
    case = replace(PLAIN, pool=pool)
    given = inputs(case, images=3)
    want = run(case, given)

    def inner(t: Tensor, fill) -> tuple[Tensor, Tensor]:
        outer = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), fill, dtype=t.dtype)
        return outer, outer[:, 2:-1]

    a, d = (inner(t, float("nan"))[1].copy_(t) for t in (given.a, given.d))
    outs = [inner(want.y, 7.0), inner(want.delta, 7.0), inner(want.code, 77)]
    y, delta, code = (view for _, view in outs)
    given = replace(given, a=a, d=d)
    got = run(case, given, y=y, delta=delta, code=code)
    assert torch.equal(got.partial, want.partial)
    for (outer, view), expected in zip(outs, (want.y, want.delta, want.code), strict=True):
        assert torch.equal(view, expected)
        assert (outer[:, :2] == outer[0, 0, 0, 0]).all()
        assert (outer[:, -1:] == outer[0, 0, 0, 0]).all()


@pytest.mark.parametrize("pool", ["max", "avg", "none"])
@pytest.mark.parametrize("form", ["diff", "plain"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
def test_the_same_z_gives_the_operators_bits(dtype, form, pool):
    """The 1 x 1 identity: z is the map itself, so that all that follows must be the operators'."""
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    case = replace(PLAIN, dtype=dtype, kernel=1, c=16, c_out=32, form=form, pool=pool)
    given = inputs(case, images=2, quarters=True)  # with ties everywhere
    given.weight = torch.eye(32).to(dtype)
    got = run(case, given)
    y, code = torch.full_like(got.y, float("nan")), torch.full_like(got.code, 255)
    delta = torch.full_like(y, float("nan"))
    name, out = "relu", {"y": y, "mask": code}
    if pool != "none":
        name, out = "relu_pool", {"pool": POOLS[pool], "y": y, "code": code}
    if form == "plain":
        getattr(ops, f"{name}_fwd")(given.a, **out)
    else:
        both = {"dz": given.d, "from_target": given.from_target, "delta": delta}
        getattr(ops, f"{name}_diff_fwd")(given.a, **both, **out)
        assert torch.equal(got.delta, delta)
    assert torch.equal(got.y, y)
    assert torch.equal(got.code, code)


def test_the_look_up_has_the_operators_bits():
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    case = replace(PLAIN, dtype=FLOAT, form="labels", c=19, c_out=24)
    given, target = inputs(case, images=2), None
    given.a = torch.zeros_like(given.a)  # z is what the look-up adds alone
    target = given.target
    got = run(case, given)
    z, dz = (torch.zeros(2, *case.size, case.c_out) for _ in range(2))
    ops.label_conv_fwd(
        target.labels, valid=target.valid, table=target.table, interior=target.interior,
        from_target=given.from_target, taken=target.taken, taken_row0=0, row0=0, z=z, dz=dz,
    )  # fmt: skip
    y, delta, code = (torch.zeros_like(t) for t in (got.y, got.delta, got.code))
    ops.relu_pool_diff_fwd(
        z, dz=dz, from_target=given.from_target, pool=0, y=y, delta=delta, code=code
    )
    for a, b in ((got.y, y), (got.delta, delta), (got.code, code)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("left_out", ["y", "delta", "code", "reduce"])
def test_what_is_not_asked_for_changes_nothing_else(left_out):
    given = inputs(PLAIN, images=2)
    whole = run(PLAIN, given)
    option = {left_out: False if left_out == "reduce" else None}
    part = run(PLAIN, given, **option)
    for field in ("y", "delta", "code", "partial"):
        got, want = getattr(part, field), getattr(whole, field)
        missing = field == left_out.replace("reduce", "partial")
        assert got is None if missing else torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (2, 0, 6, 8), (2, 5, 0, 8)])
def test_nothing_is_launched_for_nothing(shape, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(conv_block, "launch", refuse)
    a = torch.empty(shape)
    partial = kernels.conv_block_fwd(
        a, d=a, weight=torch.empty(72, 16), from_target=torch.ones(shape[0], dtype=torch.bool),
        kernel_size=3, stride=1, relu=True, pool=2, pad_h=1, row0=0, image_rows=shape[1],
        tile=SHIPPED, y=torch.empty(*shape[:3], 16), delta=torch.empty(*shape[:3], 16), reduce=True,
    )  # fmt: skip
    assert partial.shape[0] == shape[0]
    assert not partial.any()


def test_the_tuner_writes_rows_that_are_chosen(monkeypatch):
    """Without a GPU all but its clock: launches of both forms, the fastest tile, its row."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    tune = importlib.import_module("tune")
    monkeypatch.setattr(tune, "layers", lambda classes: [(16, 24, 8)])
    tried = [Tile(4, 8, 16, 16, 4, 2, False), Tile(8, 8, 16, 16, 4, 2, True)]
    clock = iter((2.0, 1.0, 2.0, 1.0))

    def time(run):
        run()
        return next(clock)

    rows = tune.tune(19, BF16, "cpu", time, tried)
    assert [row["form"] for row in rows] == ["diff", "plain"]
    assert "1.0000 ms" in rows[0]["measured"]
    monkeypatch.setattr(tiles, "rows", lambda: rows)
    tiles.choose.cache_clear()
    chosen = [tiles.choose(80, "bfloat16", row["form"], 16, 24, 1) for row in rows]
    tiles.choose.cache_clear()
    assert chosen == [tried[1], tried[1]]
