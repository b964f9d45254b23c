"""What a loss would do with an input, without doing it: backend, FLOPs, bytes saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpl_fast import chain, functional, plan
from gpl_fast.backend import Choice
from gpl_fast.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.targets import Target, TargetFeatures, TopK, resolve_target


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
    """What `explain` found; print it.

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
    """

    backend: str
    reason: str
    compute_dtype: torch.dtype
    flops: int
    bytes_saved: int
    workspace_bytes: int | None
    layers: tuple[LayerCost, ...]
    float32_convolutions: bool = False

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
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            saved = "" if layer.bytes_saved is None else f" {_size(layer.bytes_saved):>12} saved"
            lines.append(f"  {layer.name:<9} {shape:<22} {layer.flops / 1e9:9.2f} GFLOP{saved}")
        by_layer = [layer.bytes_saved for layer in self.layers if layer.bytes_saved is not None]
        if by_layer:
            rest = _size(self.bytes_saved - sum(by_layer))
            lines.append(f"  {'log-sum-exp, valid pixels':<48} {rest:>12} saved")
        return "\n".join(lines)


def explain(
    loss: Callable[[Tensor, Any, Tensor | None], Tensor],
    pred: Tensor,
    target: Tensor | TopK | TargetFeatures,
    mask: Tensor | None,
    net: LossNet,
    taps: Sequence[str],
    options: Options,
) -> Explanation:
    """Plan the call and count: nothing is computed, and no value but a label's is looked at.

    Args:
        loss: called as ``loss(pred, target, mask)``.
        pred: (N, C, H, W); its values are not looked at.
        target, mask: what the loss takes.
        net: its network.
        taps: layers it compares.
        options: its keywords.
    """
    o = options
    resolved = resolve_target(
        target, net.in_channels, mask=mask, ignore_index=o.ignore_index, pred=pred
    )
    dtype = functional.compute_dtype(pred, resolved, o)
    choice = functional.choose_backend(pred, dtype, net, o)
    if choice.name == "fast":
        return _explain_fast(pred, resolved, mask, net, taps, o, dtype, choice)
    layers = _layer_costs(net, pred, resolved.kind, taps, None)
    # On CUDA labels and indices out of range make a mask of their own; meta tensors are like CPU's.
    made = resolved.valid is not None and resolved.kind in ("labels", "topk") and pred.is_cuda
    bytes_saved, counted = _run_on_meta(
        loss, pred, target, resolved.valid if made else mask, net, not made
    )
    flops = sum(layer.flops for layer in layers) if layers else counted
    return Explanation(choice.name, choice.reason, dtype, flops, bytes_saved, None, layers)


def _explain_fast(
    pred: Tensor,
    target: Target,
    mask: Tensor | None,
    net: LossNet,
    taps: Sequence[str],
    o: Options,
    dtype: torch.dtype,
    choice: Choice,
) -> Explanation:
    spec = plan.make_spec(
        net,
        feature_weights=dict.fromkeys(taps, 1.0),
        style_weights={},
        kind=target.kind,
        activation=o.activation,
        target_activation=o.target,
        temperature=o.temperature,
        device=pred.device.type,
        dtype=dtype,
        arithmetic=chain.arithmetic(pred.device, dtype),
        workspace_mb=o.workspace_mb,
    )
    n, _, height, width = pred.shape
    planned = plan.Plan(plan.load_spec(spec), n, height, width)
    layers = _layer_costs(net, pred, target.kind, taps, planned)
    total = planned.bytes_saved()
    if target.valid is not None and (
        mask is None or target.valid.untyped_storage()._cdata != mask.untyped_storage()._cdata
    ):
        total += target.valid.numel()
    flops = sum(layer.flops for layer in layers)
    workspace = planned.bytes_transient()
    float32 = planned.spec.arithmetic == "float32"
    return Explanation(choice.name, choice.reason, dtype, flops, total, workspace, layers, float32)


def _run_on_meta(
    loss: Callable[[Tensor, Any, Tensor | None], Tensor],
    pred: Tensor,
    target: Tensor | TopK | TargetFeatures,
    mask: Tensor | None,
    net: LossNet,
    own_mask: bool = True,
) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward, each storage once, and FLOPs of the network."""
    meta_pred = torch.empty_like(pred, device="meta").requires_grad_()
    meta_target, meta_mask = _to_meta(target), None if mask is None else mask.to("meta")
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where it is installed

    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = loss(meta_pred, meta_target, meta_mask)
        value.sum().backward()  # type: ignore[no-untyped-call]
    own = [meta_pred, *_tensors(meta_target), *net.cached_tensors()]
    for t in [*own, meta_mask] if meta_mask is not None and own_mask else own:
        kept.pop(t.untyped_storage()._cdata, None)
    bytes_saved = sum(t.untyped_storage().nbytes() for t in kept.values())
    return bytes_saved, int(counter.get_total_flops())


def _layer_costs(
    net: LossNet, pred: Tensor, kind: str, taps: Sequence[str], planned: plan.Plan | None
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
            looked_up = not costs and kind in ("labels", "topk")
            passes = (
                2
                if kind == "features" or (looked_up and planned is not None and not planned.front)
                else 3
            )
            flops = 2 * layer.kernel_size**2 * layer.in_channels * c * h * w * n * passes
        kept = None if planned is None else saved.get(layer.name, 0)
        costs.append(LayerCost(layer.name, (n, c, h, w), flops, kept))
        missing.discard(layer.name)
        if not missing:
            break
    return tuple(costs)


def _to_meta(target: Tensor | TopK | TargetFeatures) -> Any:
    if isinstance(target, TopK):
        return replace(target, values=target.values.to("meta"), indices=target.indices.to("meta"))
    return target.to("meta")


def _tensors(target: Tensor | TopK | TargetFeatures) -> list[Tensor]:
    if isinstance(target, TopK):
        return [target.values, target.indices]
    if isinstance(target, TargetFeatures):
        masks = [t for t in (target.mask, target.valid) if t is not None]
        return [*target.features.values(), *masks]
    return [target]


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
