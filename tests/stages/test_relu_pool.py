"""ReLU and 2 x 2 pool, of the carried map and of δ, its code, and its backward, Eq. (3)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from definitions import (
    AVG,
    BF16,
    DTYPES,
    FLOAT,
    HALF,
    MAX,
    agree,
    branches,
    check,
    codes,
    masks,
    nchw,
    nhwc,
    odd_images,
    poisoned,
    poisoned_like,
    pooled,
    signed,
)
from saved import unpack_code, unpack_mask

FORWARD = ("relu_pool_fwd", "relu_pool_diff_fwd")
POOLS = pytest.mark.parametrize("pool", [MAX, AVG])
# (C, (H, W)): odd sizes, one window, even sizes, more than one tile
SIZES = [(64, (13, 27)), (3, (7, 33)), (19, (2, 2)), (40, (8, 6)), (12, (3, 70))]


def code_of(z, pool):
    """Room for the code of a pool of z (N, H, W, C)."""
    n, h, w, c = z.shape
    shape = (n, h // 2, w // 2, -(-c // 2)) if pool == MAX else (n, h, w, -(-c // 8))
    return poisoned(*shape, dtype=torch.uint8)


def pool_diff(stages, z, dz, pool, dtype=None):
    """(y, delta, code); the dtype of the first two, z's unless named."""
    n, h, w, c = z.shape
    y, delta = (poisoned(n, h // 2, w // 2, c, dtype=dtype or z.dtype) for _ in range(2))
    code = code_of(z, pool)
    stages.relu_pool_diff_fwd(
        z, dz=dz, from_target=odd_images(n), pool=pool, y=y, delta=delta, code=code
    )
    return y, delta, code


def pool_alone(stages, z, pool, dtype=None):
    """(y, code)"""
    n, h, w, c = z.shape
    y, code = poisoned(n, h // 2, w // 2, c, dtype=dtype or z.dtype), code_of(z, pool)
    stages.relu_pool_fwd(z, pool=pool, y=y, code=code)
    return y, code


def routed(dy, code, pool, size):
    """dz (N, H, W, C) by definition: dy to the winners, or a fourth of it to what is positive."""
    n, _, _, c = dy.shape
    if pool == AVG:
        each = nhwc(F.interpolate(nchw(dy).double() / 4, scale_factor=2.0))
        whole = torch.zeros(n, *size, c, dtype=torch.float64)
        whole[:, : each.shape[1], : each.shape[2]] = each
        return whole.where(nhwc(unpack_mask(code, c)), 0.0).to(dy.dtype)
    winner, dz = nhwc(unpack_code(code, c)), torch.zeros(n, *size, c, dtype=dy.dtype)
    for q in range(4):
        h, w = 2 * dy.shape[1], 2 * dy.shape[2]
        dz[:, q // 2 : h : 2, q % 2 : w : 2] = dy.where(winner == q, 0.0)
    return dz


# --------------------------------------------------------------------------------------- forward


@pytest.mark.needs(*FORWARD)
@POOLS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_forward(stages, channels, size, dtype, pool):
    z = torch.randn(2, *size, channels).to(dtype)
    dz = (0.1 * torch.randn(2, *size, channels)).to(dtype)
    y, delta, code = pool_diff(stages, z, dz, pool)
    (s64, t64), (s32, t32) = branches(z, dz, torch.float64), branches(z, dz, FLOAT)
    check(y, pooled(z.float(), pool).to(dtype), pooled(z.double(), pool), dtype)
    plain = (pooled(s32, pool) - pooled(t32, pool)).to(dtype)
    check(delta, plain, pooled(s64, pool) - pooled(t64, pool), dtype)

    # the code is that of the prediction
    s = s64.clone().requires_grad_()
    dy = torch.randn_like(y)
    pooled(s, pool).backward(dy.double())
    assert torch.equal(routed(dy, code, pool, size), s.grad.to(dtype))

    # the plain form is the difference form of z + 0
    alone, alone_code = pool_alone(stages, z, pool)
    same, nothing, same_code = pool_diff(stages, z, torch.zeros_like(z), pool)
    assert torch.equal(alone, y)
    assert torch.equal(same, y)
    assert torch.equal(alone_code, same_code)
    assert not nothing.any()


@pytest.mark.needs(*FORWARD)
@pytest.mark.only("cpu")
@pytest.mark.parametrize("dtype", [BF16, HALF])
@POOLS
@pytest.mark.parametrize(("channels", "size"), SIZES[:2])
def test_forward_of_float32(stages, channels, size, pool, dtype):
    """Only what comes out is rounded: winners and signs are those of float32."""
    z, dz = torch.randn(2, *size, channels), 0.1 * torch.randn(2, *size, channels)
    whole, rounded = (pool_diff(stages, z, dz, pool, d) for d in (FLOAT, dtype))
    assert torch.equal(rounded[0], whole[0].to(dtype))
    assert torch.equal(rounded[1], whole[1].to(dtype))
    assert torch.equal(rounded[2], whole[2])
    assert torch.equal(
        pool_alone(stages, z, pool, dtype)[0], pool_alone(stages, z, pool)[0].to(dtype)
    )


@pytest.mark.needs("relu_pool_diff_fwd")
def test_codes_of_the_maximum(stages):
    z = torch.zeros(1, 4, 4, 3)
    z[0, 0, 0], z[0, 0, 1] = 1.0, 1.0  # a tie: the first one wins
    z[0, 1, 3, 0] = 2.0
    z[0, 2:, 2:, 2] = -1.0
    *_, code = pool_diff(stages, z, torch.zeros_like(z), MAX)
    got = nhwc(unpack_code(code, 3))[0]
    assert got[0, 0].tolist() == [0, 0, 0]
    assert got[0, 1].tolist() == [3, 4, 4]
    assert got[1, 1].tolist() == [4, 4, 4]
    assert (code[..., 1] >> 4 == 0).all()  # beyond the last channel


@pytest.mark.needs("relu_pool_diff_fwd")
def test_mask_of_the_average_is_the_sign_everywhere(stages):
    z, dz = torch.randn(2, 7, 5, 19), torch.randn(2, 7, 5, 19)
    *_, mask = pool_diff(stages, z, dz, AVG)
    assert torch.equal(nhwc(unpack_mask(mask, 19)), branches(z, dz, FLOAT)[0] > 0)
    assert (mask[..., 2] >> 3 == 0).all()


@pytest.mark.needs("relu_pool_diff_fwd")
def test_equal_winners_keep_the_difference(stages):
    """Far from zero the pooled difference is dz itself, not a difference of rounded sums."""
    z = 1000 + torch.randn(2, 8, 8, 16)
    dz = 1e-6 * torch.randn(2, 1, 1, 1).expand_as(z).contiguous()
    _, delta, _ = pool_diff(stages, z, dz, MAX)
    assert torch.equal(delta, dz[:, :4, :4])
    *_, mask = pool_diff(stages, z, dz, AVG)
    assert unpack_mask(mask, 16).all()


@pytest.mark.needs("relu_pool_diff_fwd")
@POOLS
def test_nan_goes_through(stages, pool):
    z, dz = torch.randn(2, 4, 4, 16), torch.randn(2, 4, 4, 16)
    dz[:, 1, 1, 5] = float("nan")
    z[:, 3, 0, 7] = float("nan")
    y, delta, _ = pool_diff(stages, z, dz, pool)
    assert delta[:, 0, 0, 5].isnan().all()
    assert delta[:, 1, 0, 7].isnan().all()
    assert delta.isnan().sum() == 4
    assert y.isnan().sum() == 2


@pytest.mark.needs("relu_pool_diff_fwd")
def test_row_slices_of_one_image_are_written_in_place(stages):
    z, dz = torch.randn(3, 8, 6, 16), torch.randn(3, 8, 6, 16)
    whole = pool_diff(stages, z, dz, MAX)
    parts = poisoned_like(*whole)
    for first, last in ((0, 1), (1, 4)):
        y, delta, code = (part[:, first:last] for part in parts)
        rows = slice(2 * first, 2 * last)
        stages.relu_pool_diff_fwd(
            z[:, rows], dz=dz[:, rows], from_target=odd_images(3), pool=MAX, y=y, delta=delta,
            code=code,
        )  # fmt: skip
    assert all(map(torch.equal, parts, whole))


# -------------------------------------------------------------------------------------- backward


def pool_case(pool, channels, size, dtype):
    """dy (2, H / 2, W / 2, C) and a random code."""
    h, w = size
    dy = torch.randn(2, h // 2, w // 2, channels).to(dtype)
    code = codes(*dy.shape) if pool == MAX else masks(2, h, w, channels)
    return dy, code


def pool_bwd(stages, dy, code, pool, size, row0=0, rows=None, dz=None):
    h, w = size
    if dz is None:
        dz = poisoned(len(dy), h if rows is None else rows, w, dy.shape[3], dtype=dy.dtype)
    stages.relu_pool_bwd(dy, code=code, pool=pool, height=h, width=w, row0=row0, dz=dz)
    return dz


@pytest.mark.needs("relu_pool_bwd")
@POOLS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_backward(stages, channels, size, dtype, pool):
    """Of an image and of strips that begin before it, in it and end behind it: zeros there."""
    dy, code = pool_case(pool, channels, size, dtype)
    want, h = routed(dy, code, pool, size), size[0]
    assert torch.equal(pool_bwd(stages, dy, code, pool, size), want)
    around = F.pad(want, (0, 0, 0, 0, 8, 8))
    for row0, rows in ((-1, h + 3), (-3, 4), (1, h - 1), (h - 1, 5)):
        strip = pool_bwd(stages, dy, code, pool, size, row0, rows)
        assert torch.equal(strip, around[:, 8 + row0 : 8 + row0 + rows])


@pytest.mark.needs("relu_pool_bwd")
@POOLS
def test_backward_of_slices(stages, pool):
    """Image strides of larger buffers, which no vector divides."""
    dy, code = pool_case(pool, 16, (6, 10), FLOAT)
    wide = []
    for t in (dy, code):
        buffer = torch.full((2, t[0].numel() + 3), 7, dtype=t.dtype)
        wide.append(buffer[:, : t[0].numel()].view_as(t).copy_(t))
    outer = torch.full((2, 6 * 10 * 16 + 5), 9.0)
    inner = outer[:, : 6 * 10 * 16].view(2, 6, 10, 16)
    pool_bwd(stages, *wide, pool, (6, 10), dz=inner)
    assert torch.equal(inner, routed(dy, code, pool, (6, 10)))
    assert (outer[:, 6 * 10 * 16 :] == 9).all()


@pytest.mark.needs("relu_pool_bwd")
@POOLS
def test_orders_agree_bit_for_bit(stages, pool):
    dy, code = pool_case(pool, 64, (13, 70), BF16)
    for order in stages.orders.values():
        with order():
            dz = pool_bwd(stages, dy, code, pool, (13, 70))
        assert torch.equal(dz, routed(dy, code, pool, (13, 70)))


# ----------------------------------------------------------------------------------------- both

SHAPES = ((3, 13, 27, 19), (2, 4, 65, 64), (2, 5, 3, 1), (1, 1, 6, 8))


@pytest.mark.against_cpu
@pytest.mark.needs(*FORWARD)
@POOLS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_has_the_operators_bits(stages, cpu, shape, dtype, pool):
    z, dz = (signed(*shape, dtype=dtype) for _ in range(2))
    ours, wanted = (
        [*pool_diff(who, z, dz, pool), *pool_alone(who, z, pool)] for who in (stages, cpu)
    )
    agree(ours, wanted)


@pytest.mark.against_cpu
@pytest.mark.needs("relu_pool_bwd")
@POOLS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_has_the_operators_bits(stages, cpu, shape, dtype, pool):
    """NaN and infinities included."""
    n, h, w, c = shape
    dy = signed(n, h // 2, w // 2, c, dtype=dtype)
    code = codes(*dy.shape) if pool == MAX else masks(*shape)
    ours, wanted = (pool_bwd(who, dy, code, pool, (h, w), -2, h + 3) for who in (stages, cpu))
    agree([ours], [wanted])


@pytest.mark.needs(*FORWARD)
def test_no_images(stages):
    nothing = torch.empty(0, 5, 7, 8)
    assert pool_diff(stages, nothing, nothing, MAX)[0].shape == (0, 2, 3, 8)
    assert pool_alone(stages, nothing, AVG)[0].shape == (0, 2, 3, 8)


@pytest.mark.needs("relu_pool_bwd")
def test_no_images_backward(stages):
    dy, code = torch.empty(0, 2, 2, 8), torch.empty(0, 2, 2, 4).byte()
    assert pool_bwd(stages, dy, code, MAX, (4, 4)).shape == (0, 4, 4, 8)
