"""`conv_block_logits_bwd`: the same with the softmax's, sigmoid's and cross-entropy's backward in
its epilogue, against float64."""

from __future__ import annotations

import pytest
import torch
from conv_block_backward import Block, Logits
from definitions import (
    AVG,
    BF16,
    DTYPES,
    MAX,
    NO_POOL,
    NONE,
    SIGMOID,
    SOFTMAX,
    check,
)
from extremes import by_kind, logits_of_every_kind

pytestmark = pytest.mark.needs("conv_block_bwd", "conv_block_logits_bwd")
CLASSES = (1, 3, 19, 33, 150, 256, 257, 1003)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(stages, dtype, classes, channels_last):
    block = Block(c_in=classes, h=9, w=18, dtype=dtype)
    logits = Logits(block, channels_last=channels_last)
    logits.check(logits.run(stages))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("classes", [19, 150, 257])
@pytest.mark.parametrize("peak", [0.0, 12.0])
def test_dtypes_of_logits(stages, peak, classes, x_dtype):
    block = Block(n=2, c_in=classes, h=7, w=11)
    logits = Logits(block, dtype=x_dtype, peak=peak)
    logits.check(logits.run(stages))


@pytest.mark.parametrize("classes", [19, 257])
@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3, 3.0])
def test_any_temperature(stages, temperature, classes):
    block = Block(c_in=classes, h=9, w=20)
    logits = Logits(block, temperature=temperature)
    logits.x = logits_of_every_kind(1, classes, 9, 20)
    ours = logits.run(stages)
    plain = logits.dx(block.dx(block.dtype).float())
    for kind in by_kind(ours, plain, logits.dx(block.dx(torch.float64))):
        check(*kind, block.dtype)


@pytest.mark.parametrize("activation", [NONE, SIGMOID])
def test_saturation_at_a_tiny_temperature(stages, activation):
    logits = Logits(Block(c_in=19), activation=activation, temperature=1e-46)
    ours = logits.run(stages)
    assert not ours.isnan().any()
    assert (ours == 0).all() == (activation == SIGMOID)  # 0 · 1 / T


@pytest.mark.parametrize("classes", [1, 19, 257])
@pytest.mark.parametrize("activation", [NONE, SIGMOID, SOFTMAX])
def test_cross_entropy_and_masks(stages, activation, classes):
    for temperature, class_weight, smoothing, masked, channels_last in (
        (1.0, False, 0.0, False, False),
        (1.0, True, 0.1, True, True),
        (2.5, False, 0.2, True, False),
        (0.7, True, 0.0, False, True),
    ):
        logits = Logits(
            Block(n=2, c_in=classes, h=9, w=13), activation, temperature,
            channels_last=channels_last, cross_entropy=True, class_weight=class_weight,
            label_smoothing=smoothing, masked=masked,
        )  # fmt: skip
        logits.check(logits.run(stages))


@pytest.mark.parametrize("activation", [NONE, SIGMOID, SOFTMAX])
@pytest.mark.parametrize("classes", [19, 257])
def test_masked_pixels_may_hold_nan(stages, classes, activation):
    logits = Logits(Block(c_in=classes), activation=activation, masked=True)
    assert logits.x.isnan().any()
    ours = logits.run(stages)
    assert not ours[~logits.valid[:, None].expand_as(ours)].any()
    logits.x = logits.x.nan_to_num(0.0)
    logits.check(ours)


def test_sums_take_the_stored_gradient(stages):
    """Above a tile of classes dy' is stored in x's dtype; the sum of the gradient stays 0."""
    logits = Logits(Block(c_in=300), dtype=BF16, peak=10.0)
    ours = logits.run(stages).double()
    y = logits.x.double().softmax(1)
    at = (y.amax(1) > 0.99) & (y.amax(1) < 0.9995)  # beyond, float32 is the limit
    assert at.any()
    largest = ours.abs().amax(1)
    assert ((ours.sum(1).abs() / largest)[at] < 0.02).all()


@pytest.mark.parametrize("k", [1, 5, 7])
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
def test_kernel_sizes_and_pools(stages, pool, k):
    for classes in (19, 150):
        logits = Logits(Block(c_in=classes, c_out=72, k=k, pool=pool))
        logits.check(logits.run(stages))


def test_stride_2(stages):
    for classes in (3, 170):
        logits = Logits(Block(c_in=classes, h=11, w=37, stride=2, pool=NO_POOL))
        logits.check(logits.run(stages))


@pytest.mark.parametrize("classes", [19, 257])
def test_orders_agree_bit_for_bit(stages, classes):
    logits = Logits(Block(n=2, c_in=classes, c_out=130, h=9, w=20))
    found = []
    for order in stages.orders.values():
        with order():
            found.append(logits.run(stages))
    assert all(torch.equal(dx, found[0]) for dx in found)
    logits.check(found[0])


@pytest.mark.parametrize("classes", [19, 300])
def test_strips(stages, classes):
    """The rows of a strip, and no others, are written."""
    logits = Logits(Block(n=2, c_in=classes, h=23, w=20))
    whole = logits.run(stages)
    for row0, rows in ((0, 9), (9, 5), (13, 10)):
        part = logits.run(stages, strip=(row0, rows))
        assert torch.equal(part[:, :, row0 : row0 + rows], whole[:, :, row0 : row0 + rows])
        assert part[:, :, :row0].isnan().all()
        assert part[:, :, row0 + rows :].isnan().all()


def test_no_images(stages):
    block = Block(n=0, c_in=19)
    assert Logits(block).run(stages).shape == (0, 19, 9, 19)
