"""`conv_block_bwd`: a block's data gradient, Eqs. (3) and (4), in one kernel, against float64."""

from __future__ import annotations

import pytest
import torch
from conv_block_backward import Block, nhwc
from definitions import AVG, BF16, DTYPES, FLOAT, MAX, NO_POOL
from saved import pack_code

pytestmark = pytest.mark.needs("conv_block_bwd")


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_sizes(stages, dtype, pool, k):
    block = Block(n=2, h=9, w=19, k=k, pool=pool, dtype=dtype)
    block.check(block.run(stages))


# one pixel, one row, whole tiles, every border of a tile crossed
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (2, 2), (8, 16), (17, 33), (20, 5)])
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
def test_sizes(stages, pool, size):
    block = Block(h=size[0], w=size[1], pool=pool)
    block.check(block.run(stages))


# odd channels, a part of a chunk, several chunks, several tiles of channels
@pytest.mark.parametrize("channels", [(1, 1), (5, 7), (64, 65), (24, 128), (130, 192), (7, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels(stages, dtype, channels):
    for pool in (MAX, AVG, NO_POOL):
        block = Block(c_in=channels[0], c_out=channels[1], h=5, w=18, pool=pool, dtype=dtype)
        block.check(block.run(stages))


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stride_2(stages, dtype, k):
    for size in ((1, 1), (9, 35), (18, 34)):
        block = Block(n=2, h=size[0], w=size[1], k=k, stride=2, pool=NO_POOL, dtype=dtype)
        block.check(block.run(stages))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_relu(stages, dtype):
    block = Block(pool=NO_POOL, relu=False, dtype=dtype)
    block.check(block.run(stages))


@pytest.mark.parametrize("dtype", [FLOAT])
@pytest.mark.parametrize("pool", [MAX, NO_POOL])
def test_tf32(stages, pool, dtype):
    """Taken where it is allowed: products of operands of 10 bits of mantissa."""
    block = Block(n=2, c_in=70, c_out=65, pool=pool, dtype=dtype, tf32=True)

    def rounded(x):
        bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
        return bits.view(FLOAT)

    ours, exact = block.run(stages), block.run(stages, allow_tf32=False)
    assert 1e-5 < (ours - exact).abs().max() / exact.abs().max() < 2e-3
    block.check(exact)
    block.weight, block.dy = rounded(block.weight), rounded(block.dy)
    block.check(ours)


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
def test_orders_agree_bit_for_bit(stages, dtype):
    block, found = Block(n=2, c_in=72, c_out=136, dtype=dtype), []
    for order in stages.orders.values():
        with order():
            found.append(block.run(stages))
    assert all(torch.equal(dx, found[0]) for dx in found)
    block.check(found[0])


@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
def test_strips(stages, pool):
    """A strip of dx is the same rows of the whole; rows outside the image are zeros."""
    block = Block(n=2, h=23, w=20, pool=pool)
    whole = block.run(stages)
    for row0, rows in ((0, 9), (9, 5), (13, 10)):
        assert torch.equal(block.run(stages, strip=(row0, rows)), whole[:, :, row0 : row0 + rows])
    halo = block.run(stages, strip=(-3, 30))
    assert torch.equal(halo[:, :, 3:26], whole)
    assert not halo[:, :, :3].any()
    assert not halo[:, :, 26:].any()


def test_strip_of_dy(stages):
    """Rows that dy does not hold count as zeros."""
    block = Block(n=2, h=20, w=20, pool=NO_POOL)
    ours = block.run(stages, dy=nhwc(block.dy[:, :, 4:15]), dy_row0=4)
    block.dy[:, :, :4] = 0
    block.dy[:, :, 15:] = 0
    assert torch.equal(ours, block.run(stages))


def test_rows_of_larger_images(stages):
    """dy, the code and dx may be rows of taller maps."""
    block = Block(n=2, h=20, w=20)
    want = block.run(stages)

    def inner(t):
        outer = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), 7).to(t.dtype)
        return outer, outer[:, 2:-1].copy_(t)

    outer, dx = inner(nhwc(torch.zeros_like(want)))
    block.run(stages, dy=inner(nhwc(block.dy))[1], code=inner(block.code)[1], dx=dx)
    assert torch.equal(dx, nhwc(want))
    assert (outer[:, :2] == 7).all()
    assert (outer[:, -1:] == 7).all()


def test_masked_elements_are_selected_not_multiplied(stages):
    block = Block(h=8, w=16)
    block.dy[:, ::3] = float("nan")
    block.keep[:, ::3] = 4
    block.code = pack_code(block.keep).contiguous()
    assert block.run(stages).isfinite().all()


def test_empty(stages):
    assert Block(n=0).run(stages).numel() == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": torch.zeros(8, 64, 24)}, "w must hold K \\* K taps, K odd, got 8"),
        ({"w": torch.zeros(9, 70, 24)}, r"w must have the shape \[9, 64, 24\]"),
        ({"w": torch.zeros(13825)[1:].view(9, 64, 24)}, "w must start at a multiple of 16"),
        ({"pool": 3}, "pool must be 0"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
        ({"code": None}, "a pool needs its code"),
        ({"dy": torch.zeros(1, 4, 9, 64)}, r"dy must have the shape \[1, 4, 10, 64\]"),
        ({"stride": 2, "row0": 1}, "a stride of 2 takes all rows at once"),
    ],
)
def test_errors_say_what_is_expected(stages, changed, message):
    block = Block(c_in=19, h=8, w=20, dtype=FLOAT)
    with pytest.raises(RuntimeError, match=message):
        block.run(stages, **changed)
