"""What a call costs, without making it: FLOPs, and bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gpl_fast import parts
from gpl_fast.fast.call import LOOKED_UP
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.who import Runs
from gpl_fast.net.lossnet import LossNet


@dataclass(frozen=True)
class LayerCost:
    """One layer: output (N, C_b, H_b, W_b), FLOPs of prediction, target and data gradient, and the
    bytes it leaves for the backward on the fast path (None on the reference)."""

    name: str
    shape: tuple[int, int, int, int]
    flops: int
    bytes_saved: int | None


@dataclass(frozen=True)
class Explanation:
    """What `gpl_fast.explain` found; print it.

    Attributes:
        backend, reason: which backend runs, and why.
        compute_dtype: what the network's maps are in.
        float32_convolutions: they are computed in float32 whatever `compute_dtype` is, as this CPU
            is no faster in it.
        flops: multiply-adds counted twice: both forward branches and the data gradient.
        bytes_saved: what autograd keeps for the backward besides the caller's own tensors and the
            network's weights: by the saved-tensor contract, or measured on meta tensors.
        workspace_bytes: bound on transient memory, None where nothing bounds it.
        layers: the costs by layer; empty for `LossNet.from_module`.
        who: the functions that run each step on the fast path, forward and backward.
        ratio: of the norm of each part's gradient by the prediction to the first part's, weighted
            as in the loss, of the parts that there are; None if not asked for, empty for one part.
    """

    backend: str
    reason: str
    compute_dtype: torch.dtype
    flops: int
    bytes_saved: int
    workspace_bytes: int | None
    layers: tuple[LayerCost, ...]
    float32_convolutions: bool = False
    who: tuple[Runs, ...] = ()
    ratio: Mapping[str, float] | None = None

    def __str__(self) -> str:
        bound = "unbounded" if self.workspace_bytes is None else _size(self.workspace_bytes)
        dtype = str(self.compute_dtype).removeprefix("torch.")
        if self.float32_convolutions and self.compute_dtype != torch.float32:
            dtype += f" (convolutions in float32: this CPU is no faster in {dtype})"
        lines = [
            f"backend        {self.backend} ({self.reason})",
            f"compute dtype  {dtype}",
            f"work           {self.flops / 1e9:.2f} GFLOP forward and backward",
            f"saved          {_size(self.bytes_saved)} for backward",
            f"workspace      {bound}",
        ]
        if self.ratio is not None:
            each = [f"{name} {ratio:.3g}" for name, ratio in self.ratio.items()]
            said = ", ".join(each) + " of the first part's" if each else "of one part: no ratio"
            lines.append(f"gradients      {said}")
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            saved = "" if layer.bytes_saved is None else f" {_size(layer.bytes_saved):>12} saved"
            lines.append(f"  {layer.name:<9} {shape:<22} {layer.flops / 1e9:9.2f} GFLOP{saved}")
        by_layer = [layer.bytes_saved for layer in self.layers if layer.bytes_saved is not None]
        if by_layer:
            rest = _size(self.bytes_saved - sum(by_layer))
            lines.append(f"  {'log-sum-exp, valid pixels':<48} {rest:>12} saved")
        for half in ("forward", "backward"):
            lines += [half] if self.who else []
            order = self.who if half == "forward" else reversed(self.who)
            lines += [f"  {r.step:<9} {getattr(r, half)}" for r in order if getattr(r, half)]
        return "\n".join(lines)


@torch.inference_mode(False)  # whose tensors no graph could save
def run_on_meta(
    run: Callable[..., Tensor | dict[str, Tensor]], inputs: Mapping[str, Any], net: LossNet
) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward, each storage once, and FLOPs of the network.

    Args:
        run: called with `inputs` by name; the first one is the prediction.
    """
    name, *_ = inputs
    moved = {k: None if t is None else t.to("meta") for k, t in inputs.items()}
    moved[name] = torch.empty_like(inputs[name], device="meta").requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where it is installed

    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found = run(**moved)
            value = parts.sum_of_parts(found) if isinstance(found, dict) else found
        value.sum().backward()  # type: ignore[no-untyped-call]
    given = [t for x in moved.values() for t in tree_leaves(x) if isinstance(t, Tensor)]
    for t in [*given, *net.cached_tensors()]:
        kept.pop(t.untyped_storage()._cdata, None)
    bytes_saved = sum(t.untyped_storage().nbytes() for t in kept.values())
    return bytes_saved, int(counter.get_total_flops())


def layer_costs(
    net: LossNet, pred: Tensor, kind: str, taps: Sequence[str], planned: Plan | None
) -> tuple[LayerCost, ...]:
    """The costs up to the last tap; `planned` where the fast path runs."""
    if not net.is_chain:
        return ()
    n, _, height, width = pred.shape
    saved = {} if planned is None else planned.bytes_saved_by_layer()
    costs: list[LayerCost] = []
    missing = set(taps)
    for layer in net.layers:
        c, h, w = net.shapes(height, width)[layer.name]
        flops = 0
        if layer.kind in ("conv", "down"):
            # Prediction, its gradient, target; labels and top-k maps enter by look-up.
            looked_up = not costs and kind in LOOKED_UP
            passes = (
                2
                if kind == "features"
                or (looked_up and planned is not None and not planned.call.front)
                else 3
            )
            flops = 2 * layer.kernel_size**2 * layer.in_channels * c * h * w * n * passes
        kept = None if planned is None else saved.get(layer.name, 0)
        costs.append(LayerCost(layer.name, (n, c, h, w), flops, kept))
        missing.discard(layer.name)
        if not missing:
            break
    return tuple(costs)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
