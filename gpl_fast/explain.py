"""What a loss would do with an input, without doing it: backend, FLOPs, bytes saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpl_fast import backend as backends
from gpl_fast import engine, parts
from gpl_fast.backend import Choice
from gpl_fast.balance import ratios, segmentation_norms
from gpl_fast.costs import Explanation, layer_costs, run_on_meta
from gpl_fast.description import describe
from gpl_fast.fast.call import LOOKED_UP, read
from gpl_fast.fast.operator import label_dtype
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.policy import named
from gpl_fast.fast.who import who_runs
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.sharded import local
from gpl_fast.targets import (
    EncodedTarget,
    Target,
    TargetLike,
    resolve_target,
    weights_of_pixels,
)
from gpl_fast.terms import Segmentation, Weights


def explain(
    loss: nn.Module,
    net: LossNet,
    o: Options,
    pred: Tensor,
    target: TargetLike,
    mask: Tensor | None,
    *,
    weights: Weights,
    style_target: TargetLike | None = None,
    tv_weight: float = 0.0,
    architecture: str | None = None,
    spatial: bool = False,
) -> Explanation:
    """Plan the call and count: nothing is computed, and of a target only what is checked is read.

    Args:
        loss: called with these tensors, by name.
        net, o: its network and options.
        pred: (N, C, H, W); its values are not looked at. On "meta" it stands for one on the default
            device.
        target, mask, style_target: what the loss takes.
        weights, tv_weight: its own.
        architecture: who computes there, instead of on the prediction's device: "sm_90", "avx2",
            "avx512", "avx512_bf16", "amx" and so on.
        spatial: the loss gives a map.

    Raises:
        ValueError: an unknown architecture, and what the loss raises.
    """
    pred, target, style_target, mask = local(pred, target, style_target, mask)
    resolved = resolve_target(target, net.in_channels, o, mask=mask, pred=pred)
    inputs: dict[str, Any] = {"pred": pred, "target": target, "mask": mask}
    if style_target is not None:
        inputs["style_target"] = style_target
    planned = Planned(
        loss, net, o, pred, resolved, mask, inputs, weights,
        architecture=architecture, spatial=spatial,
    )  # fmt: skip
    found = planned.explain()
    if tv_weight and found.backend == "fast":  # which leaves the total variation to PyTorch
        smooth = {"pred": pred, "valid": resolved.valid}
        saved, _ = run_on_meta(
            lambda pred, valid: parts.total_variation(pred, valid, o), smooth, net
        )
        found = replace(found, bytes_saved=found.bytes_saved + saved)
    return found


def explain_segmentation(
    loss: nn.Module,
    net: LossNet,
    o: Options,
    s: Segmentation,
    logits: Tensor,
    labels: Tensor,
    *,
    teacher: TargetLike | None,
    mask: Tensor | None,
    taps: Weights,
    architecture: str | None = None,
    ratio: bool = False,
) -> Explanation:
    """`explain` for a loss with a cross-entropy; see `functional.segmentation_loss`."""
    logits, labels, teacher, mask = local(logits, labels, teacher, mask)
    resolve, compared = parts.segmentation_resolvers(s)
    checked, given = resolve(labels, mask, logits, net, o)
    size = tuple(checked.shape[-2:])
    full = logits
    if size != tuple(logits.shape[2:]):  # as large, and without memory
        full = logits.new_empty(()).expand(*logits.shape[:2], *size)
    target = compared(teacher, checked, given, full, o, s.gpl_ignore)
    inputs = {"logits": logits, "labels": labels, "teacher": teacher, "mask": mask}
    shared = s.label_smoothing if s.ce_weight and s.gpl_weight else None
    kept = s.by_element and (shared is not None or target.elements is not None)
    ce_mask = None if shared is None or given is None else weights_of_pixels(target, checked, given)
    found = Planned(
        loss, net, o, full, target, mask, inputs, taps if s.gpl_weight else Weights({}, {}),
        shared, multi_hot=checked if kept else None, ce_mask=ce_mask,
        resized=full is not logits, architecture=architecture,
    ).explain()  # fmt: skip
    if not ratio:
        return found
    norms = segmentation_norms(logits, labels, net, taps, o, s, teacher=teacher, mask=mask)
    by_part = {"loss_ce": s.ce_weight, "loss_gpl": s.gpl_weight}
    return replace(found, ratio=ratios(norms, by_part))


@dataclass(frozen=True)
class Planned:
    """A call of a loss with checked arguments, to be counted.

    ``label_smoothing``: of the cross-entropy that shares the fast path's passes, or None;
    ``multi_hot``: labels of elements (N, C, H, W) uint8 that the fast path keeps, or None;
    ``ce_mask``: the cross-entropy's weights of pixels, or None; ``resized``: the prediction is a
    map that the loss makes; ``architecture``, ``spatial``: see `explain`.
    """

    loss: nn.Module
    net: LossNet
    o: Options
    pred: Tensor
    target: Target
    mask: Tensor | None
    inputs: Mapping[str, Any]
    weights: Weights
    label_smoothing: float | None = None
    multi_hot: Tensor | None = None
    ce_mask: Tensor | None = None
    resized: bool = False
    architecture: str | None = None
    spatial: bool = False

    def explain(self) -> Explanation:
        dtype = engine.compute_dtype(self.pred, self.target, self.o)
        wide = torch.float64 if self.pred.dtype == torch.float64 else dtype
        choice = self._choice(wide)
        if not self.taps:
            choice = Choice("reference", "no feature has a weight")
        if choice.name == "fast":
            return self._fast(dtype, choice)
        layers = layer_costs(self.net, self.pred, self.target.kind, self.taps, None)
        bytes_saved, counted = run_on_meta(self.loss, self._seen_inputs(), self.net)
        flops = sum(layer.flops for layer in layers) if layers else counted
        return Explanation(choice.name, choice.reason, dtype, flops, bytes_saved, None, layers)

    def _choice(self, dtype: torch.dtype) -> Choice:
        if self.architecture is None:
            return backends.choose(self.o.backend, self.device, dtype, self.net)
        named(self.architecture)
        return backends.choose_anywhere(self.o.backend, dtype, self.net)

    @property
    def device(self) -> torch.device:
        """Of the prediction, or of what a meta tensor stands for."""
        if not self.pred.is_meta:
            return self.pred.device
        usual = torch.get_default_device()
        return torch.device("cpu") if usual.type == "meta" else usual

    @property
    def taps(self) -> tuple[str, ...]:
        return self.weights.layers

    def _seen_inputs(self) -> dict[str, Any]:
        # On CUDA labels and indices out of range make a mask of their own; meta tensors are like
        # the CPU's.
        made = self.target.valid is not None and self.target.kind in LOOKED_UP
        return {
            **self.inputs,
            **({"mask": self.target.valid} if made and self.pred.is_cuda else {}),
        }

    def _encoded(self, dtype: torch.dtype) -> Target:
        """As `target_features.encoded`, without memory."""
        target, n = self.target, len(self.pred)
        if not self.weights.normalized or target.stored is not None:
            return target
        shapes = self.net.shapes(*target.size)
        stored = {
            name: torch.empty((n, *shapes[name]), dtype=dtype, device="meta") for name in self.taps
        }
        return EncodedTarget(target.size, target.valid, stored=stored, elements=target.elements)

    def _fast(self, dtype: torch.dtype, choice: Choice) -> Explanation:
        o, target = self.o, self._encoded(dtype)
        tensors = target.tensors(dtype)
        names = tuple(name for name in tensors if tensors[name] is not self.multi_hot)
        names += tuple(f"weight.{name}" for name in self.weights.channels)
        if self.multi_hot is not None:
            names += ("multi_hot",)
        elif self.label_smoothing is not None and "labels" not in names:
            names += ("ce_labels",)
        text = describe(
            self.net, o, target, self.weights, self.device, dtype, names, self.label_smoothing,
            by=self.architecture, spatial=self.spatial,
        )  # fmt: skip
        n, c, height, width = self.pred.shape
        planned = Plan(read(text), n, height, width)
        kind = self.target.kind if target is self.target else "dense"  # both branches, as maps
        layers = layer_costs(self.net, self.pred, kind, self.taps, planned)
        total = planned.bytes_saved()
        if target.valid is not None and not _same_memory(target.valid, self.mask):
            total += target.valid.nbytes
        own = self.ce_mask is not None and self.ce_mask is not target.valid
        if self.ce_mask is not None and own and not _same_memory(self.ce_mask, self.mask):
            total += self.ce_mask.nbytes
        if self.multi_hot is not None:
            total += self.multi_hot.numel()
        elif self.label_smoothing is not None:
            total += n * height * width * label_dtype(c).itemsize
        if self.resized:
            total += self.pred.numel() * self.pred.element_size()
        return Explanation(
            choice.name,
            choice.reason,
            dtype,
            sum(layer.flops for layer in layers),
            total,
            planned.bytes_transient(),
            layers,
            planned.policy.arithmetic(dtype) == "float32",
            tuple(who_runs(planned)),
        )


def _same_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage()._cdata == b.untyped_storage()._cdata
