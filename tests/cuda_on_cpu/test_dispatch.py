"""The CUDA side of csrc/operators: every operator takes its arguments to its kernel."""

from __future__ import annotations

import pytest
import torch
from block import AVG, MAX, NO_POOL, Block, nhwc, pack_weights
from saved import log_sum_exp

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

SOFTMAX = 1


def nan_like(t):
    return torch.full_like(t, float("nan"))


def test_what_the_library_says_about_itself(emulated):
    assert emulated.cuda_build() == "none"


def test_relu_bwd(emulated):
    dy, mask = torch.randn(2, 5, 7, 19), torch.randint(256, (2, 5, 7, 3)).byte()
    want, got = nan_like(dy), nan_like(dy)
    ops.relu_bwd(dy, mask=mask, dz=want)
    emulated.relu_bwd(dy, mask=mask, dz=got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("pool", [MAX, AVG])
def test_relu_pool_bwd(emulated, pool):
    block = Block(n=3, c_out=24, h=7, w=10, pool=pool)
    dy = nhwc(block.dy)
    want, got = (torch.full((3, 11, 10, 24), float("nan")).bfloat16() for _ in range(2))
    ops.relu_pool_bwd(dy, code=block.code, pool=pool, height=7, width=10, row0=-3, dz=want)
    emulated.relu_pool_bwd(dy, code=block.code, pool=pool, height=7, width=10, row0=-3, dz=got)
    assert torch.equal(got, want)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_softmax_bwd(emulated, temperature):
    x, dy, scale = 3 * torch.randn(2, 19, 5, 40), torch.randn(2, 3, 40, 24), torch.rand(2)
    labels, valid = torch.randint(-1, 19, (2, 5, 40)), torch.rand(2, 5, 40) > 0.2
    lse, ce_lse = (log_sum_exp(x, t).float() for t in (temperature, 1.0))
    own = None if temperature == 1.0 else ce_lse
    given = {
        "activation": SOFTMAX, "temperature": temperature, "label_smoothing": 0.1, "row0": 2,
        "rows": 3, "lse": lse, "dy": dy, "scale": scale, "valid": valid, "ce_labels": labels,
        "ce_lse": own, "ce_scale": scale + 1, "class_weight": torch.rand(19),
    }  # fmt: skip
    want, got = nan_like(x), nan_like(x)
    ops.softmax_bwd(x, dx=want, **given)
    emulated.softmax_bwd(x, dx=got, **given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert got[:, :, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("pool", "stride", "k"), [(MAX, 1, 3), (AVG, 1, 5), (NO_POOL, 1, 1), (NO_POOL, 2, 3)]
)
def test_conv_block_bwd(emulated, pool, stride, k):
    block = Block(n=2, c_in=19, c_out=70, h=9, w=11, k=k, stride=stride, pool=pool)
    rows = (0, 9) if stride == 2 else (2, 5)
    w, dx = pack_weights(block.weight), nan_like(torch.empty(2, rows[1], 11, 19).bfloat16())
    emulated.conv_block_bwd(
        nhwc(block.dy),
        code=block.code,
        w=w,
        pool=pool,
        stride=stride,
        dy_row0=0,
        allow_tf32=False,
        height=block.h,
        row0=rows[0],
        dx=dx,
    )
    truth = nhwc(block.dx(torch.float64))[:, rows[0] : rows[0] + rows[1]]
    error = (dx.double() - truth).abs().max() / truth.abs().max()
    assert error <= 2**-8


def test_conv_block_logits_bwd(emulated):
    """What the block's gradient and the softmax's give one after the other."""
    block = Block(n=2, c_in=19, c_out=64, h=8, w=20, dtype=torch.float32)
    x, scale = 3 * torch.randn(2, 19, 8, 20), torch.rand(2) + 0.5
    labels, valid = torch.randint(-1, 19, (2, 8, 20)), torch.rand(2, 8, 20) > 0.2
    lse = x.logsumexp(1)
    given = {
        "activation": SOFTMAX, "temperature": 1.0, "label_smoothing": 0.1, "row0": 0, "rows": 8,
        "lse": lse, "scale": scale, "valid": valid, "ce_labels": labels, "ce_scale": scale + 1,
        "class_weight": torch.rand(19),
    }  # fmt: skip
    dy = nhwc(block.dy)
    way = {
        "w": pack_weights(block.weight), "pool": MAX, "stride": 1, "dy_row0": 0,
        "allow_tf32": False, "code": block.code,
    }  # fmt: skip
    between, want, got = torch.empty(2, 8, 20, 19), nan_like(x), nan_like(x)
    emulated.conv_block_bwd(dy, **way, height=8, row0=0, dx=between)
    ops.softmax_bwd(x, dy=between, dx=want, **given)
    emulated.conv_block_logits_bwd(dy, **way, x=x, dx=got, **given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_images(emulated):
    x = torch.empty(0, 19, 8, 20)
    dy, code = torch.empty(0, 4, 10, 64), torch.empty(0, 4, 10, 32, dtype=torch.uint8)
    way = {
        "w": torch.zeros(9, 64, 24), "pool": MAX, "stride": 1, "dy_row0": 0, "allow_tf32": False,
        "code": code,
    }  # fmt: skip
    emulated.conv_block_bwd(dy, **way, height=8, row0=0, dx=torch.empty(0, 8, 20, 19))
    emulated.conv_block_logits_bwd(
        dy, **way, x=x, lse=x[:, 0], scale=x[:, 0, 0, 0], activation=SOFTMAX, temperature=1.0,
        row0=0, rows=8, dx=x.clone(),
    )  # fmt: skip


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
def test_errors_say_what_is_expected(emulated, changed, message):
    given = {
        "dy": torch.zeros(1, 4, 10, 64), "code": torch.zeros(1, 4, 10, 32).byte(),
        "w": torch.zeros(9, 64, 24), "pool": MAX, "stride": 1, "dy_row0": 0,
        "allow_tf32": False, "height": 8, "row0": 0, "dx": torch.zeros(1, 8, 20, 19),
    } | changed  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        emulated.conv_block_bwd(**given)
