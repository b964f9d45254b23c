"""The floor of a step on the CPU: the convolutions alone, and one pass over the logits.

They are measured layer by layer at the best rate on the layer's own shape, in channels_last, on
strips that stay near the caches: ATen's (oneDNN), or the fast path's own where that is faster.
Nothing between them is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from providers import NET, loss_net
from torch import Tensor

from gpl_fast import ops
from gpl_fast.fast import policy
from gpl_fast.fast.policy import MIB, Way
from gpl_fast.net.weights import padded_channels

SECONDS = 0.1  # of each measurement


@dataclass(frozen=True)
class LayerRate:
    """One convolution: name, (C_in, C_out, H, W), GFLOP and seconds of a pass over all images."""

    name: str
    shape: tuple[int, int, int, int]
    gflop: float
    forward: float  # seconds of the prediction's pass
    difference: float  # seconds of the difference's, 0 where a look-up takes its place
    backward: float  # seconds of the data gradient

    @property
    def seconds(self) -> float:
        """Of the layer's convolutions in one step."""
        return self.forward + self.difference + self.backward


def read_seconds(logits: Tensor) -> float:
    """Of one pass over `logits` (N, C, H, W)."""
    return _best(lambda: logits.sum())


def layer_rates(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, structure: str = NET
) -> list[LayerRate]:
    """Every convolution of a step on logits `shape` (N, C, H, W) with a target of `kind`."""
    n, c, h, w = shape
    net, cpu = loss_net(c, structure), policy.named("cpu")
    strip = int(cpu.strip_mb * MIB)
    rates: list[LayerRate] = []
    for layer in net.layers:
        if layer.kind != "conv":
            continue
        c_out, h, w = net.shapes(shape[2], shape[3])[layer.name]
        c_in = padded_channels(layer.in_channels)
        row = n * w * (c_in + c_out) * dtype.itemsize
        whole = row * h <= strip
        images = n if whole else 1
        rows = h if whole else max(strip * n // row, cpu.strip_rows)
        part = (images, min(rows, h), w)
        scale = n * h / (part[0] * part[1])
        paired = not rates and c_in >= cpu.mixed_channels
        seconds = _time_layer(part, c_in, c_out, layer.kernel_size, dtype, paired)
        forward, difference, backward = (scale * s for s in seconds)
        gflop = 2e-9 * layer.kernel_size**2 * layer.in_channels * c_out * n * h * w
        # Labels and top-k maps enter the first layer by look-up.
        looked_up = not rates and kind in ("labels", "topk")
        rates.append(
            LayerRate(
                layer.name,
                (layer.in_channels, c_out, h, w),
                gflop,
                forward,
                0.0 if looked_up else difference,
                backward,
            )
        )
    return rates


@cache  # most layers are the same for all class counts
def _time_layer(
    part: tuple[int, int, int], c_in: int, c_out: int, size: int, dtype: torch.dtype, paired: bool
) -> tuple[float, float, float]:
    """Seconds of a convolution of the prediction, of the difference, and of its data gradient on
    (images, rows, W); the prediction's tiles may be `paired` where the arithmetic is mixed."""
    images, rows, width = part
    layout = torch.channels_last
    x = torch.randn(images, c_in, rows, width).to(dtype, memory_format=layout)
    dz = torch.randn(images, c_out, rows, width).to(dtype, memory_format=layout)
    weight = torch.randn(c_out, c_in, size, size).to(dtype, memory_format=layout)
    pad = size // 2
    forward = difference = backward = float("inf")
    arithmetic = policy.named("cpu").arithmetic(dtype)
    if size == 3 and arithmetic != "own":
        mixed = arithmetic == "mixed"
        forward = _winograd(x, weight, 2, False, mixed and paired)
        difference = _winograd(x, weight, 4, False, False)
        backward = min(_winograd(dz, weight, tile, True, mixed) for tile in (2, 4))
    if dtype == torch.bfloat16 and arithmetic != "float32":
        forward = min(forward, _direct(x, weight, False))
        backward = min(backward, _direct(dz, weight, True))
    forward = _best(lambda: torch.conv2d(x, weight, None, 1, pad), forward)
    backward = _best(lambda: torch.conv_transpose2d(dz, weight, None, 1, pad), backward)
    return forward, min(forward, difference), backward


def _winograd(x: Tensor, weight: Tensor, tile: int, transposed: bool, paired: bool) -> float:
    """Seconds of the convolution of x (N, C, H, W) by `weight`, or of its transpose."""
    c_in, c_out = weight.shape[:2] if transposed else weight.shape[1::-1]
    multiplied = torch.bfloat16 if paired else torch.float32
    u = torch.empty(Way(tile, multiplied).weight_elements(3, c_in, c_out), dtype=multiplied)
    w = weight.to(multiplied).permute(0, 2, 3, 1).contiguous()
    ops.winograd_weight(w, tile, transposed, u)
    maps = x.permute(0, 2, 3, 1)
    dtype = x.dtype if transposed else torch.float32

    def once() -> Tensor:
        z = torch.empty((*maps.shape[:3], c_out), dtype=dtype)
        ops.winograd(maps, u, tile, 1, 0, z)
        return z

    return _best(once)


def _direct(x: Tensor, weight: Tensor, transposed: bool) -> float:
    """The same by the definition, K x K, of bfloat16 maps."""
    c_in, c_out = weight.shape[:2] if transposed else weight.shape[1::-1]
    k = weight.shape[2]
    u = torch.empty(Way(1, x.dtype).weight_elements(k, c_in, c_out), dtype=x.dtype)
    ops.direct_weight(weight.permute(0, 2, 3, 1), transposed, u)
    maps = x.permute(0, 2, 3, 1)
    dtype = x.dtype if transposed else torch.float32

    def once() -> Tensor:
        z = torch.empty((*maps.shape[:3], c_out), dtype=dtype)
        ops.direct_conv(maps, u, k, k // 2, z)
        return z

    return _best(once)


def _best(once: Callable[[], Tensor], best: float = float("inf"), least_calls: int = 3) -> float:
    """Seconds of the shortest call of those that fit in `SECONDS`, or `best` if none is shorter.
    After one of warm-up, which is the only one where it takes ten times `best`."""
    start = time.perf_counter()
    once()
    if time.perf_counter() - start > 10 * best:
        return best
    calls, end = 0, time.perf_counter() + SECONDS
    while calls < least_calls or time.perf_counter() < end:
        start = time.perf_counter()
        kept = once()
        best = min(best, time.perf_counter() - start)
        calls += 1
        del kept
    return best


def text(rates: list[LayerRate], dtype: torch.dtype) -> str:
    """The layers' rates, and the least time of all convolutions."""
    name = str(dtype).removeprefix("torch.")
    lines = [f"  convolutions in {name:<8} {'GFLOP/s fwd':>12} {'GFLOP/s bwd':>12} {'a step':>11}"]
    for r in rates:
        shape = "x".join(map(str, r.shape))
        lines.append(
            f"    {r.name:<8} {shape:<16} {r.gflop / r.forward:8.0f} {r.gflop / r.backward:12.0f} "
            f"{1e3 * r.seconds:9.1f}ms"
        )
    total = sum(r.seconds for r in rates)
    return "\n".join([*lines, f"    all {1e3 * total:52.1f}ms"])
