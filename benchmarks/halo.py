"""The forward with a halo for sm_90a beside Triton's `conv_block_fwd`, layer by layer.

No call takes that kernel (csrc/cuda/conv_block/conv_block_fwd_sm90.cuh) by itself: it waits to be
measured. ``python benchmarks/halo.py --classes 150 --out halo.json`` times both on the GPU that is
there; ``policy.injected(policy, triton=Halo(...))`` runs whole losses with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tune
from torch import Tensor

from gpl_fast import kernels, ops, tiles
from gpl_fast.stages import POOLS


def takes(
    a: Tensor, *, d: Tensor | None, weight: Tensor, target: Any, kernel_size: int, stride: int,
    relu: bool, pool: int, pad_h: int, **rest: Any,
) -> bool:  # fmt: skip
    """Whether the kernel has this form: both branches, 3 x 3, ReLU and max pool, in 16 bits."""
    form = (kernel_size, stride, relu, pool) == (3, 1, True, POOLS["max"])
    if not form or d is None or target is not None or a.dtype == torch.float32:
        return False
    maps = [t for t in (a, d, weight, *map(rest.get, ("y", "delta", "code"))) if t is not None]
    whole = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in maps)
    return whole and a.shape[3] % 8 == 0 and weight.shape[1] % 64 == 0 and pad_h in (0, 1)


class Halo:
    """`others`, but `conv_block_fwd` by the kernel for sm_90a where it has the form.

    Args:
        operator: `torch.ops.gpl_fast.conv_block_fwd`, or what stands for it.
    """

    def __init__(self, operator: Callable[..., None], others: Any) -> None:
        self.operator, self.others = operator, others

    def __getattr__(self, stage: str) -> Any:
        return getattr(self.others, stage)

    def conv_block_fwd(
        self, a: Tensor, *, d: Tensor | None = None, target: Any = None, reduce: bool = False,
        **given: Any,
    ) -> Tensor | None:  # fmt: skip
        """`gpl_fast.stages.TritonStages.conv_block_fwd`."""
        if not takes(a, d=d, target=target, **given):
            made: Tensor | None = self.others.conv_block_fwd(
                a, d=d, target=target, reduce=reduce, **given
            )
            return made
        n, rows, width, c_out = (
            len(a), a.shape[1] + 2 * given["pad_h"] - 2, a.shape[2], given["weight"].shape[1]
        )  # fmt: skip
        channels, tall = (128, 16) if c_out % 128 == 0 else (64, 32)
        programs = -(-rows // tall) * -(-width // 8) * (c_out // channels)
        sums = a.new_empty((n, max(programs, 0)), dtype=torch.float32) if reduce else None
        self.operator(
            a, d, given["weight"], given["from_target"], given["pad_h"], given["row0"],
            given["image_rows"], *map(given.get, ("bias", "y", "delta", "code")), sums,
        )  # fmt: skip
        return sums


def measure(
    classes: int,
    dtype: torch.dtype,
    device: str,
    time: Callable[[Callable[[], Any]], float],
    largest: int = 512,
) -> list[dict[str, Any]]:
    """A row a layer of the default network: milliseconds and TFLOP/s of the halo kernel and of
    Triton's with the table's tile."""
    rows = []
    for c_in, c_out, size in tune.layers(classes):
        size = min(size, largest)
        tile = tiles.choose(90, str(dtype).removeprefix("torch."), "diff", c_in, c_out, 1)
        row: dict[str, Any] = {"c_in": c_in, "c_out": c_out, "size": size}
        flops = 2 * 2 * 9 * c_in * c_out * size * size
        for name, stage in (("halo", halo.conv_block_fwd), ("triton", kernels.conv_block_fwd)):
            launch = tune.launcher(c_in, c_out, size, dtype, "diff", device, stage)
            ms = time(partial(launch, tile))
            row |= {f"{name}_ms": round(ms, 4), f"{name}_tflops": round(flops / ms / 1e9, 1)}
        print(row, flush=True)
        rows.append(row)
    return rows


halo: Any = Halo(lambda *given: torch.ops.gpl_fast.conv_block_fwd(*given), kernels)


def main() -> int:
    """Measure and write; 1 without a GPU of compute capability 9.0 or the compiled operators."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("halo: there is no GPU of compute capability 9.0 here", file=sys.stderr)
        return 1
    if (reason := ops.load()) is not None:
        print(f"halo: {reason}", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    rows = measure(args.classes, getattr(torch, args.dtype), "cuda:0", do_bench)
    found = {"machine": torch.cuda.get_device_name(), "rows": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
