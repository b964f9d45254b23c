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
from gpl_fast.net.lossnet import LossNet


@dataclass(frozen=True)
class LayerCost:
    """One layer: output (N, C_b, H_b, W_b), FLOPs of prediction, target and data gradient, and the
    bytes it leaves for the backward on the fast path (None on the reference)."""

    name: str
    shape: tuple[int, int, int, int]
    flops: int
    bytes_saved: int | None


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
