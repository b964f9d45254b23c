"""FLOPs and bytes of every kernel of a step on a GPU, from the launches themselves.

The walks run on tensors without memory, so no GPU is needed: what would be launched is recorded
with its arguments. Bytes are those of each tensor argument, once: halos, weights that leave the
cache and rows that other programs read again come on top. The floor is the larger of FLOPs and
bytes at the rates given. Of convolutions by tiles, "tiles" is what all programs together load, of
which all but the first time comes from the L2 cache. docs/kernels.md has the tables.

    python benchmarks/kernels.py
"""

from __future__ import annotations

import argparse
import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpl_fast import LossNet, chain, plan
from gpl_fast.kernels import tiles

# name: N, C, H, W, target, activation
WORKLOADS: dict[str, tuple[int, int, int, int, str, str]] = {
    "cityscapes": (8, 19, 769, 769, "dense", "softmax"),
    "voc": (16, 21, 512, 512, "dense", "softmax"),
    "ade20k": (16, 150, 512, 512, "dense", "softmax"),
    "ade20k, labels": (16, 150, 512, 512, "labels", "softmax"),
    "ade-full, labels": (8, 847, 512, 512, "labels", "softmax"),
    "lvis": (4, 1203, 512, 512, "dense", "softmax"),
    "lvis, labels": (4, 1203, 512, 512, "labels", "softmax"),
    "depth": (8, 1, 385, 385, "dense", "none"),
    "masks": (64, 1, 200, 200, "dense", "sigmoid"),
}
MODULES = ("softmax_pack", "label_conv", "relu_pool", "diff_reduce", "softmax_bwd", "conv_block")


@dataclass
class Launch:
    """One kernel's work."""

    name: str
    flops: float
    bytes: float
    tiles: float = 0.0  # bytes that its programs load, where they are a product's


