"""Whether the kernels are right on a GPU: bits against bits, and each form against float64 there.

``python benchmarks/gpu_truth.py CASE --out rows.json`` runs one of `CASES`; a row a quantity says
what was found and what it may be. ``--dry`` interprets the kernels on the CPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpl_fast
from gpl_fast import ops
from gpl_fast.fast import policy
from gpl_fast.fast.policy import Policy
from gpl_fast.tools import measure

Row = dict[str, Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Beside twice plain PyTorch's error in the same dtype: of the value, and of the gradient, where
# rounding swaps winners and signs.
ATOL = {torch.float32: (2e-3, 0.02), torch.bfloat16: (2e-3, 0.05), torch.float16: (5e-4, 0.02)}
RUNS = 5  # of the same bits
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "labels": ("labels", {}),
    "topk": ("topk", {}),
    "rest": ("topk", {"rest": "uniform"}),
    "avg": ("dense", {"pool": "avg"}),
    "stride": ("labels", {"pool": "stride"}),
    "kernel5": ("dense", {"kernel_size": 5}),
    "sigmoid": ("dense", {"activation": "sigmoid"}),
}


class _ByPointers(Policy):
    """The same sums in the same order, but no TMA and no copy that is on its way."""

    def tile(self, *layer: Any) -> Any:
        return replace(super().tile(*layer), stages=1, descriptors=False)


class _ByKernel(Policy):
    """`conv_block_bwd` in every layer."""

    def by_kernel(self, *layer: Any) -> bool:
        return self.device == "cuda" and self.backward == "compiled"


def changed(now: Policy, kind: type[Policy]) -> Policy:
    """`now`, as `kind` decides."""
    return kind(**{f.name: getattr(now, f.name) for f in fields(Policy)})


class Bench:
    """One device's losses and inputs."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, torch.device("cpu" if dry else "cuda:0")
        self.shape = (1, 16, 32, 33) if dry else (3, 150, 97, 131)
        torch.manual_seed(0)

    def policy(self) -> Policy:
        """Who decides here; in a dry run as on sm_90, with Triton's stages interpreted."""
        now = policy.named(policy.current(self.device))
        return replace(now, forward="triton", backward="triton", arch=90) if self.dry else now

    def loss(self, backend: str = "fast", **options: Any) -> gpl_fast.GenericPerceptualLoss:
        """Few channels in a dry run."""
        if self.dry:
            options["widths"] = (16, 16, 8, 8, 8)
        return gpl_fast.GenericPerceptualLoss(self.shape[1], backend=backend, **options)

    def inputs(self, kind: str, rest: str = "drop") -> tuple[Tensor, Any]:
        """Logits in float32 and a target."""
        n, c, h, w = self.shape
        x = 2 * torch.randn(self.shape, device=self.device)
        if kind == "labels":
            coarse = torch.randint(c, (n, 1, -(-h // 8), -(-w // 8)), device=self.device)
            whole = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
            return x, whole[:, 0, :h, :w].contiguous()
        dense = 2 * torch.randn(self.shape, device=self.device)
        if kind == "topk":
            return x, gpl_fast.TopK(*torch.softmax(dense, dim=1).topk(3, dim=1), rest)
        return x, dense

    def run(
        self, loss: Any, x: Tensor, target: Any, kind: type[Policy] | None = None, **stages: Any
    ) -> tuple[Tensor, ...]:
        """(value, gradient), as `kind` decides; `stages`: who has them, by the policy's words."""
        now = self.policy()
        with policy.injected(now if kind is None else changed(now, kind), **stages):
            return measure.step(loss, x, target)


def error(found: Tensor, truth: Tensor) -> float:
    """Norm-wise, relative, in float64."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def moved(target: Any, dtype: torch.dtype) -> Any:
    """A floating target in `dtype`."""
    if isinstance(target, gpl_fast.TopK):
        return gpl_fast.TopK(target.values.to(dtype), target.indices, target.rest)
    return target.to(dtype) if target.is_floating_point() else target


def bits(bench: Bench, kind: str, dtype: torch.dtype) -> list[Row]:
    """Shipped tiles, again and again, against pointers with nothing on its way."""
    x, target = bench.inputs(kind)
    x, loss = x.to(dtype), bench.loss()
    plain = bench.run(loss, x, target, _ByPointers)
    rows = []
    for i in range(1 if bench.dry else RUNS):
        got = bench.run(loss, x, target)
        same = all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
        off = max(error(a, b) for a, b in zip(got, plain, strict=True))
        rows.append({"what": f"run {i}", "error": off, "bound": 0.0, "ok": same})
    return rows


def form(
    bench: Bench, name: str, dtype: torch.dtype, kind: type[Policy] | None = None, **stages: Any
) -> list[Row]:
    """Value and gradient against the reference in float64, as near as plain PyTorch's twice."""
    target_kind, options = FORMS[name]
    options = dict(options)
    x, target = bench.inputs(target_kind, options.pop("rest", "drop"))
    exact, plain = (bench.loss("reference", **options) for _ in range(2))
    truth = measure.step(exact, x.double(), moved(target, torch.float64))
    x, target = x.to(dtype), moved(target, dtype)
    ours = bench.run(bench.loss(**options), x, target, kind, **stages)
    theirs = measure.step(plain, x, target)
    rows = []
    for i, what in enumerate(("value", "gradient")):
        off, peer = error(ours[i], truth[i]), error(theirs[i], truth[i])
        bound = 2 * peer + ATOL[dtype][i]
        rows.append({"what": what, "error": off, "plain": peer, "bound": bound, "ok": off <= bound})
    return rows


def by_older_kernel(bench: Bench) -> list[Row]:
    """The backward that sm_90 takes from sm_80."""
    os.environ["GPL_FAST_SM90A"] = "0"
    return form(bench, "dense", torch.bfloat16, _ByKernel)


def by_halo(bench: Bench) -> list[Row]:
    """The forward that loads halos once, which no call takes by itself."""
    halo = importlib.import_module("halo")
    assert ops.load() is None, ops.load()
    return form(bench, "dense", torch.bfloat16, triton=halo.halo)


Case = Callable[[Bench], list[Row]]
# What would be wrong without a word goes first.
CASES: dict[str, Case] = {
    "bits-labels-bf16": lambda b: bits(b, "labels", torch.bfloat16),
    "backward-bf16": lambda b: form(b, "dense", torch.bfloat16, _ByKernel),
    "form-dense-bf16": lambda b: form(b, "dense", torch.bfloat16),
    "form-labels-bf16": lambda b: form(b, "labels", torch.bfloat16),
    "bits-dense-bf16": lambda b: bits(b, "dense", torch.bfloat16),
    "form-topk-bf16": lambda b: form(b, "topk", torch.bfloat16),
    "bits-topk-bf16": lambda b: bits(b, "topk", torch.bfloat16),
    "form-rest-bf16": lambda b: form(b, "rest", torch.bfloat16),
    "form-dense-fp32": lambda b: form(b, "dense", torch.float32),
    "form-labels-fp16": lambda b: form(b, "labels", torch.float16),
    **{
        f"form-{name}-bf16": functools.partial(form, name=name, dtype=torch.bfloat16)
        for name in ("avg", "stride", "kernel5", "sigmoid")
    },
    "halo-dense-bf16": by_halo,
    "backward-sm80-bf16": by_older_kernel,
    "form-dense-fp16": lambda b: form(b, "dense", torch.float16),
    "backward-fp32": lambda b: form(b, "labels", torch.float32, _ByKernel),
}
DRY = ("bits-labels-bf16", "backward-bf16", "form-dense-bf16", "form-topk-bf16")


def interpret() -> None:
    """Triton interprets from here on."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpuless"))
    importlib.import_module("interpreting").repaired()


def main() -> int:
    """Rows of one case; 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="interpreted on the CPU")
    args = parser.parse_args()
    if args.dry:
        interpret()
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it
    rows = CASES[args.case](Bench(args.dry))
    for row in rows:
        row["case"] = args.case
        print(row, flush=True)
    args.out.write_text(json.dumps(rows))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
