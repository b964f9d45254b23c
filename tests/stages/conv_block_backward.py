"""A block's backward: random saved tensors, the call on them, and the truth in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from definitions import BF16, FLOAT, MAX, NO_POOL, SOFTMAX, activate, check, poisoned, poisoned_like
from saved import log_sum_exp, pack_code, pack_mask
from torch import Tensor


def pack_weights(w: Tensor) -> Tensor:
    """(C_out, C_in, K, K) -> (K * K, padded C_out, padded C_in), flipped."""
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
    dtype: torch.dtype = BF16
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

    def arguments(self) -> dict[str, Any]:
        """All but the first and the output, of both stages."""
        return {
            "code": self.code, "w": pack_weights(self.weight), "pool": self.pool,
            "stride": self.stride, "dy_row0": 0, "allow_tf32": self.tf32,
        }  # fmt: skip

    def run(
        self,
        stages: Any,
        strip: tuple[int, int] | None = None,
        dy: Tensor | None = None,
        **changed: Any,
    ) -> Tensor:
        """dx, (N, C_in, rows, W), from memory poisoned beforehand."""
        row0, rows = strip or (0, self.h)
        dx = poisoned(self.n, rows, self.w, self.c_in, dtype=self.dtype)
        arguments = self.arguments() | {"height": self.h, "row0": row0, "dx": dx} | changed
        stages.conv_block_bwd(nhwc(self.dy) if dy is None else dy, **arguments)
        return dx.permute(0, 3, 1, 2)

    def check(self, ours: Tensor) -> None:
        """Against float64."""
        check(ours, self.dx(self.dtype), self.dx(torch.float64), self.dtype)


@dataclass
class Logits:
    """Logits, whose map is a block's input, and the cross-entropy that shares the pass."""

    block: Block
    activation: int = SOFTMAX
    temperature: float = 1.0
    dtype: torch.dtype = FLOAT
    channels_last: bool = False
    peak: float = 0.0  # raises one class of each pixel
    masked: bool = False
    weighted: bool = False  # by a mask of numbers, the cross-entropy too
    cross_entropy: bool = False
    class_weight: bool = False
    label_smoothing: float = 0.0
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        b = self.block
        x = 2 * torch.randn(b.n, b.c_in, b.h, b.w)
        x.scatter_add_(1, torch.randint(b.c_in, (b.n, 1, b.h, b.w)), torch.full_like(x, self.peak))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.x = x.to(self.dtype).contiguous(memory_format=layout)
        self.scale = torch.rand(b.n) + 0.5
        self.valid = torch.rand(b.n, b.h, b.w) < 0.8 if self.masked else None
        self.ce_mask = None
        if self.weighted:
            self.ce_mask = 3 * torch.rand(b.n, b.h, b.w)
            self.valid = torch.where(self.valid, self.ce_mask, 0)
        self.labels = self.weight = None
        if self.cross_entropy:
            # Outside of the classes: not counted.
            self.labels = torch.randint(-2, b.c_in + 2, (b.n, b.h, b.w))
            self.weight = torch.rand(b.c_in) + 0.5 if self.class_weight else None
            self.ce_scale = torch.rand(b.n) + 0.5
        if self.masked:
            self.x.masked_fill_((self.valid == 0)[:, None] & (self.labels is None), float("nan"))

    def dx(self, dy: Tensor) -> Tensor:
        """Eq. (5) and the cross-entropy's gradient by autograd, in dy's dtype."""
        x = self.x.to(dy.dtype).requires_grad_()
        y = activate(x, self.activation, self.temperature)
        seed = self.scale.to(dy.dtype).view(-1, 1, 1, 1) * dy
        (dx,) = torch.autograd.grad(y, x, seed)
        if self.valid is not None:
            dx = torch.where(self.valid[:, None] > 0, dx * self.valid[:, None], 0)
        if self.labels is None:
            return dx
        weight = None if self.weight is None else self.weight.to(dy.dtype)
        counted = (self.labels >= 0) & (self.labels < self.block.c_in)
        each = F.cross_entropy(
            x, self.labels.where(counted, -100), weight, ignore_index=-100, reduction="none",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        each = each if self.ce_mask is None else each * self.ce_mask
        total = (each * self.ce_scale.to(dy.dtype).view(-1, 1, 1)).sum()
        return dx + torch.autograd.grad(total, x)[0]

    def run(self, stages: Any, strip: tuple[int, int] | None = None) -> Tensor:
        """The gradient, from memory poisoned beforehand, in x's layout."""
        (dx,), (row0, rows) = poisoned_like(self.x), strip or (0, self.block.h)
        own_lse = self.activation != SOFTMAX or self.temperature != 1.0
        lse, ce_lse = (log_sum_exp(self.x, t).float() for t in (self.temperature, 1.0))
        options = {"lse": lse, "valid": self.valid}
        if self.labels is not None:
            options |= {
                "ce_labels": self.labels, "ce_lse": ce_lse if own_lse else None,
                "ce_scale": self.ce_scale, "class_weight": self.weight,
                "label_smoothing": self.label_smoothing, "ce_mask": self.ce_mask,
            }  # fmt: skip
        stages.conv_block_logits_bwd(
            nhwc(self.block.dy), **self.block.arguments(), x=self.x, scale=self.scale,
            activation=self.activation, temperature=self.temperature, row0=row0, rows=rows, dx=dx,
            **options,
        )  # fmt: skip
        return dx

    def check(self, ours: Tensor) -> None:
        """Against float64; PyTorch's own way stores dy' and the gradient rounded."""
        dtype = self.block.dtype
        plain = self.dx(self.block.dx(dtype).float()).to(self.dtype)
        coarse = max(dtype, self.dtype, key=lambda d: torch.finfo(d).eps)
        check(ours, plain, self.dx(self.block.dx(torch.float64)), coarse)