@dataclass
class Recorder(TorchDispatchMode):
    """Collects kernel launches and ATen's convolutions."""

    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, w = args[:2]
            transposed = args[6]
            # Each weight meets each pixel of the side that is not spread.
            pixels = (x if transposed else out).numel() // (x if transposed else out).shape[1]
            moved = sum(t.numel() * t.element_size() for t in (x, w, out))
            name = "data gradient (ATen)" if transposed else "convolution (ATen)"
            self.launches.append(Launch(name, 2.0 * pixels * w.numel(), moved))
        return out

    def launch(self, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        """In the place of `gpl_fast.kernels.launch.launch`."""
        names = list(inspect.signature(kernel.fn).parameters)
        given = dict(zip(names, args, strict=False))
        # A missing tensor is stood in for by the first one.
        tensors = {id(t): t for t in args if isinstance(t, Tensor)}.values()
        # Of whole images' planes a strip's launch reads its rows.
        strip = given.get("dy_ptr", given.get("a_ptr"))
        share = 1.0
        if strip is not None and given.get("H"):
            share = min(1.0, strip.shape[1] / given["H"])
        plane = (given.get("H"), given.get("W"))
        moved = sum(
            t.numel() * t.element_size() * (share if t.shape[-2:] == plane else 1.0)
            for t in tensors
        )
        flops = tiled = 0.0
        if "weight_ptr" in given:
            n = given["a_ptr"].shape[0]
            pixels = n * given["rows"] * given["W_OUT"]
            branches = 2 if meta["FORM"] == 1 else 1
            flops = 2.0 * branches * pixels * given["weight_ptr"].numel()
            steps = meta["K"] ** 2 * -(-given["C_IN"] // meta["BLOCK_K"])
            tile = branches * meta["BLOCK_H"] * meta["BLOCK_W"] + meta["BLOCK_N"]
            tile *= meta["BLOCK_K"] * given["weight_ptr"].element_size()
            tiled = float(grid[0] * grid[1] * steps * tile)
        name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
        self.launches.append(Launch(name, flops, moved, tiled))


@contextmanager
def recording() -> Iterator[Recorder]:
    """Launches inside are recorded, not made; tensors of device "meta" stand for a GPU's."""
    recorder = Recorder()
    patches = [
        mock.patch.object(import_module(f"gpl_fast.kernels.{name}"), "launch", recorder.launch)
        for name in MODULES
    ]
    patches.append(mock.patch.object(tiles, "architecture", return_value=90))
    patches.append(mock.patch.object(chain.stages, "TRITON_DEVICES", {"cpu", "meta"}))
    with recorder:
        for patch in patches:
            patch.start()
        try:
            yield recorder
        finally:
            for patch in patches:
                patch.stop()


def step(name: str, workspace_mb: float) -> tuple[list[Launch], list[Launch]]:
    """Launches of the forward and of the backward, bfloat16."""
    n, c, h, w, kind, activation = WORKLOADS[name]
    net = LossNet.vgg(c)
    text = plan.make_spec(
        net, feature_weights={net.layer_names[-1]: 1.0}, style_weights={}, kind=kind,
        activation=activation, target_activation=activation, temperature=1.0, device="cuda",
        dtype=torch.bfloat16, workspace_mb=workspace_mb,
    )  # fmt: skip
    looked_up = kind == "labels"
    with recording() as recorder:
        cpu, device = torch.device("cpu"), torch.device("meta")
        names = chain.pack_names(net, cpu, looked_up)
        packs = chain.pack_weights(net, cpu, torch.bfloat16, looked_up)
        x = torch.empty(n, c, h, w, device=device)
        target = {"dense": torch.empty(n, c, h, w, device=device)}
        if kind == "labels":
            target = {"labels": torch.empty(n, h, w, dtype=torch.long, device=device)}
        planned = plan.Plan(plan.load_spec(text), n, h, w)
        by_name = {k: t.to(device) for k, t in zip(names, packs, strict=True)}
        recorder.launches.clear()
        _, saved = chain.Forward(planned, x, target, by_name, True).run()
        forward, recorder.launches = recorder.launches, []
        g = torch.ones(4, n, device=device)
        chain.Backward(planned, x, {}, by_name, saved, g).run()
        return forward, recorder.launches


def table(name: str, args: argparse.Namespace) -> str:
    """One workload in Markdown."""
    n, c, h, w, kind, activation = WORKLOADS[name]
    lines = [
        f"### {name}: {n} x {c} x {h} x {w}, {kind}, {activation}\n",
        "| stage | launches | GFLOP | GB | tiles, GB | FLOP / byte | floor, ms | limit |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    total = [0.0, 0.0, 0.0]
    for half, launches in zip(("forward", "backward"), step(name, args.workspace_mb), strict=True):
        stages: dict[str, list[Launch]] = defaultdict(list)
        for launch in launches:
            stages[launch.name].append(launch)
        for stage, made in stages.items():
            flops, moved = sum(v.flops for v in made), sum(v.bytes for v in made)
            each = [max(v.flops / args.tflops / 1e12, v.bytes / args.tbps / 1e12) for v in made]
            tiled = sum(v.tiles for v in made)
            limit = "arithmetic" if flops / args.tflops > moved / args.tbps else "memory"
            lines.append(
                f"| {half}: {stage} | {len(made)} | {flops / 1e9:,.0f} | {moved / 1e9:.2f} "
                f"| {f'{tiled / 1e9:.1f}' if tiled else ''} | {flops / moved:.0f} "
                f"| {1e3 * sum(each):.2f} | {limit} |"
            )
            total = [a + b for a, b in zip(total, (flops, moved, sum(each)), strict=True)]
    lines.append(
        f"| all | | {total[0] / 1e9:,.0f} | {total[1] / 1e9:.2f} | | {total[0] / total[1]:.0f} "
        f"| {1e3 * total[2]:.2f} | |\n"
    )
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tflops", type=float, default=790, help="bfloat16, an H200's matmul")
    parser.add_argument("--tbps", type=float, default=4.3, help="TB/s, an H200's copy")
    parser.add_argument("--workspace-mb", type=float, default=256)
    return parser


def main() -> None:
    args = options().parse_args()
    for name in WORKLOADS:
        print(table(name, args), flush=True)


if __name__ == "__main__":
    main()
