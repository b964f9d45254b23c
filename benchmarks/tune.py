"""Finds the fastest tile of `conv_block_fwd`, or the faster of the two ways of the data gradient,
for each layer on the GPU that is there, or the faster `softmax_bwd`.

Writes rows as gpl_fast/tiles.json, gpl_fast/fast/data_gradient.json or softmax_bwd.json has them,
each with its measurement, to a file of your own that ``GPL_FAST_TILES``, ``GPL_FAST_DATA_GRADIENT``
or ``GPL_FAST_SOFTMAX_BWD`` names from then on; nothing is tuned at run time.

    python benchmarks/tune.py --classes 150 --out my-tiles.json
    python benchmarks/tune.py --backward --classes 19 150 --out my-data-gradient.json
    python benchmarks/tune.py --softmax --classes 19 150 --out my-softmax-bwd.json
    GPL_FAST_TILES=my-tiles.json GPL_FAST_DATA_GRADIENT=my-data-gradient.json python train.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpl_fast import kernels, ops, tiles
from gpl_fast.fast import measured
from gpl_fast.fast.convolution import conv_transpose
from gpl_fast.kernels import conv_block_fwd
from gpl_fast.net.weights import padded_channels
from gpl_fast.stages import ACTIVATIONS, POOLS

WIDTHS = (64, 128, 256, 512, 512)
CANDIDATES = [
    tiles.Tile(h, w, k, n, warps, stages, descriptors)
    for (h, w), k, n, warps, stages, descriptors in product(
        ((8, 8), (8, 16), (16, 16)), (32, 64, 128), (64, 128), (4, 8), (2, 3, 4), (False, True)
    )
]


def layers(classes: int) -> Iterator[tuple[int, int, int]]:
    """(C_in, C_out, size of the grid at 512 x 512) of the default network."""
    for i, (c_in, c_out) in enumerate(pairwise((padded_channels(classes), *WIDTHS))):
        yield c_in, c_out, 512 >> i


def architecture(device: str) -> int:
    """90 for sm_90; on the CPU that of the oldest."""
    if device == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launcher(
    c_in: int, c_out: int, size: int, dtype: torch.dtype, form: str, device: str,
    stage: Callable[..., Tensor | None] = conv_block_fwd,
) -> Callable[[tiles.Tile], Tensor | None]:  # fmt: skip
    """One layer's launch, by a tile, on random maps of one image."""
    a = torch.randn(1, size, size, c_in, device=device).to(dtype)
    d = torch.randn_like(a) if form == "diff" else None
    weight = torch.randn(9 * c_in, c_out, device=device).to(dtype)
    half = size // 2
    y = a.new_empty(1, half, half, c_out)
    code = torch.empty(1, half, half, c_out // 2, dtype=torch.uint8, device=device)
    carried = None if d is None else torch.zeros(1, dtype=torch.bool, device=device)
    delta = None if d is None else torch.empty_like(y)
    return lambda tile: stage(
        a, weight=weight, kernel_size=3, stride=1, relu=True, pool=POOLS["max"], pad_h=1, row0=0,
        image_rows=size, tile=tile, d=d, from_target=carried, y=y, delta=delta, code=code,
    )  # fmt: skip


def fastest(
    run: Callable[[tiles.Tile], Any],
    time: Callable[[Callable[[], Any]], float],
    candidates: list[tiles.Tile],
) -> tuple[tiles.Tile, float]:
    """The tile with the least time, in milliseconds; those that do not compile are passed over."""
    best: tuple[tiles.Tile, float] | None = None
    for tile in candidates:
        try:
            ms = time(partial(run, tile))
        except Exception as error:  # out of shared memory, registers, or the compiler's limits
            print(f"  {tile}: {type(error).__name__}", file=sys.stderr)
            continue
        if best is None or ms < best[1]:
            best = tile, ms
    if best is None:
        raise RuntimeError("not one candidate ran")
    return best


def tune(
    classes: int,
    dtype: torch.dtype,
    device: str,
    time: Callable[[Callable[[], Any]], float],
    candidates: list[tiles.Tile],
) -> list[tiles.Row]:
    """Rows for all layers, in both forms that have a GEMM of their own."""
    rows: list[tiles.Row] = []
    name = torch.cuda.get_device_name(device) if device != "cpu" else "interpreter"
    arch = architecture(device)
    for (c_in, c_out, size), form in product(layers(classes), ("diff", "plain")):
        run = launcher(c_in, c_out, size, dtype, form, device)
        safe = [tile for tile in candidates if tiles.safe(tile, arch) == tile]
        tile, ms = fastest(run, time, safe)
        flops = 2 * 9 * c_in * c_out * size * size * (2 if form == "diff" else 1)
        rows.append(
            {
                "arch": arch,
                "dtype": str(dtype).removeprefix("torch."),
                "form": form,
                "c_in": c_in,
                "c_out": c_out,
                "tile": [tile.block_h, tile.block_w, tile.block_k, tile.block_n],
                "warps": tile.warps,
                "stages": tile.stages,
                "descriptors": tile.descriptors,
                "measured": f"{name}, {size} x {size}: {ms:.4f} ms, {flops / ms / 1e9:.1f} TFLOP/s",
            }
        )
        print(rows[-1]["form"], c_in, c_out, rows[-1]["measured"], flush=True)
    return rows


# ------------------------------------------------------------------------------ the data gradient


def two_ways(
    c_in: int, c_out: int, size: int, dtype: torch.dtype, first: bool, device: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """`conv_block_bwd`, and un-pool, ATen's convolution and softmax, on one image's random maps.

    Each returns dx (1, size, size, C_in), in the first layer the gradient of logits
    (1, C_in, size, size).
    """
    padded = padded_channels(c_in) if first else c_in
    w = torch.randn(c_out, c_in, 3, 3, device=device).div(c_in**0.5 * 3).to(dtype)
    packed = w.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1)
    packed = torch.nn.functional.pad(packed, (0, -c_in % 8, 0, -c_out % 64)).contiguous()
    w = torch.nn.functional.pad(w, (0, 0, 0, 0, 0, padded - c_in))
    w = w.contiguous(memory_format=torch.channels_last)
    dy = torch.randn(1, size // 2, size // 2, c_out, device=device).to(dtype)
    winners = torch.randint(5, (1, size // 2, size // 2, c_out), device=device).byte()
    code = winners[..., ::2] | winners[..., 1::2] << 4
    dz = dy.new_empty(1, size, size, c_out)
    block = {
        "code": code, "w": packed, "pool": POOLS["max"], "stride": 1, "dy_row0": 0,
        "allow_tf32": dtype == torch.float32,
    }  # fmt: skip
    if first:
        x = torch.randn(1, c_in, size, size, device=device)
        logits = {
            "x": x, "lse": x.logsumexp(1), "scale": torch.ones(1, device=device),
            "activation": ACTIVATIONS["softmax" if c_in > 1 else "sigmoid"],
            "temperature": 1.0, "row0": 0, "rows": size,
        }  # fmt: skip

    def by_kernel() -> Tensor:
        if first:
            dx = torch.empty_like(x)
            operators.conv_block_logits_bwd(dy, **block, **logits, dx=dx)
        else:
            dx = dy.new_empty(1, size, size, c_in)
            operators.conv_block_bwd(dy, **block, height=size, row0=0, dx=dx)
        return dx

    def by_aten() -> Tensor:
        operators.relu_pool_bwd(
            dy, code=code, pool=POOLS["max"], height=size, width=size, row0=0, dz=dz
        )
        dx = conv_transpose(dz, w, 1, (1, 1), (0, 0), True)
        if not first:
            return dx
        gradient = torch.empty_like(x)
        operators.softmax_bwd(**logits, dy=dx, dx=gradient)
        return gradient

    return by_kernel, by_aten


operators: Any = ops  # tests put those in its place that run the kernels on the CPU


def measure_data_gradients(
    classes: list[int],
    dtype: torch.dtype,
    device: str,
    time: Callable[[Callable[[], Any]], float],
    largest: int = 512,
) -> list[measured.Row]:
    """A row for each layer, and for the first with each number of classes; none where the two ways
    do not agree."""
    rows: list[measured.Row] = []
    arch = architecture(device)
    name = torch.cuda.get_device_name(device) if device != "cpu" else "emulation"
    found = [(c, WIDTHS[0], 512, True) for c in classes]
    found += [(*layer, False) for layer in list(layers(classes[0]))[1:]]
    for c_in, c_out, size, first in found:
        size = min(size, largest)
        by_kernel, by_aten = two_ways(c_in, c_out, size, dtype, first, device)
        ours, plain = by_kernel().float(), by_aten().float()
        if not (ours - plain).abs().max() <= 0.02 * plain.abs().max():
            print(f"data gradient {c_in} -> {c_out}: the two ways do not agree", file=sys.stderr)
            continue
        kernel_ms, aten_ms = time(by_kernel), time(by_aten)
        rows.append(
            {
                "arch": arch,
                "dtype": str(dtype).removeprefix("torch."),
                "first": first,
                "in_channels": c_in,
                "out_channels": c_out,
                "kernel_size": 3,
                "stride": 1,
                "kernel_ms": round(kernel_ms, 4),
                "aten_ms": round(aten_ms, 4),
                "measured": f"{name}, 1 x {size} x {size}",
            }
        )
        print(c_in, c_out, f"kernel {kernel_ms:.4f} ms, ATen {aten_ms:.4f} ms", flush=True)
    return rows


# ---------------------------------------------------------------------------------- softmax_bwd


def measure_softmax_bwd(
    classes: list[int],
    dtype: torch.dtype,
    device: str,
    time: Callable[[Callable[[], Any]], float],
    size: int = 512,
) -> list[measured.SoftmaxRow]:
    """A row for each number of classes: float32 logits in planes, dy of `dtype`; none where the
    two do not agree."""
    rows: list[measured.SoftmaxRow] = []
    for c in classes:
        x = torch.randn(1, c, size, size, device=device)
        given = {
            "dy": torch.randn(1, size, size, padded_channels(c), device=device).to(dtype),
            "lse": x.logsumexp(1), "scale": torch.ones(1, device=device),
            "activation": ACTIVATIONS["softmax"], "temperature": 1.0, "row0": 0, "rows": size,
        }  # fmt: skip
        dx = [torch.full_like(x, float("nan")) for _ in range(2)]
        runs = [
            partial(stage, x, **given, dx=to)
            for stage, to in zip((operators.softmax_bwd, kernels.softmax_bwd), dx, strict=True)
        ]
        cuda_ms, triton_ms = (time(run) for run in runs)
        if not (dx[0] - dx[1]).abs().max() <= 1e-4 * dx[1].abs().max():
            print(f"softmax_bwd of {c} classes: the two do not agree", file=sys.stderr)
            continue
        name = torch.cuda.get_device_name(device) if device != "cpu" else "emulation"
        rows.append(
            {
                "arch": architecture(device),
                "classes": c,
                "cuda_ms": round(cuda_ms, 4),
                "triton_ms": round(triton_ms, 4),
                "measured": f"{name}, 1 x {size} x {size}",
            }
        )
        print(c, f"CUDA {cuda_ms:.4f} ms, Triton {triton_ms:.4f} ms", flush=True)
    return rows


def main() -> int:
    """Measure and write; 1 without a GPU, or where not one row came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[150])
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, nargs="+", default=["bfloat16"])
    parser.add_argument("--backward", action="store_true", help="the data gradient's two ways")
    parser.add_argument("--softmax", action="store_true", help="the two softmax_bwd")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: there is no GPU here", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    torch.backends.cudnn.allow_tf32 = True  # float32's rows are TF32's
    rows: list[Any] = []

    def time(run: Callable[[], Any]) -> float:
        return float(do_bench(run))

    for dtype in (getattr(torch, name) for name in args.dtype):
        if args.backward:
            rows += measure_data_gradients(args.classes, dtype, "cuda:0", time)
        elif args.softmax:
            rows += measure_softmax_bwd(args.classes, dtype, "cuda:0", time)
        else:
            for classes in args.classes:
                rows += tune(classes, dtype, "cuda:0", time, CANDIDATES)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
