"""A block's backward: random saved tensors, the kernels on them, and the truth in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from saved import pack_code, pack_mask
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX, AVG, NO_POOL = 0, 1, 2
NONE, SOFTMAX, SIGMOID = 0, 1, 2
# Added to twice PyTorch's own error, relative to the result's largest value.
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-6}


def pack_weights(w: Tensor) -> Tensor:
    """(C_out, C_in, K, K) -> [K * K, padded C_out, padded C_in], flipped."""
    packed = w.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1)
    return F.pad(packed, (0, -w.shape[1] % 8, 0, -w.shape[0] % 64)).contiguous()


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


@dataclass
class Block:
    """(N, C_in, H, W) through a convolution to C_out channels, ReLU and maybe a pool."""

    n: int = 1
    c_in: int = 64
    c_out: int = 64
    h: int = 9
    w: int = 19
    k: int = 3
    stride: int = 1
    pool: int = MAX
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    relu: bool = True
    weight: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    code: Tensor | None = field(init=False, default=None)
    keep: Tensor = field(init=False)

    def __post_init__(self) -> None:
        conv_h, conv_w = -(-self.h // self.stride), -(-self.w // self.stride)
        grid = (conv_h, conv_w) if self.pool == NO_POOL else (conv_h // 2, conv_w // 2)
        fan_in = self.c_in * self.k**2
        shape = (self.c_out, self.c_in, self.k, self.k)
        self.weight = (torch.randn(shape) * (2 / fan_in) ** 0.5).to(self.dtype)
        self.dy = torch.randn(self.n, self.c_out, *grid).to(self.dtype)
        if self.pool == MAX:
            self.keep = torch.randint(0, 5, (self.n, self.c_out, *grid))
            self.code = pack_code(self.keep).contiguous()
        else:
            self.keep = torch.rand(self.n, self.c_out, conv_h, conv_w) < 0.6
            self.code = pack_mask(self.keep).contiguous() if self.relu else None
            self.keep |= not self.relu
        self.conv_size = (conv_h, conv_w)

    def dz(self, dtype: torch.dtype) -> Tensor:
        """Eq. (3)."""
        dy = self.dy.to(dtype)
        if self.pool == NO_POOL:
            return dy * self.keep
        dz = dy.new_zeros(self.n, self.c_out, *self.conv_size)
        for q in range(4):
            i = torch.arange(dy.shape[2]) * 2 + q // 2
            j = torch.arange(dy.shape[3]) * 2 + q % 2
            at = (slice(None), slice(None), i[:, None], j[None])
            dz[at] = dy * (self.keep == q) if self.pool == MAX else dy / 4 * self.keep[at]
        return dz

    def dx(self, dtype: torch.dtype) -> Tensor:
        """Eq. (4) by PyTorch, (N, C_in, H, W)."""
        dz, w = self.dz(dtype), self.weight.to(dtype)
        size = (self.n, self.c_in, self.h, self.w)
        return torch.nn.grad.conv2d_input(size, w, dz, stride=self.stride, padding=self.k // 2)

    def arguments(self) -> dict:
        """What every call needs; the tensors behind the addresses stay with the caller."""
        dy = nhwc(self.dy)
        self.held = [dy, self.code, pack_weights(self.weight)]
        return {
            "N": self.n, "H": self.h, "W": self.w, "C_in": self.c_in, "C_out": self.c_out,
            "K": self.k, "stride": self.stride, "strip": (0, self.h),
            "dy_strip": (0, dy.shape[1]), "pool": self.pool, "dtype": DTYPES.index(self.dtype),
            "allow_tf32": self.tf32, "dy": dy.data_ptr(),
            "code": None if self.code is None else self.code.data_ptr(),
            "w": self.held[2].data_ptr(), "dy_image_stride": dy.stride(0),
            "code_image_stride": 0 if self.code is None else self.code.stride(0),
        }  # fmt: skip

    def run(self, kernels, **changed) -> Tensor:
        """The kernel's dx, (N, C_in, rows, W), from memory poisoned beforehand."""
        arguments = self.arguments() | changed
        rows = arguments["strip"][1]
        dx = torch.full((self.n, rows, self.w, self.c_in), float("nan"), dtype=self.dtype)
        kernels.conv_block_bwd(arguments | {"dx": dx.data_ptr(), "dx_image_stride": dx.stride(0)})
        return dx.permute(0, 3, 1, 2)


def check(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """err(ours) <= 2 err(plain) + atol in the largest error; NaN anywhere fails."""
    bound = 2 * (plain.double() - truth).abs().max() + ATOL[dtype] * max(1, truth.abs().max())
    assert (ours.double() - truth).abs().max() <= bound
