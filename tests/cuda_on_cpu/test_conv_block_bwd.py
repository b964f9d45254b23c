"""conv_block_bwd as shipped, run on the CPU, against float64.

The bound is err(ours, float64) <= 2 err(PyTorch in the same dtype, float64) + atol.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block import AVG, DTYPES, MAX, NO_POOL, Block, check
from saved import pack_code

ORDERS = ("0", "1", "2", "3", "4")  # of threads and blocks: forward, reverse, random


def check_block(block: Block, kernels) -> None:
    check(block.run(kernels), block.dx(block.dtype), block.dx(torch.float64), block.dtype)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_sizes(kernels, dtype, pool, k):
    check_block(Block(n=2, h=9, w=19, k=k, pool=pool, dtype=dtype), kernels)


# one pixel, one row, whole tiles, every border of a tile crossed
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (2, 2), (8, 16), (17, 33), (20, 5)])
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
def test_sizes(kernels, pool, size):
    check_block(Block(h=size[0], w=size[1], pool=pool), kernels)


# odd channels, a part of a chunk, several chunks, several tiles of channels
@pytest.mark.parametrize("channels", [(1, 1), (5, 7), (64, 65), (24, 128), (130, 192), (7, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels(kernels, dtype, channels):
    for pool in (MAX, AVG, NO_POOL):
        block = Block(c_in=channels[0], c_out=channels[1], h=5, w=18, pool=pool, dtype=dtype)
        check_block(block, kernels)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stride_2(kernels, dtype, k):
    for size in ((1, 1), (9, 35), (18, 34)):
        block = Block(n=2, h=size[0], w=size[1], k=k, stride=2, pool=NO_POOL, dtype=dtype)
        check_block(block, kernels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_relu(kernels, dtype):
    check_block(Block(pool=NO_POOL, relu=False, dtype=dtype), kernels)


@pytest.mark.parametrize("pool", [MAX, NO_POOL])
def test_tf32(built, pool):
    block = Block(n=2, c_in=70, c_out=65, pool=pool, dtype=torch.float32, tf32=True)

    def rounded(x):  # to 10 bits of mantissa
        bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
        return bits.view(torch.float32)

    exact = block.run(built).double()
    block.weight, block.dy = rounded(block.weight), rounded(block.dy)
    check(exact, block.dx(torch.float32), block.dx(torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
def test_orders_agree_bit_for_bit(kernels, dtype, order, monkeypatch):
    block = Block(n=2, c_in=72, c_out=136, dtype=dtype)
    expected = block.run(kernels)
    monkeypatch.setenv("CUDACPU_ORDER", order)
    assert torch.equal(block.run(kernels), expected)
    check(expected, block.dx(dtype), block.dx(torch.float64), dtype)


@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
def test_strips(kernels, pool):
    """A strip of dx is the same rows of the whole; rows outside the image are zeros."""
    block = Block(n=2, h=23, w=20, pool=pool)
    whole = block.run(kernels)
    for row0, rows in ((0, 9), (9, 5), (13, 10)):
        assert torch.equal(block.run(kernels, strip=(row0, rows)), whole[:, :, row0 : row0 + rows])
    halo = block.run(kernels, strip=(-3, 30))
    assert torch.equal(halo[:, :, 3:26], whole)
    assert not halo[:, :, :3].any()
    assert not halo[:, :, 26:].any()


def test_strip_of_dy(kernels):
    """Rows that dy does not hold count as zeros."""
    block = Block(n=2, h=20, w=20, pool=NO_POOL)
    held = block.dy[:, :, 4:15].permute(0, 2, 3, 1).contiguous()
    ours = block.run(kernels, dy=held.data_ptr(), dy_strip=(4, 11), dy_image_stride=held.stride(0))
    block.dy[:, :, :4] = 0
    block.dy[:, :, 15:] = 0
    assert torch.equal(ours, block.run(kernels))


def test_masked_elements_are_selected_not_multiplied(kernels):
    block = Block(h=8, w=16)
    block.dy[:, ::3] = float("nan")
    block.keep[:, ::3] = 4
    block.code = pack_code(block.keep).contiguous()
    assert block.run(kernels).isfinite().all()


def test_empty(kernels):
    assert Block(n=0).run(kernels).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bank_conflicts(kernels, phases, dtype):
    """Each 8x8 matrix, and each 128 bytes of a warp's other accesses, takes one pass over the
    banks: dZ as it is expanded, both operands, dx on its way out."""
    for c_in in (64, 128):
        for k in (3, 5):
            tf32 = dtype == torch.float32
            Block(c_in=c_in, c_out=128, h=16, w=32, k=k, dtype=dtype, tf32=tf32).run(kernels)
            taken, least = phases()
            assert taken == least


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("channels", [64, 128])
def test_shared_memory_is_what_docs_kernels_says(built, channels, k, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from registers import dynamic_shared

    for capability, name in ((80, "kernel<bf16, {}>"), (90, "sm90_kernel<bf16, {}, false>")):
        built.play(capability, 227)
        Block(c_in=channels, c_out=72, k=k).run(built)
        _, expected = dynamic_shared("conv_block_bwd_" + name.format(channels), k)
        assert built.counters()["dynamic_shared_bytes"] == expected


def test_the_kernel_of_sm_80_on_sm_90(built, monkeypatch):
    """GPL_FAST_SM90A=0 takes it, so that one GPU runs both."""
    built.play(90, 227)
    block = Block(c_in=72, c_out=136)
    hopper = block.run(built)
    assert built.counters()["tma"] > 0
    monkeypatch.setenv("GPL_FAST_SM90A", "0")
    other = block.run(built)
    counters = built.counters()
    assert (counters["tma"], counters["cp_async"] > 0) == (0, True)
    check(hopper, other, block.dx(torch.float64), block.dtype)
    built.play(80, 163)
    assert torch.equal(block.run(built), other)


def test_work_is_the_products_of_the_tiles(kernels):
    """No tap, chunk or tile is multiplied twice: 128 pixels x 64 channels x 9 x 64."""
    Block(c_in=64, c_out=64, h=8, w=16).run(kernels)
    assert kernels.counters()["mma"] == (128 // 16) * (64 // 8) * (9 * 64 // 16)
