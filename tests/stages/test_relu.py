"""ReLU of z (N, H, W, C), of the carried map and of δ, its mask of bits, and its backward."""

from __future__ import annotations

import pytest
import torch
from definitions import (
    BF16,
    DTYPES,
    FLOAT,
    agree,
    branches,
    check,
    masks,
    nhwc,
    odd_images,
    poisoned,
    poisoned_like,
    same_bits,
    signed,
)
from saved import unpack_mask

CHANNELS = (1, 19, 64)


def relu_diff(stages, z, dz):
    """(y, delta, mask)"""
    y, delta = poisoned_like(z, dz)
    mask = poisoned(*z.shape[:3], -(-z.shape[3] // 8), dtype=torch.uint8)
    stages.relu_diff_fwd(z, dz=dz, from_target=odd_images(len(z)), y=y, delta=delta, mask=mask)
    return y, delta, mask


@pytest.mark.needs("relu_fwd", "relu_diff_fwd")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_forward(stages, channels, dtype):
    shape = (2, 5, 7, channels)
    z, dz = torch.randn(shape).to(dtype), (0.1 * torch.randn(shape)).to(dtype)
    y, delta, mask = relu_diff(stages, z, dz)
    (s64, t64), (s32, t32) = branches(z, dz, torch.float64), branches(z, dz, FLOAT)
    assert torch.equal(y, z.relu())
    check(delta, (s32.relu() - t32.relu()).to(dtype), s64.relu() - t64.relu(), dtype)
    assert torch.equal(nhwc(unpack_mask(mask, channels)), s32 > 0)

    alone, alone_mask = poisoned_like(y, mask)
    stages.relu_fwd(z, y=alone, mask=alone_mask)
    assert torch.equal(alone, z.relu())
    assert torch.equal(nhwc(unpack_mask(alone_mask, channels)), z > 0)

    same_z, same_dz = z.clone(), dz.clone()  # in place, without a mask
    stages.relu_diff_fwd(
        same_z, dz=same_dz, from_target=odd_images(2), y=same_z, delta=same_dz, mask=None
    )
    assert torch.equal(same_z, y)
    assert torch.equal(same_dz, delta)


@pytest.mark.needs("relu_bwd")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_backward(stages, channels, dtype):
    dy, mask = torch.randn(2, 5, 7, channels).to(dtype), masks(2, 5, 7, channels)
    dy.view(-1)[:3] = torch.tensor([-float("inf"), float("inf"), -0.0])
    want = dy.where(nhwc(unpack_mask(mask, channels)), 0.0)
    (dz,) = poisoned_like(dy)
    stages.relu_bwd(dy, mask=mask, dz=dz)
    assert same_bits(dz, want)
    stages.relu_bwd(dy, mask=mask, dz=dy)
    assert same_bits(dy, want)


@pytest.mark.needs("relu_bwd")
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_where_vectors_may_not_start(stages, dtype):
    buffer, mask = torch.randn(1 + 35 * 16).to(dtype), masks(1, 5, 7, 16)
    dy = buffer[1:].view(1, 5, 7, 16)
    (dz,) = poisoned_like(dy)
    stages.relu_bwd(dy, mask=mask, dz=dz)
    assert torch.equal(dz, dy.where(nhwc(unpack_mask(mask, 16)), 0.0))


@pytest.mark.needs("relu_bwd")
def test_orders_agree_bit_for_bit(stages):
    dy, mask = torch.randn(2, 5, 70, 64).to(BF16), masks(2, 5, 70, 64)
    for order in stages.orders.values():
        (dz,) = poisoned_like(dy)
        with order():
            stages.relu_bwd(dy, mask=mask, dz=dz)
        assert torch.equal(dz, dy.where(nhwc(unpack_mask(mask, 64)), 0.0))


SHAPES = ((3, 5, 7, 19), (2, 2, 65, 64), (2, 7, 1, 1))


@pytest.mark.against_cpu
@pytest.mark.needs("relu_fwd", "relu_diff_fwd")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_has_the_operators_bits(stages, cpu, shape, dtype):
    z, dz = (signed(*shape, dtype=dtype) for _ in range(2))

    def run(stages):
        outputs = relu_diff(stages, z, dz)
        y, mask = poisoned_like(outputs[0], outputs[2])
        stages.relu_fwd(z, y=y, mask=mask)
        return *outputs, y, mask

    agree(run(stages), run(cpu))


@pytest.mark.needs("relu_fwd", "relu_bwd")
def test_no_images(stages):
    z = torch.empty(0, 5, 7, 8)
    stages.relu_fwd(z, y=z.clone(), mask=None)
    stages.relu_bwd(z, mask=torch.empty(0, 5, 7, 1).byte(), dz=z.clone())
