"""What the tests of stages share: poisoned buffers, layouts, bounds, and small definitions.

The bound is err(ours, float64) <= 2 err(PyTorch in the same dtype, float64) + atol in the largest
error; what must be exact (strips, orders, zeros, routing) is compared bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT, BF16, HALF)
ATOL = {FLOAT: 1e-6, BF16: 1e-5, HALF: 1e-6}
NONE, SOFTMAX, SIGMOID = 0, 1, 2
MAX, AVG, NO_POOL = 0, 1, 2


def poisoned(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    """NaN, or the largest integer."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 255, dtype=dtype)


def poisoned_like(*tensors: Tensor) -> list[Tensor]:
    return [torch.full_like(t, float("nan") if t.is_floating_point() else 255) for t in tensors]


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def check(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """err(ours) <= 2 err(plain) + atol; NaN anywhere fails."""
    assert ours.shape == truth.shape
    if truth.numel() == 0:
        return
    bound = 2 * (plain.double() - truth).abs().max() + ATOL[dtype] * max(1, truth.abs().max())
    assert (ours.double() - truth).abs().max() <= bound


def same_bits(ours: Tensor, wanted: Tensor) -> bool:
    """NaN at the same places, zeros of the same sign."""
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
    dense = (t.clone(memory_format=torch.contiguous_format) for t in (ours, wanted))
    return torch.equal(*(t.view(torch.uint8) for t in dense))


def agree(ours: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal numbers; any NaN is a NaN, any zero a zero."""
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


LAYOUTS = ("nchw", "channels_last", "sliced")


def layout(x: Tensor, kind: str) -> Tensor:
    """The same (N, C, H, W) in other strides."""
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":  # no stride is 1
        n, c, h, w = x.shape
        return torch.full((n, c * 2, h, w * 2), 9.0).to(x.dtype)[:, ::2, :, ::2].copy_(x)
    return x.contiguous()


def activate(x: Tensor, kind: int, temperature: float = 1.0) -> Tensor:
    """y of logits (N, C, ...)."""
    x = x / temperature
    return x.softmax(1) if kind == SOFTMAX else x.sigmoid() if kind == SIGMOID else x


def odd_images(n: int) -> Tensor:
    """`from_target`: every other image carries the target's map."""
    return torch.arange(n) % 2 == 1


def carried(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.where(odd_images(len(target)).view(-1, 1, 1, 1), target, prediction)


def branches(z: Tensor, dz: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(prediction, target) of which image n carries z."""
    z, dz = z.to(dtype), dz.to(dtype)
    odd = odd_images(len(z)).view(-1, 1, 1, 1)
    return z + dz * odd, z - dz * ~odd


def pooled(z: Tensor, pool: int) -> Tensor:
    """ReLU and pool of (N, H, W, C)."""
    f = F.max_pool2d if pool == MAX else F.avg_pool2d
    return nhwc(f(nchw(z).relu(), 2))


def signed(*shape: int, dtype: torch.dtype) -> Tensor:
    """Ties, zeros of both signs, and a few NaN and infinities among ordinary numbers."""
    x = torch.randn(shape).mul(4).round().div(4)
    x = torch.where(torch.rand(shape) < 0.1, -0.0, x)
    rare = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x = torch.where(torch.rand(shape) < 0.01, rare[torch.randint(3, shape)], x)
    return x.to(dtype)


def codes(n: int, h: int, w: int, c: int) -> Tensor:
    """Random winners, 0..3 and 4 = none positive, of windows (n, h, w, c)."""
    winner = torch.randint(5, (n, h, w, c + c % 2)).byte()
    return winner[..., ::2] | winner[..., 1::2] << 4


def masks(n: int, h: int, w: int, c: int) -> Tensor:
    """Random signs of (n, h, w, c)."""
    return torch.randint(256, (n, h, w, -(-c // 8))).byte()
