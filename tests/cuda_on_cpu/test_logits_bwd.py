"""conv_block_bwd with the softmax's, sigmoid's and cross-entropy's backward in its epilogue."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block import AVG, DTYPES, MAX, NO_POOL, NONE, SIGMOID, SOFTMAX, Block, Logits, check
from extremes import by_kind, logits_of_every_kind

ORDERS = ("0", "1", "2", "3", "4")
CLASSES = (1, 3, 19, 33, 150, 256, 257, 1003)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(kernels, dtype, classes, channels_last):
    block = Block(c_in=classes, h=9, w=18, dtype=dtype)
    logits = Logits(block, channels_last=channels_last)
    logits.check(logits.run(kernels))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("classes", [19, 150, 257])
@pytest.mark.parametrize("peak", [0.0, 12.0])
def test_dtypes_of_logits(kernels, peak, classes, x_dtype):
    block = Block(n=2, c_in=classes, h=7, w=11)
    logits = Logits(block, dtype=x_dtype, peak=peak)
    logits.check(logits.run(kernels))


@pytest.mark.parametrize("classes", [19, 257])
@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 0.3, 3.0])
def test_any_temperature(kernels, temperature, classes):
    block = Block(c_in=classes, h=9, w=20)
    logits = Logits(block, temperature=temperature)
    logits.x = logits_of_every_kind(1, classes, 9, 20)
    ours = logits.run(kernels)
    plain = logits.dx(block.dx(block.dtype).float())
    for kind in by_kind(ours, plain, logits.dx(block.dx(torch.float64))):
        check(*kind, block.dtype)


@pytest.mark.parametrize("activation", [NONE, SIGMOID])
def test_saturation_at_a_tiny_temperature(kernels, activation):
    logits = Logits(Block(c_in=19), activation=activation, temperature=1e-46)
    ours = logits.run(kernels)
    assert not ours.isnan().any()
    assert (ours == 0).all() == (activation == SIGMOID)  # 0 · 1 / T


@pytest.mark.parametrize("classes", [1, 19, 257])
@pytest.mark.parametrize("activation", [NONE, SIGMOID, SOFTMAX])
@pytest.mark.parametrize("channels_last", [False, True])
def test_cross_entropy_and_masks(kernels, channels_last, activation, classes):
    for temperature, class_weight, smoothing, masked in (
        (1.0, False, 0.0, False),
        (1.0, True, 0.1, True),
        (2.5, False, 0.2, True),
        (0.7, True, 0.0, False),
    ):
        logits = Logits(
            Block(n=2, c_in=classes, h=9, w=13),
            activation=activation,
            temperature=temperature,
            channels_last=channels_last,
            cross_entropy=True,
            class_weight=class_weight,
            label_smoothing=smoothing,
            masked=masked,
        )
        logits.check(logits.run(kernels))


@pytest.mark.parametrize("activation", [NONE, SIGMOID, SOFTMAX])
@pytest.mark.parametrize("classes", [19, 257])
def test_masked_pixels_may_hold_nan(kernels, classes, activation):
    logits = Logits(Block(c_in=classes), activation=activation, masked=True)
    assert logits.x.isnan().any()
    ours = logits.run(kernels)
    assert not ours[~logits.valid[:, None].expand_as(ours)].any()
    logits.x = logits.x.nan_to_num(0.0)
    logits.check(ours)


def test_sums_take_the_stored_gradient(kernels):
    """Above a tile of classes dy' is stored in x's dtype; the sum of the gradient stays 0."""
    logits = Logits(Block(c_in=300), dtype=torch.bfloat16, peak=10.0)
    ours = logits.run(kernels).double()
    y = logits.x.double().softmax(1)
    at = (y.amax(1) > 0.99) & (y.amax(1) < 0.9995)  # beyond, float32 is the limit
    assert at.any()
    largest = ours.abs().amax(1)
    assert ((ours.sum(1).abs() / largest)[at] < 0.02).all()


@pytest.mark.parametrize("k", [1, 5, 7])
@pytest.mark.parametrize("pool", [MAX, AVG, NO_POOL])
def test_kernel_sizes_and_pools(kernels, pool, k):
    for classes in (19, 150):
        logits = Logits(Block(c_in=classes, c_out=72, k=k, pool=pool))
        logits.check(logits.run(kernels))


def test_stride_2(kernels):
    for classes in (3, 170):
        logits = Logits(Block(c_in=classes, h=11, w=37, stride=2, pool=NO_POOL))
        logits.check(logits.run(kernels))


@pytest.mark.parametrize("classes", [150, 257])
def test_less_shared_memory(built, classes):
    """A GPU with 99 KiB takes narrower tiles of classes for large kernels."""
    logits = Logits(Block(c_in=classes, c_out=128, k=7))
    built.play(86, 99)
    logits.check(logits.run(built))


@pytest.mark.parametrize("classes", [19, 257])
@pytest.mark.parametrize("order", ORDERS)
def test_orders_agree_bit_for_bit(kernels, order, classes, monkeypatch):
    logits = Logits(Block(n=2, c_in=classes, c_out=130, h=9, w=20))
    expected = logits.run(kernels)
    monkeypatch.setenv("CUDACPU_ORDER", order)
    assert torch.equal(logits.run(kernels), expected)
    logits.check(expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", [19, 64, 150, 256])
def test_no_bank_conflicts(kernels, phases, classes, channels_last):
    """Of every tile of classes, as in `test_conv_block_bwd`."""
    Logits(Block(c_in=classes, c_out=128, h=8, w=16), channels_last=channels_last).run(kernels)
    taken, least = phases()
    assert taken == least


@pytest.mark.parametrize("classes", [19, 64, 150, 256])
def test_shared_memory_is_what_docs_kernels_says(built, classes, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from registers import dynamic_shared

    tile = {19: 32, 64: 64, 150: 160, 256: 256}[classes]
    names = {80: f"logits_bwd_kernel<bf16, {tile}>", 90: f"bwd_sm90_kernel<bf16, {tile}, true>"}
    for capability, name in names.items():
        built.play(capability, 227)
        Logits(Block(c_in=classes, c_out=72, h=2, w=2)).run(built)
        _, expected = dynamic_shared(f"conv_block_{name}", 3)
        assert built.counters()["dynamic_shared_bytes"] == expected


@pytest.mark.parametrize("classes", [19, 300])
def test_strips(kernels, classes):
    """The rows of a strip, and no others, are written."""
    logits = Logits(Block(n=2, c_in=classes, h=23, w=20))
    whole = logits.run(kernels)
    for row0, rows in ((0, 9), (9, 5), (13, 10)):
        part = logits.run(kernels, strip=(row0, rows))
        assert torch.equal(part[:, :, row0 : row0 + rows], whole[:, :, row0 : row0 + rows])
        assert part[:, :, :row0].isnan().all()
        assert part[:, :, row0 + rows :].isnan().all()
