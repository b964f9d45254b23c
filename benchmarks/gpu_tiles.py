"""Times of a few tiles of `conv_block_fwd` in each layer, in the difference form.

``python benchmarks/gpu_tiles.py --out tiles.json`` times `candidates` of all layers, on grids of
ADE20K's batch; ``--layer I`` runs those of one layer once, so that several processes may compile at
a time. ``benchmarks/tune.py`` searches among many more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

CLASSES = 150
SIZES = (512, 512, 512, 256, 128)  # 1, 4 and 16 images' pixels, as one map


def candidates(c_out: int) -> Iterator[dict[str, Any]]:
    """The most likely first."""
    wide = ((8, 16, 128), (16, 16, 64), (8, 16, 64), (16, 8, 128))
    grids = ((16, 16, 64), (8, 16, 64), (16, 8, 64)) if c_out <= 64 else wide
    for (h, w, n), (k, stages) in product(grids, ((64, 3), (32, 4), (64, 2), (32, 3))):
        yield {"block_h": h, "block_w": w, "block_k": k, "block_n": n, "warps": 8,
               "stages": stages, "descriptors": True}  # fmt: skip


def timed(
    layer: tuple[int, int, int], device: str, time: Callable[[Callable[[], Any]], float], most: int
) -> list[dict[str, Any]]:
    """A row a candidate, the fastest first; "error" says why one has no time."""
    import torch
    import tune

    from gpl_fast.tiles import Tile

    c_in, c_out, size = layer
    run = tune.launcher(c_in, c_out, size, torch.bfloat16, "diff", device)
    rows: list[dict[str, Any]] = []
    for tile in list(candidates(c_out))[:most]:
        row = {"c_in": c_in, "c_out": c_out, "size": size, **tile}
        try:
            row["ms"] = time(partial(run, Tile(**tile)))
            row["tflops"] = 2 * 2 * 9 * c_in * c_out * size * size / row["ms"] / 1e9
        except Exception as error:  # out of shared memory, registers, or the compiler's limits
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        print(row, flush=True)
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def as_tiles(rows: list[dict[str, Any]], arch: int, machine: str) -> list[dict[str, Any]]:
    """The fastest of each layer, as gpl_fast/tiles.json has them."""
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        if "ms" in row:
            best.setdefault((row["c_in"], row["c_out"]), row)
    return [
        {
            "arch": arch, "dtype": "bfloat16", "form": "diff", "c_in": c_in, "c_out": c_out,
            "tile": [row[f"block_{x}"] for x in "hwkn"], "warps": row["warps"],
            "stages": row["stages"], "descriptors": row["descriptors"],
            "measured": f"{machine}, {row['size']} x {row['size']}: {row['ms']:.4f} ms, "
            f"{row['tflops']:.1f} TFLOP/s",
        }
        for (c_in, c_out), row in best.items()
    ]  # fmt: skip


def once(run: Callable[[], Any]) -> float:
    """Compile and run; no time is taken."""
    run()
    return 1.0


def main() -> int:
    """Rows of every layer; 1 where a layer has none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layer", type=int, help="compile one layer's and end")
    parser.add_argument("--dry", action="store_true", help="interpreted on the CPU, one tile")
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    import report
    import torch
    import tune

    device = "cpu" if args.dry else "cuda:0"
    layers = [(i, o, s) for (i, o, _), s in zip(tune.layers(CLASSES), SIZES, strict=True)]
    most = 99
    if args.dry:
        layers, most = [(16, 64, 16), (64, 128, 16)], 1
    if args.layer is not None:
        timed(layers[args.layer], device, once, most)
        return 0
    time: Callable[[Callable[[], Any]], float] = once
    if not args.dry:
        from triton.testing import do_bench

        time = partial(do_bench, warmup=10, rep=40)
    machine = "interpreter" if args.dry else torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    for layer in layers:
        rows += timed(layer, device, time, most)
        best = as_tiles(rows, tune.architecture("cpu" if args.dry else device), machine)
        report.replace_text(args.out, json.dumps({"rows": rows, "tiles": best}))
    return int(len(best) < len(layers))


if __name__ == "__main__":
    sys.exit(main())
