"""Finds the fastest tile of `conv_block_fwd` for each layer on the GPU that is there.

Writes rows as gpl_fast/kernels/tiles.json has them, each with its measurement, to a file of your
own that ``GPL_FAST_TILES`` names from then on; nothing is tuned at run time.

    python benchmarks/tune.py --classes 150 --out my-tiles.json
    GPL_FAST_TILES=my-tiles.json python train.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpl_fast.kernels import conv_block, conv_block_fwd, tiles
from gpl_fast.plan import padded_channels

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


def launcher(
    c_in: int, c_out: int, size: int, dtype: torch.dtype, form: str, device: str
) -> Callable[[], Tensor | None]:
    """One layer's launch on random maps of one image."""
    a = torch.randn(1, size, size, c_in, device=device).to(dtype)
    d = torch.randn_like(a) if form == "diff" else None
    weight = torch.randn(9 * c_in, c_out, device=device).to(dtype)
    half = size // 2
    y = a.new_empty(1, half, half, c_out)
    code = torch.empty(1, half, half, c_out // 2, dtype=torch.uint8, device=device)
    carried = None if d is None else torch.zeros(1, dtype=torch.bool, device=device)
    delta = None if d is None else torch.empty_like(y)
    return lambda: conv_block_fwd(
        a, d, weight, None, carried, None, kernel_size=3, stride=1, relu=True, pool=0, pad_h=1,
        row0=0, image_rows=size, y=y, delta=delta, code=code,
    )  # fmt: skip


def fastest(
    run: Callable[[], Any], time: Callable[[Callable[[], Any]], float], candidates: list[tiles.Tile]
) -> tuple[tiles.Tile, float]:
    """The tile with the least time, in milliseconds; those that do not compile are passed over."""
    best: tuple[tiles.Tile, float] | None = None
    shipped = conv_block.tile_for
    try:
        for tile in candidates:
            conv_block.tile_for = lambda *args, tile=tile: tile
            try:
                ms = time(run)
            except Exception as error:  # out of shared memory, registers, or the compiler's limits
                print(f"  {tile}: {type(error).__name__}", file=sys.stderr)
                continue
            if best is None or ms < best[1]:
                best = tile, ms
    finally:
        conv_block.tile_for = shipped
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
    for (c_in, c_out, size), form in product(layers(classes), ("diff", "plain")):
        tile, ms = fastest(launcher(c_in, c_out, size, dtype, form, device), time, candidates)
        flops = 2 * 9 * c_in * c_out * size * size * (2 if form == "diff" else 1)
        rows.append(
            {
                "arch": tiles.architecture(torch.device(device)),
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: there is no GPU here", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    dtype = getattr(torch, args.dtype)
    rows = tune(args.classes, dtype, "cuda:0", lambda run: float(do_bench(run)), CANDIDATES)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
