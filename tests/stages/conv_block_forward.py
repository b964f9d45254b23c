"""A step of the network in one: random inputs of `conv_block_fwd`, the call, and the definition.

Codes and masks are float64's wherever the two best candidates differ by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import repairs
import torch
import torch.nn.functional as F
from definitions import FLOAT, check, poisoned
from saved import unpack_code, unpack_mask, windows
from torch import Tensor

from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import Listed
from gpl_fast.tiles import Tile

POOLS = {"max": 0, "avg": 1, "none": 2, "stride": 2}


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


def tile_of(stages: Any, case: Case) -> Tile:
    """The case's own; else interpreted as few programs and steps as Triton's limit on a tensor
    allows, on a GPU a small one."""
    if case.tile is not None:
        return case.tile
    if stages.name != "triton":
        return Tile(8, 16, 32, 16, 4, 2, case.descriptors)
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


def code_shape(case: Case, n: int, rows: int) -> tuple[int, ...]:
    if case.pool == "max":
        return n, rows // 2, case.size[1] // 2, -(-case.c_out // 2)
    return n, rows, -(-case.size[1] // case.stride), -(-case.c_out // 8)


def run(stages: Any, case: Case, given: Inputs, **options: Any) -> Output:
    n, (h, w) = len(given.a), case.out
    rows = -(-case.size[0] // case.stride)
    y = poisoned(n, h, w, case.c_out, dtype=case.dtype)
    out = {
        "y": y,
        "delta": None if case.form == "plain" else y.clone(),
        "code": poisoned(*code_shape(case, n, rows), dtype=torch.uint8),
    }
    options = {
        "pad_h": case.kernel // 2, "row0": 0, "image_rows": rows, **out,
        "reduce": case.reduce and case.form != "plain", "allow_tf32": False, **options,
    }  # fmt: skip
    partial = stages.conv_block_fwd(
        given.a, d=given.d, weight=given.weight, bias=given.bias, from_target=given.from_target,
        target=given.target, kernel_size=case.kernel, stride=case.stride, relu=True,
        pool=POOLS[case.pool], tile=tile_of(stages, case), **options,
    )  # fmt: skip
    return Output(options["y"], options["delta"], options["code"], partial)


def check_all(case: Case, given: Inputs, got: Output) -> None:
    truth, plain = (definition(case, given, work) for work in (torch.float64, FLOAT))
    assert got.y.dtype == case.dtype
    check(got.y, plain.y.to(case.dtype), truth.y, case.dtype)
    check_code(case, got.code, truth, plain)
    if case.form != "plain":
        check(got.delta, plain.delta.to(case.dtype), truth.delta, case.dtype)
        squares = got.delta.double().square().flatten(1).sum(1)
        torch.testing.assert_close(got.partial.double().sum(1), squares, rtol=1e-6, atol=0)
