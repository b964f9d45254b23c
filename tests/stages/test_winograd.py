"""3 x 3 convolutions by Winograd's algorithm, in float32 and in pairs of bfloat16."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import error
from definitions import BF16, DTYPES, FLOAT, check, nchw, nhwc, poisoned

pytestmark = pytest.mark.needs("winograd", "winograd_weight")


def padded(channels):
    return -(-channels // 32) * 32


TILES = (2, 4)  # results to a side


def winograd(
    stages, x, w, *, tile=2, transposed=False, pad_h=1, row0=0, z_dtype=None, u_dtype=FLOAT
):
    """The convolution of x (N, rows, W, C_in) by w (C_out, C_in, 3, 3), or of the transpose by
    w (C_in, C_out, 3, 3); what is multiplied has the dtype of u."""
    c_in, c_out = x.shape[3], w.shape[transposed]
    u = poisoned((tile + 2) ** 2 * (c_in + c_in % 2) * padded(c_out), dtype=u_dtype)
    stages.winograd_weight(
        w.permute(0, 2, 3, 1).contiguous(), tile=tile, transposed=transposed, u=u
    )
    rows, dtype = x.shape[1] + 2 * pad_h - 2, z_dtype or x.dtype
    z = poisoned(x.shape[0], rows, x.shape[2], c_out, dtype=dtype)
    stages.winograd(x, u=u, tile=tile, pad_h=pad_h, row0=row0, z=z)
    return z


# Input channels in one part and in several, in pairs as well, with remainders.
WINOGRAD_SIZES = [
    (8, 64, (13, 27)), (3, 19, (1, 5)), (19, 40, (7, 33)), (64, 19, (2, 300)), (200, 70, (6, 17)),
    (391, 33, (3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("C", "c_out", "size"), WINOGRAD_SIZES)
def test_winograd(stages, C, c_out, size, tile, transposed, dtype):
    x = torch.randn(2, *size, C).to(dtype)
    w = torch.randn(*((C, c_out) if transposed else (c_out, C)), 3, 3) / C**0.5

    def plain(work):
        f = F.conv_transpose2d if transposed else F.conv2d
        return nhwc(f(nchw(x.to(work)), w.to(work), padding=1))

    f32, truth = plain(FLOAT), plain(torch.float64)
    z = winograd(stages, x, w, tile=tile, transposed=transposed)
    check(z, f32.to(dtype), truth, dtype)
    exact = winograd(stages, x, w, tile=tile, transposed=transposed, z_dtype=FLOAT)
    check(exact, f32, truth, FLOAT)
    assert torch.equal(exact.to(dtype), z)

    short = w.bfloat16()
    of_short = winograd(stages, x, short, tile=tile, transposed=transposed)
    assert torch.equal(
        of_short, winograd(stages, x, short.float(), tile=tile, transposed=transposed)
    )

    # strips of rows with their halo, some that begin in the middle of a tile
    around = F.pad(x, (0, 0, 0, 0, 1, 1))
    for first, rows in ((0, 2), (0, 1), (1, 1), (2, 3), (3, 4), (5, 5), (4, 8)):
        here = slice(first, first + rows)
        part = around[:, first : first + rows + 2]
        if part.shape[1] > 2:
            got = winograd(stages, part, w, tile=tile, transposed=transposed, pad_h=0, row0=first)
            check(got, f32[:, here].to(dtype), truth[:, here], dtype)
            if tile == 2 or (first % 4 == 0 and rows % 4 == 0):
                assert torch.equal(got, z[:, here])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("C", "c_out", "size"), WINOGRAD_SIZES)
def test_winograd_in_pairs(stages, C, c_out, size, transposed):
    """Of numbers so short that no point is rounded, exactly the convolution; otherwise, off by what
    rounding the points takes."""

    def plain(x, w):
        f = F.conv_transpose2d if transposed else F.conv2d
        return nhwc(f(nchw(x.double()), w.double(), padding=1))

    shape = (C, c_out) if transposed else (c_out, C)
    in_pairs = functools.partial(winograd, stages, transposed=transposed, u_dtype=BF16)
    x = torch.randint(-8, 9, (2, *size, C)).bfloat16()
    w = 4 * torch.randint(-2, 3, (*shape, 3, 3)).bfloat16()
    z = in_pairs(x, w, z_dtype=FLOAT)
    assert torch.equal(z.double(), plain(x, w))
    assert torch.equal(in_pairs(x.float(), w), z)
    around = F.pad(x, (0, 0, 0, 0, 1, 1))
    for first, rows in ((0, 1), (1, 1), (2, 4)):
        part = around[:, first : first + rows + 2]
        if part.shape[1] > 2:
            got = in_pairs(part, w, pad_h=0, row0=first, z_dtype=FLOAT)
            assert torch.equal(got, z[:, first : first + rows])

    x, w = torch.randn(2, *size, C).bfloat16(), torch.randn(*shape, 3, 3).bfloat16()
    truth = plain(x, w)
    for tile, most in ((2, 0.006), (4, 0.02)):
        z = in_pairs(x, w, tile=tile, z_dtype=FLOAT)
        assert 1e-4 < error(z, truth) < most
        assert torch.equal(in_pairs(x, w, tile=tile), z.bfloat16())


@pytest.mark.parametrize(
    ("dtype", "u_dtype"),
    [*((dtype, FLOAT) for dtype in DTYPES), (BF16, BF16),
     (FLOAT, BF16)],
)  # fmt: skip
def test_winograd_reads_nothing_but_the_neighbourhood(stages, dtype, u_dtype):
    """Exactly 0 where all of it is 0; the same result where it is the same, as at pixels of a
    window whose neighbourhoods repeat along a row or column: their ties stay ties."""
    w = torch.randn(40, 24, 3, 3).to(u_dtype)
    x = torch.zeros(1, 12, 14, 24, dtype=dtype)
    x[:, 5, 6] = torch.randn(24).to(dtype)
    z = winograd(stages, x, w, u_dtype=u_dtype)
    near = torch.zeros(1, 12, 14, dtype=torch.bool)
    near[:, 4:7, 5:8] = True
    assert not z[~near].any()
    assert z[near].all()

    flat = torch.randn(1, 1, 1, 24).expand(1, 12, 14, 24)
    stripes = torch.randn(1, 1, 14, 24).expand(1, 12, 14, 24)
    for along, same in ((flat, (1, 2)), (stripes, (1,)), (stripes.transpose(1, 2), (2,))):
        z = winograd(stages, along.contiguous().to(dtype), w, u_dtype=u_dtype)[:, 2:-2, 2:-2]
        for dim in same:
            one, other = (z.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1))
            assert torch.equal(one, other)


def test_large_tiles_of_winograd_leave_rounding_alone(stages):
    """Of a pixel, a tile of 4 x 4 results holds nothing beyond its neighbourhood but rounding."""
    w, x = torch.randn(40, 24, 3, 3), torch.zeros(1, 15, 14, 24)
    x[:, 5, 6] = torch.randn(24)
    z, small = winograd(stages, x, w, tile=4), winograd(stages, x, w)
    assert (z - small).abs().max() <= 1e-5 * small.abs().max()
    assert not z[:, 8:].any()  # the next tiles do not read it
    assert not z[:, :, 8:].any()


@pytest.mark.parametrize("tile", TILES)
def test_winograd_of_no_images(stages, tile):
    x, w = torch.empty(0, 5, 7, 8), torch.randn(3, 8, 3, 3)
    assert winograd(stages, x, w, tile=tile).shape == (0, 5, 7, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_winograd_past_the_cache(stages, tile, dtype):
    """Large results are written around the cache: the same bits."""
    x, w = torch.randn(1, 130, 132, 8).to(dtype), torch.randn(512 // dtype.itemsize, 8, 3, 3)
    whole = winograd(stages, x, w, tile=tile)
    assert whole.nbytes > 8 * 2**20
    for first in (0, 64):
        part = F.pad(x, (0, 0, 0, 0, 1, 1))[:, first : first + 34]
        assert torch.equal(
            winograd(stages, part, w, tile=tile, pad_h=0), whole[:, first : first + 32]
        )
