"""K x K convolutions of bfloat16 by taps, summed in float32, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from definitions import BF16, FLOAT, check, nchw, nhwc, poisoned

pytestmark = pytest.mark.needs("direct_conv", "direct_weight")


def padded(channels):
    return -(-channels // 32) * 32


def direct(stages, x, w, *, transposed=False, pad_h=None, z_dtype=FLOAT):
    """As `winograd`, of bfloat16 and by K x K taps."""
    c_out, k = w.shape[transposed], w.shape[3]
    pad_h = k // 2 if pad_h is None else pad_h
    u = poisoned(k * k * padded(x.shape[3]) * padded(c_out), dtype=BF16)
    stages.direct_weight(w.permute(0, 2, 3, 1).contiguous(), transposed=transposed, u=u)
    z = poisoned(len(x), x.shape[1] + 2 * pad_h - k + 1, x.shape[2], c_out, dtype=z_dtype)
    stages.direct_conv(x, u=u, K=k, pad_h=pad_h, z=z)
    return z


# Parts of 64 input channels, blocks of 32 pixels and outputs, tasks of 8 x 128 pixels: one of each,
# several, and odd remainders, of at most 16 and of more; rows that are short enough for one line,
# where a block begins between two of them.
DIRECT_SIZES = [
    (8, 64, (13, 27), 3), (3, 19, (1, 5), 3), (32, 40, (7, 33), 3), (64, 19, (2, 300), 3),
    (200, 70, (6, 17), 3), (391, 33, (3, 4), 3), (33, 7, (9, 49), 1), (70, 12, (10, 48), 5),
    (5, 65, (4, 9), 7), (70, 33, (9, 12), 3), (5, 40, (9, 9), 5),
]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("C", "c_out", "size", "k"), DIRECT_SIZES)
def test_direct_conv(stages, C, c_out, size, k, transposed):
    x, bf16 = torch.randn(2, *size, C).bfloat16(), BF16
    w = (torch.randn(*((C, c_out) if transposed else (c_out, C)), k, k) / C**0.5).bfloat16()

    def plain(work):
        f = F.conv_transpose2d if transposed else F.conv2d
        return nhwc(f(nchw(x.to(work)), w.to(work), padding=k // 2))

    f32, truth = plain(FLOAT), plain(torch.float64)
    z = direct(stages, x, w, transposed=transposed)
    check(z, f32, truth, FLOAT)
    rounded = direct(stages, x, w, transposed=transposed, z_dtype=bf16)
    assert torch.equal(z.to(bf16), rounded)
    unrounded = x.float() * (1 + 2**-10)  # not far enough for another bfloat16
    assert torch.equal(direct(stages, unrounded, w, transposed=transposed), z)

    around = F.pad(x, (0, 0, 0, 0, k // 2, k // 2))  # strips of rows with their halo
    for first, rows in ((0, 2), (1, 1), (2, 3), (3, 9)):
        part = around[:, first : first + rows + k - 1]
        if part.shape[1] >= k:
            got = direct(stages, part, w, transposed=transposed, pad_h=0)
            assert torch.equal(got, z[:, first : first + rows])


def test_direct_conv_keeps_zeros_and_ties(stages):
    """Whatever pixel of a block it is: the same neighbourhood, the same bits."""
    x, w = torch.zeros(1, 12, 150, 70).bfloat16(), torch.randn(40, 70, 3, 3).bfloat16()
    x[:, 5, 140] = 1
    z = direct(stages, x, w)
    near = torch.zeros(1, 12, 150, dtype=torch.bool)
    near[:, 4:7, 139:142] = True
    assert not z[~near].any()
    assert z[near].all()
    flat = torch.randn(70).bfloat16().expand(1, 12, 150, 70).contiguous()
    inner = direct(stages, flat, w)[:, 1:-1, 1:-1]
    assert torch.equal(inner, inner[:, :1, :1].expand_as(inner))


def test_direct_conv_of_no_images(stages):
    x, w = torch.empty(0, 5, 7, 8).bfloat16(), torch.randn(3, 8, 3, 3).bfloat16()
    assert direct(stages, x, w).shape == (0, 5, 7, 3)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_direct_conv_past_the_cache(stages, dtype):
    x = torch.randn(1, 130, 132, 8).bfloat16()
    w = torch.randn(512 // dtype.itemsize, 8, 3, 3).bfloat16()
    whole = direct(stages, x, w, z_dtype=dtype)
    assert whole.nbytes > 8 * 2**20
    for first in (0, 64):
        part = F.pad(x, (0, 0, 0, 0, 1, 1))[:, first : first + 34]
        some = direct(stages, part, w, pad_h=0, z_dtype=dtype)
        assert torch.equal(some, whole[:, first : first + 32])
